"""What is said while a base is verified, and the summary of it: text to paste into an issue, and verify.json."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from library.files import atomic_write
from library.memory.device import release
from library.models import cost
from library.models.base import Base
from library.models.cost import GB, Memory
from tools.verify import room

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "bitsandbytes", "gguf", "numpy")
FILE = "verify.json"


@dataclass(frozen=True)
class Check:
    """One question about the base. passed: None if it could not be asked here."""

    name: str
    passed: bool | None
    words: str
    figures: dict = field(default_factory=dict)

    def line(self) -> str:
        return f"{VERDICTS[self.passed]}  {self.name}: {self.words}"


VERDICTS = {True: "passed ", False: "FAILED ", None: "skipped"}


@dataclass
class Part:
    """A stretch of the run. GB are 1e9 bytes of torch's allocator; None where nothing is measured or forecast."""

    name: str
    seconds: float = 0.0
    peak_vram_gb: float | None = None
    forecast_vram_gb: float | None = None

    def words(self) -> str:
        said = f"{self.seconds:.1f} s"
        if self.peak_vram_gb is not None:
            said += f", peak VRAM {self.peak_vram_gb:.2f} GB"
        if self.peak_vram_gb is not None and self.forecast_vram_gb is not None:
            said += f" (forecast {self.forecast_vram_gb:.2f} GB)"
        return said


class Report:
    """Collects and prints. `about`: label and value of what describes machine and base."""

    def __init__(self, device: torch.device):
        self.device = device
        self.about: dict[str, str] = {"machine": machine(device), "versions": versions()}
        self.checks: list[Check] = []
        self.parts: list[Part] = []
        self.stopped: str | None = None

    @contextmanager
    def part(self, name: str, expected: Memory | None = None) -> Iterator[None]:
        """Time a part and measure its peak, beside the forecast (without the CUDA context, which torch cannot see)."""
        print(f"- {name} ...", flush=True)
        measured = self.device.type == "cuda"
        if measured:
            release(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        part = Part(name)
        if expected is not None:
            part.forecast_vram_gb = (expected.total - expected.parts.get("CUDA context", 0.0)) / GB
        self.parts.append(part)
        begun = time.perf_counter()
        try:
            yield
        finally:
            if measured:
                torch.cuda.synchronize(self.device)
                part.peak_vram_gb = torch.cuda.max_memory_reserved(self.device) / GB
            part.seconds = time.perf_counter() - begun
            print(f"  {part.words()}", flush=True)

    def check(self, name: str, passed: bool | None, words: str, **figures: object) -> None:
        """Note and print the answer to one question."""
        self.checks.append(Check(name, passed, words, figures))
        print(f"  {self.checks[-1].line()}", flush=True)

    @property
    def passed(self) -> bool:
        """Whether nothing failed and the run came to its end."""
        return self.stopped is None and all(check.passed is not False for check in self.checks)

    def verdict(self) -> str:
        """One line for all."""
        if self.stopped is not None:
            return f"stopped: {self.stopped}"
        skipped = sum(check.passed is None for check in self.checks)
        if not self.passed:
            return "SOMETHING IS WRONG: see the checks that failed"
        return f"everything passed, {skipped} skipped" if skipped else "everything passed"

    def summary(self) -> str:
        """Everything in a few lines of text."""
        lines = [f"verify_base: {self.verdict()}"]
        lines += [f"{label:<9} {value}" for label, value in self.about.items()]
        lines += [f"{check.line()}" for check in self.checks]
        lines += [f"{part.name:<32} {part.words()}" for part in self.parts]
        return "\n".join(lines)

    def write(self, folder: Path) -> None:
        """Print the summary and write verify.json."""
        content = {
            "verdict": self.verdict(), "passed": self.passed, "stopped": self.stopped, "about": self.about,
            "checks": [asdict(check) for check in self.checks], "parts": [asdict(part) for part in self.parts],
        }  # fmt: skip
        atomic_write(folder / FILE, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        print(f"\n--- to paste into an issue ({folder / FILE} holds the same) ---\n```\n{self.summary()}\n```")


def machine(device: torch.device) -> str:
    """System, RAM and card."""
    said = f"{platform.system()} {platform.machine()}, {room.free_ram() / GB:.1f} GB of RAM free"
    if device.type != "cuda":
        return f"{said}, no GPU used ({device})"
    card = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    return f"{said}, {card.name} ({card.major}.{card.minor}), {free / GB:.1f} of {total / GB:.1f} GB of VRAM free"


def versions() -> str:
    """Python and the packages that matter."""
    found = [f"python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found) + (f", CUDA {torch.version.cuda}" if torch.version.cuda else "")


def base_in_words(base: Base) -> str:
    """Name, kind of file, stored types and size."""
    file = base.transformer_file
    reader = file.reader
    kind = "GGUF" if reader.files[0].suffix.lower() == ".gguf" else "diffusers" if file.is_diffusers else "BFL"
    counts: dict[str, int] = {}
    for dtype in reader.dtypes.values():
        counts[dtype] = counts.get(dtype, 0) + 1
    stored = ", ".join(sorted(counts, key=lambda dtype: -counts[dtype]))
    parameters = cost.num_parameters(file.shape) / 1e9
    name = ", ".join(str(one) for one in (base.name, base.table.transformer) if one)
    return (
        f"{name}: {kind}, {len(reader.files)} file(s) of {stored}, {reader.num_bytes() / GB:.2f} GB,"
        f" {parameters:.3g} billion parameters"
    )
