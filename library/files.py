"""Files that are either whole or not there: every output of InFlux is written through this module.

A file is written inside a temporary folder beside it (so that a library's own temporary files are swept with it),
flushed to the disk, given the permissions the umask asks for, and renamed over its final name. A kill at any instant
leaves the old file or the new one, never a half.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from library.errors import DiskError

TEMPORARY_MARK = ".influx-tmp-"
_CHUNK = 1 << 20
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG}


@dataclass(frozen=True)
class FileStat:
    """What tells cheaply whether a file may have changed: size in bytes, times in ns, inode number."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path | str) -> "FileStat":
        """Stat of ``path``, following links. Raises FileNotFoundError if it does not exist."""
        stat = os.stat(path)
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


def sha256_file(path: Path | str, start: int = 0) -> str:
    """Hex SHA-256 of the bytes of ``path`` from offset ``start`` to the end."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(start)
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def disk_error(error: OSError, path: Path | str) -> DiskError:
    """The plain message for an OSError met while writing ``path``."""
    reason = error.strerror or str(error)
    advice = {
        errno.ENOSPC: "free some space or choose another folder",
        errno.EDQUOT: "your quota is used up: free some space or choose another folder",
        errno.EROFS: "the file system is read-only: choose another folder",
        errno.EACCES: "you may not write there: choose another folder or change its permissions",
        errno.EPERM: "you may not write there: choose another folder or change its permissions",
    }.get(error.errno or 0, "check the disk")
    return DiskError(f"cannot write {path}: {reason}; {advice}")


@contextlib.contextmanager
def _as_disk_error(path: Path | str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_ERRORS:
            raise disk_error(error, path) from error
        raise


def _temporary_name(path: Path) -> Path:
    host = "".join(c if c.isalnum() else "-" for c in socket.gethostname())[:24]
    owner = f"{host}-{os.getpid()}-{_started(os.getpid())}"
    return path.with_name(f"{path.name[:120]}{TEMPORARY_MARK}{owner}-{os.urandom(4).hex()}")


def _started(pid: int) -> str:
    """When a process began, in the kernel's ticks: tells it from a later one with the same number. "" if unknown."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, where the platform can (not on Windows)."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def atomic_write(path: Path | str, content: bytes | str | Callable[[Path], None]) -> None:
    """Write ``path`` whole or not at all.

    ``content`` is the bytes, the text (UTF-8), or a function that writes the file whose path it is given.
    Raises DiskError when the disk is full, read-only or not ours.
    """
    path = Path(path)
    workshop = _temporary_name(path)
    with _as_disk_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            workshop.mkdir()
            temporary = workshop / path.name
            if callable(content):
                content(temporary)
            else:
                temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        finally:
            shutil.rmtree(workshop, ignore_errors=True)
        sync_folder(path.parent)


@contextlib.contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``path`` when the block ends without an exception.

    ``path`` must not exist yet. Raises DiskError like atomic_write.
    """
    path = Path(path)
    temporary = _temporary_name(path)
    with _as_disk_error(path):
        temporary.mkdir(parents=True)
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    with open(file, "rb+") as handle:
                        os.fsync(handle.fileno())
                    os.chmod(file, 0o666 & ~_umask())  # libraries write files that only their owner may read
            os.chmod(temporary, 0o777 & ~_umask())
            os.rename(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        sync_folder(path.parent)


def sweep_leftovers(folder: Path | str) -> list[str]:
    """Remove temporary files of dead processes of this machine directly inside ``folder``; returns their names.

    A leftover of a process that still runs, or of another machine, is left alone.
    """
    folder = Path(folder)
    removed = []
    if not folder.is_dir():
        return removed
    host = _temporary_name(Path("x")).name.split(TEMPORARY_MARK)[1].rsplit("-", 3)[0]
    for entry in folder.iterdir():
        if TEMPORARY_MARK not in entry.name:
            continue
        owner, pid, started, _ = entry.name.split(TEMPORARY_MARK)[1].rsplit("-", 3)
        if owner != host or not pid.isdigit() or _alive(int(pid), started):
            continue
        shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)
        removed.append(entry.name)
    return removed


def _alive(pid: int, started: str) -> bool:
    if started and _started(pid) not in ("", started):
        return False
    if os.name == "nt":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
