"""Which device is used, and giving its memory back."""

from __future__ import annotations

import gc
import os

import torch

from library.errors import ConfigError


def choose_device(wanted: str | None) -> torch.device:
    """The wanted device, else this process's GPU, else Apple's, else the CPU."""
    if wanted is not None:
        try:
            device = torch.device(wanted)
        except RuntimeError as error:
            raise ConfigError(f"device = {wanted!r}: {error}") from error
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f'device = {wanted!r}, but this torch sees no GPU; remove the key or use "cpu"')
        return device
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("mps") if torch.backends.mps.is_available() else torch.device("cpu")


def release(device: torch.device) -> None:
    """Give a freed model's memory back, so that the next one finds it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
