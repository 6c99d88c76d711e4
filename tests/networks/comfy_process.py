"""A pipe to ComfyUI's own code (see comfy_worker.py), and the base checkpoint it is asked about."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from library.models.flux import FluxTransformer
from library.tensorfile import save_tensors

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("comfy_worker.py")
SHAPE = {"heads": 1, "head_dim": 128, "double": 2, "single": 2, "axes": (16, 56, 56), "text": 4096, "pooled": 768}
"""The smallest FLUX that ComfyUI recognises: width 128, one head; its text widths are fixed."""


class Comfy:
    """ComfyUI in a process of its own."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        self._answer()

    def ask(self, action: str, **request) -> dict:
        """One request; fails the test if ComfyUI's code raised."""
        self.process.stdin.write(json.dumps({"action": action, **request}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        assert line, "ComfyUI's process died; its error is above"
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait(timeout=60)


def require_comfy() -> None:
    """Skip without ComfyUI's code, or fail where it is required."""
    if not (ROOT / "vendor" / "ComfyUI").is_dir():
        if os.environ.get("INFLUX_REQUIRE_COMFY") == "1":
            pytest.fail("ComfyUI's code is not there: run `make comfy`")
        pytest.skip("ComfyUI's code is not there: run `make comfy`")


def write_bfl_checkpoint(model: FluxTransformer, path: Path) -> Path:
    """Our transformer's weights as the single file that ComfyUI's UNETLoader reads."""
    tensors = {name: tensor for name, tensor in model.state_dict().items() if ".adapter." not in name}
    save_tensors(path, {name: tensor.to(torch.float32) for name, tensor in tensors.items()})
    return path
