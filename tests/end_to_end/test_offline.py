"""The whole way without a network: real processes, a cold hub cache, and a guard that fails any connection."""

import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

from tests.end_to_end.scripts import ROOT

GUARD = """
import socket

def refuse(*args, **kwargs):
    with open({log!r}, "a") as log:
        log.write(repr(args[:2]) + "\\n")
    raise OSError("the network is off in this test")

def refuse_internet(connect):
    def checked(self, address):
        return connect(self, address) if self.family == socket.AF_UNIX else refuse(address)
    return checked

socket.getaddrinfo = socket.create_connection = refuse
socket.socket.connect = refuse_internet(socket.socket.connect)
socket.socket.connect_ex = refuse_internet(socket.socket.connect_ex)
"""


def test_cache_train_infer_without_a_network(project: Path, tmp_path: Path) -> None:
    log = tmp_path / "connections"
    (tmp_path / "sitecustomize.py").write_text(GUARD.format(log=str(log)), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"PYTHONPATH": str(tmp_path), "HF_HOME": str(tmp_path / "cold"), "OMP_NUM_THREADS": "1"}

    def run(script: str, *words: str) -> None:
        command = [sys.executable, str(ROOT / script), "--config_file", "config_examples/quickstart.toml", *words]
        done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr

    places = ["--output_dir", "output/offline"]
    run("influx_cache.py", *places)
    run("influx_train.py", *places, "--max_train_steps", "2", "--train_batch_size", "4", "--lr_warmup_steps", "0")
    run("influx_infer.py", *places, "--sample_steps", "2")
    pictures = sorted((project / "output" / "offline" / "edited").glob("*.png"))
    assert len(pictures) == 4 and Image.open(pictures[0]).size == (64, 64)
    assert not log.exists(), f"connections were tried: {log.read_text('utf-8')}"


def test_the_guard_works(tmp_path: Path) -> None:
    """Else the test above would pass whatever is tried."""
    log = tmp_path / "connections"
    (tmp_path / "sitecustomize.py").write_text(GUARD.format(log=str(log)), encoding="utf-8")
    code = "import urllib.request; urllib.request.urlopen('http://192.0.2.1/', timeout=2)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True).returncode != 0
    assert "192.0.2.1" in log.read_text("utf-8")
