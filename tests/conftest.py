"""Settings for every test: offline, one thread per process, and the small bases they run on."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = ["tests.browser"]

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def pytest_configure() -> None:
    """One torch thread a process: the suite runs several processes on few cores."""
    import torch

    torch.set_num_threads(1)
