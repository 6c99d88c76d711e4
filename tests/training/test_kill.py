"""kill -9 at any instant of a run, then the same command again: the final file is that of the undisturbed run."""

import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from library.tensorfile import data_hash
from tests.training import forked
from tests.training.project import Project

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = {
    "max_train_steps": 16,
    "save_every_n_steps": 2,
    "checkpoints_total_limit": 2,
    "use_ema": True,
    "optimizer_type": "AdamW8bit",
    "gradient_accumulation_steps": 2,
    "network_dropout": 0.1,
    "network_dim": 32,
}


def hashes(folder: Path) -> tuple[str, str]:
    """The trained network and its average."""
    return data_hash(folder / "net.safetensors"), data_hash(folder / "net-ema.safetensors")


def undisturbed(project: Project, folder: Path) -> tuple[tuple[str, str], float]:
    """Its hashes, and how long it takes."""
    started = time.monotonic()
    assert forked.finish(project, folder, **OPTIONS) == 0
    return hashes(folder), time.monotonic() - started


def trials(project: Project, folder: Path, count: int, most_kills: int) -> None:
    """`count` runs, each killed up to `most_kills` times at instants spread over the measured run time."""
    expected, duration = undisturbed(project, folder / "whole")
    chance = random.Random(17)
    killed_at_work = killed = 0
    for trial in range(count):
        output = folder / f"trial{trial}"
        for _ in range(chance.randint(1, most_kills)):
            child = forked.start(partial(project.train, output_dir=output, **OPTIONS))
            time.sleep(chance.random() * duration)
            os.kill(child, signal.SIGKILL)
            if forked.wait(child) == -signal.SIGKILL:
                killed += 1
                killed_at_work += (output / "run.json").exists()
        assert forked.finish(project, output, **OPTIONS) == 0, f"trial {trial} could not be continued"
        assert hashes(output) == expected, f"trial {trial} ended elsewhere"
        left = [path.name for path in output.iterdir() if "influx-tmp" in path.name or path.name.endswith(".old")]
        assert left == [], f"trial {trial} left {left}"
    assert killed_at_work >= killed / 2, f"only {killed_at_work} of {killed} kills hit a run at work"


def test_a_few_kills(project, tmp_path):
    """Three runs."""
    trials(project, tmp_path, count=3, most_kills=2)


@pytest.mark.slow
def test_many_kills(project, tmp_path):
    """Thirty runs, killed up to three times each."""
    trials(project, tmp_path, count=30, most_kills=3)


def test_kill_the_real_command(project, tmp_path):
    """The script itself, as a process of its own, killed while it trains."""
    options = {**OPTIONS, "max_train_steps": 40, "optimizer_type": "AdamW"}
    words = [sys.executable, str(ROOT / "influx_train.py"), *project.words("out", **options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while forked.steps_done(tmp_path / "out") < 5 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 5 <= forked.steps_done(tmp_path / "out") < 40
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "continuing" in done.stderr
    assert forked.finish(project, tmp_path / "whole", **options) == 0
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
