"""What `--dry_run` says of the output folder: whether the run is new there, goes on, is done, or would be refused.

It looks and writes nothing. The run itself decides in start.py, by the same record and identity. Needs no torch.
"""

from __future__ import annotations

import re
from pathlib import Path

from library.config.resolved import differences
from library.config.run import Run
from library.data.listing import Listing
from library.models.base import Base
from library.training import saving
from library.training.run_folder import RunFolder, fresh_folder
from library.training.sameness import identity_of, nothing_left, with_seed


def standing_lines(run: Run, listing: Listing, base: Base) -> list[str]:
    """Raises ConfigError if the folder holds another run."""
    name, folder = run.saving.output_name, run.saving.output_dir
    if run.command.fresh:
        folder = fresh_folder(folder, name)
    output = RunFolder(folder, name)
    record = output.record()
    if record is not None:
        run = with_seed(run, record.seed)
    identity = identity_of(run, listing, base)
    if record is not None and not record.begun and differences(record.identity, identity):
        record = None
    output.refuse_strangers(record, identity)
    wanted = run.saving.resume
    if wanted is not None and wanted != "latest":
        return [f"continues from the state {wanted} (resume), in {folder}"]
    if record is None:
        return [f"a new run in {folder}"]
    done = nothing_left(run, folder, record)
    if done:
        return [done]
    newest = _newest_state(folder, name)
    if newest is None:
        return [f"{folder} holds this run, and no state to go on from"]
    return [f"continues the run in {folder} from its newest state ({newest.name})"]


def _newest_state(folder: Path, name: str) -> Path | None:
    found = [
        path.parent
        for path in folder.glob(f"{name}*{saving.STATE_SUFFIX}/{saving.MANIFEST}")
        if re.fullmatch(re.escape(name) + r"(-step\d{8}|-\d{6})?", path.parent.name.removesuffix(saving.STATE_SUFFIX))
    ]
    return max(found, key=lambda path: (path / saving.MANIFEST).stat().st_mtime_ns, default=None)
