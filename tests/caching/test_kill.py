"""kill -9 at any instant: the next run completes the cache, byte for byte what an undisturbed run makes."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from library.data.cached import open_cache
from library.data.store import Store
from library.files import TEMPORARY_MARK
from tests.caching.conftest import EDIT, write_pairs
from tests.caching.test_caching import contents

ROOT = Path(__file__).parents[2]


OWNER = ".lock-owner"  # every run writes it when its work on the cache begins


def written(cache: Path, name: str) -> tuple[int, int] | None:
    """Which writing of a file this is."""
    try:
        stat = (cache / name).stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_mtime_ns


def promises(cache: Path) -> list:
    """The manifests there are: what a run writes last."""
    return [written(cache, f"manifests/{path.name}") for path in (cache / "manifests").glob("*.json")]


class Server:
    """A process that forks a child for every run of the command."""

    def __init__(self):
        command = [sys.executable, "-m", "tests.caching.worker"]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.process.stdout.readline() == "ready\n"

    def run(self, *arguments: str, kill_after: float = -1) -> tuple[int, float]:
        self.process.stdin.write("\t".join([str(kill_after), *arguments]) + "\n")
        self.process.stdin.flush()
        code, seconds = self.process.stdout.readline().split()
        return int(code), float(seconds)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=20)


@pytest.fixture(scope="module")
def server():
    made = Server()
    yield made
    made.close()


@pytest.mark.parametrize("trials", [2, pytest.param(30, marks=pytest.mark.slow)])
def test_a_killed_run_loses_no_more_than_a_shard(trials, server, configured, tmp_path, monkeypatch) -> None:
    write_pairs(tmp_path / "data", 24)
    run = configured(EDIT + "flip_aug = true")
    config = ("--config_file", str(tmp_path / "run.toml"))
    code, seconds = server.run(*config)
    assert code == 0
    (tmp_path / "cache").rename(tmp_path / "undisturbed")
    expected = contents(tmp_path / "undisturbed")
    draw, killed, mid_work = random.Random(trials), 0, 0
    for trial in range(trials):
        cache = tmp_path / f"cache{trial}"
        here = (*config, "--dataset_cache_dir", str(cache))
        for _ in range(draw.randint(1, 3)):
            before = len(Store(cache).where) if cache.is_dir() else 0
            begun, promised = written(cache, OWNER), promises(cache)
            code, _ = server.run(*here, kill_after=draw.uniform(0, seconds))
            killed += code == -9
            after = Store(cache) if cache.is_dir() else None
            mid_work += code == -9 and written(cache, OWNER) != begun and promises(cache) == promised
            assert after is None or (len(after.where) >= before and not after.broken)
        assert server.run(*here)[0] == 0
        assert contents(cache) == expected
        assert not [path for path in cache.rglob("*") if TEMPORARY_MARK in path.name]
        assert server.run(*here, "--verify")[0] == 0
    assert killed >= trials / 2 and mid_work >= killed / 2, (killed, mid_work)
    assert open_cache(run.model_copy(update={"cache": run.cache.model_copy(update={"dataset_cache_dir": cache})}))


def start(config: Path) -> subprocess.Popen:
    command = [sys.executable, "influx_cache.py", "--config_file", str(config)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_second_run_waits_for_the_first_and_says_for_whom(configured, tmp_path) -> None:
    write_pairs(tmp_path / "data", 4)
    run = configured(EDIT)
    with Store(tmp_path / "cache").locked(print):
        process = start(tmp_path / "run.toml")
        said = next(line for line in process.stdout if "waiting" in line)
        assert f"process {os.getpid()} on" in said and process.poll() is None
    rest = process.communicate(timeout=300)[0]
    assert process.returncode == 0, rest
    assert len(open_cache(run).items) == 4


@pytest.mark.slow
def test_two_data_sets_at_once_share_a_folder(configured, tmp_path) -> None:
    write_pairs(tmp_path / "data", 8)
    mask = 'image_dir = "data/train_A"\nmask_dir = "data/masks"\ninstance_prompt = "red"\nmode = "mask"'
    runs = []
    for name, subset in (("edit", EDIT), ("mask", mask)):
        runs.append(configured(subset))
        (tmp_path / "run.toml").rename(tmp_path / f"{name}.toml")
    processes = [start(tmp_path / f"{name}.toml") for name in ("edit", "mask")]
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert [len(open_cache(run).items) for run in runs] == [8, 8]
