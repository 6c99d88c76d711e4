"""The cache against what trainers use today: kohya's npz files, and one safetensors file per sample.

One run, one machine, the same samples: a 512 px Fill sample (two bf16 latents or three, one bit per pixel of mask) and
T5 embeddings of 512 tokens shared by 50 images each. Says size, files, and CPU time to write and to read warm; then the
time to open a cache of 100,000 entries, the memory that reading takes, and how long a step would wait for its data.

    python benchmarks/cache.py [--entries 5000] [--others 500] [--folder DIR] [--output benchmarks/results/cache.json]

CPU times are process_time of one thread; the arms take turns, and the least of the repeats is shown. In a batch of one
a trainer keeps recent captions in memory, which the other formats cannot: so reading is also shown with every caption
read anew. `--others` is how many samples of the other formats are written: 5,000 of kohya's take 50 GB.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from library.data.batches import Choice, Gatherer, prefetched
from library.data.manifest import Manifest, ManifestItem, Text, read_manifest, write_manifest
from library.data.reader import Reader
from library.data.store import IMAGES_PER_SHARD, TEXTS_PER_SHARD, Entry, Store

SIDE = 512
CELLS = SIDE // 8
TOKENS, WIDTH, POOLED = 512, 4096, 768
PER_CAPTION = 50
REPEATS = 7
READS = 300  # samples of one repeat
STEP_SECONDS = 0.25  # a training step of a hidden-256 model on one CPU core


def latent(seed: int) -> torch.Tensor:
    return torch.randn(16, CELLS, CELLS, generator=torch.Generator().manual_seed(seed)).bfloat16()


def mask_bits(seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE // 8), np.uint8))


def text(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "t5": torch.randn(TOKENS, WIDTH, generator=generator).bfloat16(),
        "pooled": torch.randn(POOLED, generator=generator).bfloat16(),
        "t5_ids": torch.zeros(TOKENS, dtype=torch.int32),
        "clip_ids": torch.zeros(77, dtype=torch.int32),
    }


class Sharded:
    """InFlux's cache."""

    def __init__(self, folder: Path, entries: int, latents_as: str):
        self.name = f"InFlux, {latents_as}"
        self.folder, self.entries, self.latents_as = folder, entries, latents_as

    def write(self) -> None:
        store = Store(self.folder)
        captions = range(-(-self.entries // PER_CAPTION))
        for start in range(0, len(captions), TEXTS_PER_SHARD):
            numbers = captions[start : start + TEXTS_PER_SHARD]
            store.add("text", None, [Entry(f"{number:032x}", text(number), {"caption": ""}) for number in numbers])
        for start in range(0, self.entries, IMAGES_PER_SHARD):
            numbers = range(start, min(start + IMAGES_PER_SHARD, self.entries))
            store.add("image", (SIDE, SIDE), [self._entry(number) for number in numbers])
        store.save_index()

    def _entry(self, number: int) -> Entry:
        tensors = {"condition.0": latent(number), "mask.0": mask_bits(number)}
        tensors["changed"] = torch.zeros(CELLS, CELLS, dtype=torch.uint8)
        tensors["target.mean"] = latent(number + 1)
        if self.latents_as == "distribution":
            tensors["target.std"] = latent(number + 2)
        return Entry(f"{number + (1 << 64):032x}", tensors, {"name": f"item/{number}", "made_of": "x" * 700})

    def open(self) -> None:
        self.gatherer = Gatherer(Reader(Store(self.folder)))

    def read(self, number: int) -> torch.Tensor:
        words = Text(f"{number // PER_CAPTION:032x}", "")
        choice = Choice("", f"{number + (1 << 64):032x}", 0, words, 1.0)
        return self.gatherer.gather([choice], 0).mean

    def read_anew(self, number: int) -> torch.Tensor:
        """The same without any caption in memory."""
        self.gatherer = Gatherer(self.gatherer.reader)
        return self.read(number)


class Npz:
    """Two npz files per image in float32, as sd-scripts writes them: nothing is shared between images."""

    name = "kohya's npz, fp32"

    def __init__(self, folder: Path, entries: int):
        self.folder, self.entries = folder, entries

    def write(self) -> None:
        self.folder.mkdir(parents=True)
        for number in range(self.entries):
            mask = np.unpackbits(mask_bits(number).numpy(), axis=-1).astype(np.float32)
            latents = {"latents": latent(number + 1).float().numpy(), "condition": latent(number).float().numpy()}
            np.savez(self.folder / f"{number}_flux.npz", **latents, alpha_mask=mask)
            words = text(number // PER_CAPTION)
            np.savez(
                self.folder / f"{number}_flux_te.npz",
                t5_out=words["t5"].float().numpy(),
                l_pooled=words["pooled"].float().numpy(),
                txt_ids=np.zeros((TOKENS, 3), np.float32),
                t5_attn_mask=words["t5_ids"].numpy().astype(np.int64),
            )

    def open(self) -> None:
        pass

    def read(self, number: int) -> torch.Tensor:
        found = {}
        for ending in ("flux", "flux_te"):
            with np.load(self.folder / f"{number}_{ending}.npz") as file:
                found |= {name: torch.from_numpy(file[name]) for name in file.files}
        return found["latents"]


class PerSample:
    """One safetensors file per sample in bf16."""

    name = "safetensors per sample"

    def __init__(self, folder: Path, entries: int):
        self.folder, self.entries = folder, entries

    def write(self) -> None:
        self.folder.mkdir(parents=True)
        for number in range(self.entries):
            tensors = {"latents": latent(number + 1), "condition": latent(number), "mask": mask_bits(number)}
            save_file({**tensors, **text(number // PER_CAPTION)}, self.folder / f"{number}.safetensors")

    def open(self) -> None:
        pass

    def read(self, number: int) -> torch.Tensor:
        return {name: part.clone() for name, part in load_file(self.folder / f"{number}.safetensors").items()}[
            "latents"
        ]


def cpu(work) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


@dataclass(frozen=True)
class Figures:
    """What a format costs. MB and milliseconds are for one sample; read_anew: with every caption read from the disk."""

    samples: int
    files: int
    megabytes: float
    write_ms: float
    read_ms: float
    read_ms_median: float
    read_anew_ms: float
    read_anew_ms_median: float


def compare(folder: Path, entries: int, others: int) -> dict[str, Figures]:
    """Write and read every format; their turns alternate."""
    arms = [
        Sharded(folder / "distribution", entries, "distribution"),
        Sharded(folder / "mean", entries, "mean"),
        PerSample(folder / "files", others),
        Npz(folder / "npz", others),
    ]
    writing = {arm.name: cpu(arm.write) / arm.entries * 1e3 for arm in arms}
    ways = [(arm, way) for arm in arms for way in ("read", "read_anew") if hasattr(arm, way)]
    reading: dict[tuple[str, str], list[float]] = {(arm.name, way): [] for arm, way in ways}
    draw = random.Random(0)
    for repeat in range(REPEATS + 1):  # the first one warms the page cache
        for arm, way in ways:
            arm.open() if repeat == 0 else None
            read = getattr(arm, way)
            numbers = [draw.randrange(arm.entries) for _ in range(READS)]
            spent = cpu(lambda read=read, numbers=numbers: [read(number) for number in numbers])
            if repeat:
                reading[arm.name, way].append(spent / READS * 1e3)
    return {arm.name: _figures(arm, writing[arm.name], reading) for arm in arms}


def _figures(arm, writing: float, reading: dict[tuple[str, str], list[float]]) -> Figures:
    files = [path for path in arm.folder.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files) / arm.entries / 1e6
    times = []
    for way in ("read", "read_anew"):
        measured = sorted(reading.get((arm.name, way), reading[arm.name, "read"]))
        times += [round(measured[0], 3), round(measured[len(measured) // 2], 3)]
    return Figures(arm.entries, len(files), round(size, 4), round(writing, 3), *times)


def table(found: dict[str, Figures]) -> str:
    """The comparison for people."""
    lines = [
        f"{'format':<24}{'samples':>8}{'files':>7}{'MB each':>9}{'write ms':>10}{'read ms':>9}{'median':>8}"
        f"{'anew ms':>9}{'median':>8}"
    ]
    lines += [
        f"{name:<24}{one.samples:>8}{one.files:>7}{one.megabytes:>9.3f}{one.write_ms:>10.2f}"
        f"{one.read_ms:>9.2f}{one.read_ms_median:>8.2f}{one.read_anew_ms:>9.2f}{one.read_anew_ms_median:>8.2f}"
        for name, one in found.items()
    ]
    return "\n".join(lines)


def opening(folder: Path, entries: int = 100_000) -> dict[str, float]:
    """CPU seconds to open a cache of many entries: index and manifest. Its shards are empty files."""
    shards = {}
    (folder / "image" / "512x512").mkdir(parents=True)
    for start in range(0, entries, IMAGES_PER_SHARD):
        name = f"image/512x512/{start:016x}.safetensors"
        (folder / name).write_bytes(b"")
        shards[name] = [0, *(f"{number:032x}" for number in range(start, min(start + IMAGES_PER_SHARD, entries)))]
    content = {"format": "influx-cache", "version": 1, "shards": shards}
    (folder / "index.json").write_text(json.dumps(content, separators=(",", ":")))
    numbers = range(entries)
    manifest = Manifest(
        config={"datasets": []},
        vae="",
        text_encoders="",
        subsets=("subset",),
        texts=tuple(Text(f"{number:032x}", f"caption {number}") for number in range(entries // PER_CAPTION)),
        items=tuple(
            ManifestItem(f"subset/{number}", 0, (number // PER_CAPTION,), ((f"{number:032x}",),)) for number in numbers
        ),
        files={f"/data/{role}/{number}.png": [1, 2, 3, 4, "0" * 64] for number in numbers for role in ("a", "b")},
    )
    path = write_manifest(folder, manifest)
    times = []
    for _ in range(REPEATS):
        started = time.process_time()
        store, read = Store(folder), read_manifest(path)
        times.append(time.process_time() - started)
        assert len(store.where) == len(read.items) == entries
    return {"entries": entries, "seconds": round(min(times), 3), "median": round(sorted(times)[len(times) // 2], 3)}


def memory_and_waiting(folder: Path, entries: int, steps: int = 40) -> dict[str, object]:
    """MB of anonymous memory after each of four passes, and the wait for a batch in steps of a tenth of a real one's
    length: its share is that of a whole step."""
    arm = Sharded(folder / "distribution", entries, "distribution")
    arm.open()
    draw = random.Random(1)

    def batch(position: int):
        number = draw.randrange(entries)
        choice = Choice("", f"{number + (1 << 64):032x}", 0, Text(f"{number // PER_CAPTION:032x}", ""), 1.0)
        return arm.gatherer.gather([choice], position)

    sizes, waited = [], 0.0
    batches = prefetched(batch, range(steps + 1))
    next(batches)
    for _ in range(steps):
        time.sleep(STEP_SECONDS / 10)
        started = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - started
    batches.close()
    for _ in range(4):
        for position in range(entries):
            batch(position)
        sizes.append(round(anonymous_memory()))
    wait = waited / steps
    return {"anonymous_mb": sizes, "wait_ms": round(wait * 1e3, 3), "wait_share": round(wait / STEP_SECONDS, 5)}


def anonymous_memory() -> float:
    """MB of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1e3
    return float("nan")


def measure(folder: Path, entries: int, others: int, many: int = 100_000) -> dict[str, object]:
    """Everything, as it is recorded. The folder is made and removed."""
    try:
        found = compare(folder, entries, others)
        print(table(found))
        opened = opening(folder / "many", many)
        print("opening {entries} entries: {seconds:.2f} s, median {median:.2f} s".format(**opened))
        read = memory_and_waiting(folder, entries)
        print(
            "RssAnon after each pass: {anonymous_mb} MB; wait {wait_ms} ms, {wait_share:.2%} of a step".format(**read)
        )
        return {"formats": {name: asdict(one) for name, one in found.items()}, "opening": opened, "reading": read}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=5000)
    parser.add_argument("--others", type=int, default=500, help="samples written in the other formats")
    parser.add_argument("--folder", type=Path, default=Path("output/benchmark_cache"))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--note", default="", help="recorded with the figures: the machine, and what else ran on it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.folder.exists():
        raise SystemExit(f"{options.folder} exists already: name another --folder")
    found = {"note": options.note, **measure(options.folder, options.entries, options.others)}
    if options.output:
        options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
