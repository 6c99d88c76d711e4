"""Headers are read without torch and refused when anything about them is off."""

import hashlib
import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from library.tensorfile import TensorFileError, data_hash, read_header, save_tensors

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.ones(4, dtype=torch.bfloat16),
    "alpha": torch.tensor(4.0),
    "bits": torch.tensor([1, 255], dtype=torch.uint8),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_tensors(tmp_path / "x.safetensors", TENSORS, {"note": "ü"})
    return tmp_path / "x.safetensors"


def test_header_agrees_with_safetensors(file: Path) -> None:
    header, data = read_header(file), file.read_bytes()
    with safe_open(file, "pt") as opened:
        assert set(header.tensors) == set(opened.keys()) and header.metadata == opened.metadata()
        for name, info in header.tensors.items():
            tensor = opened.get_tensor(name)
            assert tuple(tensor.shape) == info.shape and info.num_elements == tensor.numel()
            assert bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist()) == data[info.begin : info.end]


def test_saving_leaves_one_readable_file(file: Path) -> None:
    assert [entry.name for entry in file.parent.iterdir()] == ["x.safetensors"]
    assert file.stat().st_mode & 0o044 == 0o044


def test_data_hash_ignores_metadata(file: Path, tmp_path: Path) -> None:
    save_tensors(tmp_path / "y.safetensors", TENSORS, {"note": "other"})
    assert data_hash(file) == data_hash(tmp_path / "y.safetensors")
    raw = file.read_bytes()
    assert data_hash(file) == hashlib.sha256(raw[read_header(file).data_start :]).hexdigest()


@given(cut=st.integers(min_value=0, max_value=400))
@settings(max_examples=60, deadline=None)
def test_any_truncation_is_refused(cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("cut")
    save_tensors(folder / "x.safetensors", TENSORS)
    raw = (folder / "x.safetensors").read_bytes()
    (folder / "x.safetensors").write_bytes(raw[: min(cut, len(raw) - 1)])
    with pytest.raises(TensorFileError):
        read_header(folder / "x.safetensors")


def write(path: Path, header: object, data: bytes = b"") -> Path:
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


@pytest.mark.parametrize(
    "header, data",
    [
        ([], b""),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"0123"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, b""),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"01234567"),
        ({n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "ab"}, b"0123"),
        ({"a": {"dtype": "F32", "shape": [1]}}, b"0123"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"01234567"),
        ({"__metadata__": {"a": 1}}, b""),
    ],
)
def test_malformed_headers_are_refused(tmp_path: Path, header: object, data: bytes) -> None:
    with pytest.raises(TensorFileError, match="x.safetensors"):
        read_header(write(tmp_path / "x.safetensors", header, data))


def test_a_huge_header_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", 10**12) + b"{}")
    with pytest.raises(TensorFileError):
        read_header(tmp_path / "x.safetensors")


def test_reading_headers_needs_no_torch(file: Path) -> None:
    code = (
        "import sys; from library.tensorfile import read_header; read_header(sys.argv[1]); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(file)], check=True, cwd=Path(__file__).resolve().parents[2])


def test_a_full_disk_is_said_by_its_name(tmp_path: Path, monkeypatch) -> None:
    """safetensors has an error of its own, with the system's number in the text."""
    from safetensors import SafetensorError
    from safetensors import torch as backend

    from library.errors import DiskError

    def fail(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(backend, "save_file", fail)
    with pytest.raises(DiskError, match="No space left on device; free some space"):
        save_tensors(tmp_path / "full.safetensors", TENSORS)
    assert not list(tmp_path.iterdir())
