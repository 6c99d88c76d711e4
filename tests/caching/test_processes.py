"""Several processes share the encoding: together they make what one makes, and each does a part."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from library import caching
from library.data.cached import open_cache
from library.data.store import entry_facts
from tests.caching.conftest import EDIT, write_pairs
from tests.caching.test_caching import contents

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_two_processes_make_what_one_makes(configured, tmp_path) -> None:
    write_pairs(tmp_path / "data", 10)
    (tmp_path / "p.txt").write_text("red circle --ci data/train_A/0.png\n")
    run = configured(EDIT, rest='[sampling]\nsample_prompts = "p.txt"')
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = ["influx_cache.py", "--config_file", str(tmp_path / "run.toml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    together = subprocess.run(
        [*launch, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert together.returncode == 0, together.stderr
    made = contents(tmp_path / "cache")
    assert len(open_cache(run).items) == 10
    shards = list((tmp_path / "cache" / "image").rglob("*.safetensors"))
    parts = sorted(len(entry_facts(path)) for path in shards)
    assert parts == [1, 5, 5], parts  # two halves of the items, and the preview
    (tmp_path / "cache").rename(tmp_path / "together")
    assert caching.run(run) == 0
    assert contents(tmp_path / "cache") == made
