"""Numbers of a run: metrics.jsonl, one line per logged step, which every other display of the run is made from."""

import json
import logging
import math
from collections import deque
from pathlib import Path

from library.files import atomic_write

log = logging.getLogger(__name__)
FILE = "metrics.jsonl"
AVERAGE_OVER = 100  # steps in the running average of the loss


class Metrics:
    """Appends to metrics.jsonl and keeps the running average. Only the main process has one."""

    def __init__(self, folder: Path, from_step: int):
        """Continues the file after `from_step`: lines of later steps belong to work that is done again."""
        self.path = folder / FILE
        kept = [line for line in read(self.path) if line["step"] <= from_step]  # without a line that a kill cut
        self.losses: deque[float] = deque((line["loss"] for line in kept if "loss" in line), maxlen=AVERAGE_OVER)
        atomic_write(self.path, "".join(_line(values) for values in kept))
        self._file = open(self.path, "a", encoding="utf-8")

    def loss(self, value: float) -> float:
        """Take in a step's loss; returns the average over the last hundred."""
        self.losses.append(value)
        return sum(self.losses) / len(self.losses)

    def write(self, step: int, values: dict[str, object]) -> None:
        """Append one line. It is flushed, so that a kill loses nothing that was shown."""
        try:
            self._file.write(_line({"step": step, **values}))
            self._file.flush()
        except OSError as error:
            # numbers are worth less than the run: states and networks have room of their own or say so
            log.warning("metrics.jsonl cannot be written: %s", error)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _line(values: dict[str, object]) -> str:
    """One line of JSON, which knows no NaN and no infinity: what has no number is left out."""
    told = {name: value for name, value in values.items() if not isinstance(value, float) or math.isfinite(value)}
    return json.dumps(told, ensure_ascii=False, allow_nan=False) + "\n"


def read(path: Path) -> list[dict]:
    """Every whole line of a metrics file; a line cut by a kill is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(value, dict) and "step" in value:
            lines.append(value)
    return lines
