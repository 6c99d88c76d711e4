"""Readers map files: what they cost does not depend on a file's size."""

import json
import os
import struct
import warnings

import torch

from library.models.readers import SafetensorsReader


def sparse_file(path, size: int) -> None:
    """A safetensors file of one small tensor and one of `size` bytes that takes no room on the disk."""
    entries = {
        "small": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        "huge": {"dtype": "U8", "shape": [size], "data_offsets": [16, 16 + size]},
    }
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header + struct.pack("<4f", 1, 2, 3, 4))
        file.truncate(8 + len(header) + 16 + size)


def test_a_file_larger_than_memory_is_read(tmp_path) -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    sparse_file(tmp_path / "huge.safetensors", 2 * memory)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = SafetensorsReader([tmp_path / "huge.safetensors"], "huge").read("small")
    assert torch.equal(read, torch.tensor([1.0, 2.0, 3.0, 4.0]))
