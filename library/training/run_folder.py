"""The output folder of one run: who works in it, which run it holds, and whether there is something to continue.

The same command run again continues an unfinished run; a finished one stops with a message; another run's folder is
refused, so that nothing is ever overwritten.
"""

import datetime
import json
import os
import shutil
import socket
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout

from library.config.resolved import differences, split
from library.errors import ConfigError
from library.files import atomic_write, sweep_leftovers
from library.training import saving

LOCK, OWNER, RECORD = ".influx.lock", ".influx.owner.json", "run.json"


@dataclass(frozen=True)
class Record:
    """run.json: which run the folder holds and how far it got.

    begun: it has finished a step. stopped_early: the early_stop_patience that ended it, if one did.
    resumed: the state that `resume` made it go back to last: its fingerprint, path and step.
    """

    identity: dict[str, object]
    seed: int
    finished_steps: int | None = None
    finished_epochs: int | None = None
    started: str = ""
    begun: bool = True
    stopped_early: int | None = None
    resumed: dict[str, object] | None = None


def fresh_folder(output_dir: Path, output_name: str) -> Path:
    """`output_dir`, or the first of output_dir-2, output_dir-3, ... that holds no run and no network of that name."""
    number, folder = 1, output_dir
    while (folder / RECORD).exists() or (folder / f"{output_name}.safetensors").exists():
        number += 1
        folder = output_dir.with_name(f"{output_dir.name}-{number}")
    return folder


class RunFolder:
    """Holds the folder's lock while it is open. Only the main process opens one."""

    def __init__(self, output_dir: Path, output_name: str):
        self.path = output_dir
        self.name = output_name
        self._lock = FileLock(output_dir / LOCK, timeout=0)

    def __enter__(self) -> "RunFolder":
        """Raises ConfigError if another process works in the folder, DiskError if it cannot be written."""
        atomic_write(self.path / ".influx.writable", b"")  # a read-only disk is found before any model is loaded
        (self.path / ".influx.writable").unlink()
        try:
            self._lock.acquire()
        except Timeout as error:
            raise ConfigError(
                f"another process trains in {self.path}: {_owner(self.path)}. Wait for it, stop it, or use another "
                "output_dir"
            ) from error
        sweep_leftovers(self.path)
        for retired in self.path.glob("*" + saving.STATE_SUFFIX + ".old"):
            if retired.with_name(retired.name.removesuffix(".old")).exists():
                shutil.rmtree(retired)
            else:
                retired.rename(retired.with_name(retired.name.removesuffix(".old")))
        atomic_write(self.path / OWNER, json.dumps(_self()))
        return self

    def __exit__(self, *_: object) -> None:
        (self.path / OWNER).unlink(missing_ok=True)
        self._lock.release()

    def record(self) -> Record | None:
        """What run.json says, if there is one."""
        path = self.path / RECORD
        if not path.exists():
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return Record(
                values["identity"],
                values["seed"],
                values["finished_steps"],
                values["finished_epochs"],
                values["started"],
                values.get("begun", True),
                values.get("stopped_early"),
                values.get("resumed"),
            )
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is damaged ({error!r}); use --fresh to start a new run beside it") from error

    def write_record(self, record: Record) -> None:
        """Write run.json."""
        atomic_write(self.path / RECORD, json.dumps(vars(record), indent=1, ensure_ascii=False))

    def has_begun(self) -> None:
        """Note that the run has finished a step: from now on the folder is its own."""
        record = self.record()
        if record is not None and not record.begun:
            self.write_record(replace(record, begun=True))

    def refuse_strangers(self, record: Record | None, identity: dict[str, object]) -> None:
        """Raises ConfigError if the folder holds another run, or files that a new run would overwrite."""
        if record is None:
            taken = self.path / f"{self.name}.safetensors"
            if taken.exists():
                raise ConfigError(
                    f"{taken} exists and belongs to no run of this folder; choose another output_name or output_dir, "
                    "or use --fresh"
                )
            return
        changed = differences(split(record.identity)[0], split(identity)[0])
        if changed:
            raise ConfigError(
                f"{self.path} holds another run. What differs (old -> new):\n  " + "\n  ".join(changed)
                + "\nPut the values back to continue it, use --fresh to start a new run in a numbered folder, or "
                "choose another output_dir"
            )  # fmt: skip


def _self() -> dict[str, object]:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "started": now}


def _owner(folder: Path) -> str:
    try:
        owner = json.loads((folder / OWNER).read_text(encoding="utf-8"))
        return f"process {owner['pid']} on {owner['host']}, started {owner['started']}"
    except (OSError, json.JSONDecodeError, KeyError):
        return "an unknown process"


def new_record(identity: dict[str, object], seed: int) -> Record:
    """The record of a run that starts now."""
    return Record(identity, seed, started=_self()["started"], begun=False)
