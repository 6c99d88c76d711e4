"""Outputs are whole or not there, readable by others, and leave nothing behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from library.errors import DiskError
from library.files import TEMPORARY_MARK, FileStat, atomic_folder, atomic_write, sha256_file, sweep_leftovers


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_bytes_text_and_writers_arrive(tmp_path: Path) -> None:
    atomic_write(tmp_path / "a", b"\x00\x01")
    atomic_write(tmp_path / "sub" / "b", "grün")
    atomic_write(tmp_path / "c", lambda path: path.write_bytes(b"c"))
    assert (tmp_path / "a").read_bytes() == b"\x00\x01"
    assert (tmp_path / "sub" / "b").read_text(encoding="utf-8") == "grün"
    assert names(tmp_path) == ["a", "c", "sub"]


def test_a_failing_writer_leaves_the_old_file(tmp_path: Path) -> None:
    atomic_write(tmp_path / "a", "old")

    def fail(path: Path) -> None:
        path.write_text("half")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        atomic_write(tmp_path / "a", fail)
    assert (tmp_path / "a").read_text() == "old" and names(tmp_path) == ["a"]


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        atomic_write(tmp_path / "a", b"x")
        with atomic_folder(tmp_path / "folder") as folder:
            (folder / "b").write_bytes(b"y")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == mode
    assert (tmp_path / "folder").stat().st_mode & 0o777 == mode | (mode & 0o444) >> 2


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(KeyError), atomic_folder(tmp_path / "state") as folder:
        (folder / "a").write_text("a")
        raise KeyError
    assert names(tmp_path) == []
    with atomic_folder(tmp_path / "state") as folder:
        (folder / "a").write_text("a")
        assert not (tmp_path / "state").exists()
    assert names(tmp_path / "state") == ["a"]


def test_a_killed_writer_is_swept_and_a_living_one_is_not(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom library.files import atomic_write\n"
        "def write(path):\n    path.write_text('half'); print('ready', flush=True); time.sleep(60)\n"
        "atomic_write(Path(sys.argv[1]) / 'a', write)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    assert sweep_leftovers(tmp_path) == [] and len(names(tmp_path)) == 1
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert [TEMPORARY_MARK in name for name in sweep_leftovers(tmp_path)] == [True]
    assert names(tmp_path) == []


def test_a_leftover_whose_process_number_is_in_use_again_is_swept(tmp_path: Path) -> None:
    made: list[str] = []
    atomic_write(tmp_path / "a", lambda path: (made.append(path.parent.name), path.write_bytes(b""))[1])
    owner, pid, started, mark = made[0].rsplit("-", 3)
    assert int(pid) == os.getpid() and started.isdigit()
    ours, earlier = made[0], f"{owner}-{pid}-{int(started) - 1}-{mark}"
    for name in (ours, earlier):
        (tmp_path / name).mkdir()
    assert sweep_leftovers(tmp_path) == [earlier] and names(tmp_path) == sorted(["a", ours])


def test_a_full_disk_is_a_plain_error(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="No space left"):
        atomic_write(tmp_path / "a", lambda path: Path("/dev/full").write_bytes(b"x" * 100_000))
    assert names(tmp_path) == []


def test_stat_changes_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("one")
    before, digest = FileStat.of(path), sha256_file(path)
    time.sleep(0.01)
    path.write_text("two")
    os.utime(path, ns=(before.mtime_ns, before.mtime_ns))
    after = FileStat.of(path)
    assert (after.size, after.mtime_ns) == (before.size, before.mtime_ns) and after.ctime_ns != before.ctime_ns
    assert sha256_file(path) != digest
