"""Network files on disk: written whole, hashed over the bytes that were written, read back and compared.

`NAME.safetensors` carries kohya's keys. Where a module outside the blocks is trained (x_embedder), no single file works
everywhere, and `NAME_diffusers.safetensors` with PEFT's keys is written beside it.
"""

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from library.errors import NetworkFileError
from library.files import atomic_write
from library.networks.change import Change
from library.networks.factors import kind_of
from library.networks.forms import kohya_tensors, lycoris_tensors, peft_tensors
from library.networks.metadata import Description, describe
from library.networks.names import parse
from library.networks.outline import Format, files_of
from library.tensorfile import data_hash

DIFFUSERS_SUFFIX = "_diffusers"
DTYPES = {"float": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
_NEVER = ("lora_adapter_metadata", "format")
_LEGACY_START, _LEGACY_LENGTH = 0x100000, 0x10000


def save_network(
    path: Path | str,
    change: Change,
    description: Description,
    *,
    format: Format = "kohya",
    dtype: torch.dtype = torch.bfloat16,
    minimal_metadata: bool = False,
) -> list[Path]:
    """Write ``change`` to ``path`` (and a second file where one cannot serve every program); returns what was written.

    Raises NetworkFileError if the chosen format cannot carry the network, naming the one that can.
    """
    path = Path(path)
    metadata = describe(description, minimal=minimal_metadata)
    written = []
    for file, tensors in layouts(path, change, format, dtype):
        write_network(file, tensors, metadata)
        written.append(file)
    return written


def layouts(path: Path, change: Change, format: Format, dtype: torch.dtype) -> list[tuple[Path, dict[str, Tensor]]]:
    """The files that ``change`` becomes: (path, tensors) each."""
    kinds = {slot: factors.kind for slot, factors in change.entries.items()}
    text = [factors.kind for factors in change.text.values()]
    second = path.with_name(f"{path.stem}{DIFFUSERS_SUFFIX}{path.suffix}")
    spellings = files_of(kinds, change.sizes, text, format)
    return [(file, _SPELLED[spelling](change, dtype)) for file, spelling in zip((path, second), spellings)]


_SPELLED: dict[str, Callable[[Change, torch.dtype], dict[str, Tensor]]] = {
    "kohya": kohya_tensors,
    "diffusers": peft_tensors,
    "lycoris": lycoris_tensors,
}


def write_network(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """Write tensors and metadata with the hashes of the written bytes; returns the data region's SHA-256.

    Equal tensors and metadata give equal bytes. Raises NetworkFileError if the file does not read back as written.
    """
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise NetworkFileError(f"{path} is not written: {len(bad)} tensors hold NaN or infinity, first {bad[0]}")
    header, data = _laid_out(tensors)
    digest = hashlib.sha256()
    for name in data:
        digest.update(_raw_bytes(tensors[name]))
    model_hash = digest.hexdigest()
    ss_only = {name: text for name, text in metadata.items() if name.startswith("ss_")}
    hashes = {
        "sshs_model_hash": model_hash,
        "sshs_legacy_hash": _legacy_hash(_header_bytes(header, ss_only), tensors, data),
        "modelspec.hash_sha256": f"0x{model_hash}",
    }
    head = _header_bytes(header, {**metadata, **hashes})
    atomic_write(path, _writer(head, tensors, data))
    if data_hash(path) != model_hash:
        raise NetworkFileError(f"{path} does not read back as it was written: check the disk")
    return model_hash


def _laid_out(tensors: dict[str, Tensor]) -> tuple[dict[str, dict], list[str]]:
    """(header entries, names in the order of the data): wide types first, then by name, as the library's own writer."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), str(tensors[name].dtype), name))
    header, position = {}, 0
    for name in order:
        size = tensors[name].numel() * tensors[name].element_size()
        header[name] = {
            "dtype": _DTYPE_NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [position, position + size],
        }
        position += size
    return header, order


_DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


def _raw_bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return memoryview(flat.view(torch.uint8).numpy())


def _header_bytes(header: dict[str, dict], metadata: dict[str, str]) -> bytes:
    """Length and JSON of a header, keys sorted so that equal content gives equal bytes, padded to 8."""
    whole = {"__metadata__": dict(sorted(metadata.items())), **header} if metadata else header
    text = json.dumps(whole, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _legacy_hash(head: bytes, tensors: dict[str, Tensor], order: list[str]) -> str:
    """kohya's old hash: 8 hex digits of the SHA-256 of 64 KiB at 1 MiB of the file with only `ss_*` metadata."""
    digest, position = hashlib.sha256(), 0
    stop = _LEGACY_START + _LEGACY_LENGTH
    for piece in (memoryview(head), *(_raw_bytes(tensors[name]) for name in order)):
        begin, end = max(_LEGACY_START - position, 0), min(stop - position, len(piece))
        if begin < end:
            digest.update(piece[begin:end])
        position += len(piece)
        if position >= stop:
            break
    return digest.hexdigest()[:8]


def _writer(head: bytes, tensors: dict[str, Tensor], order: list[str]) -> Callable[[Path], None]:
    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            file.write(head)
            for name in order:
                file.write(_raw_bytes(tensors[name]))

    return write


def is_network(names: list[str]) -> bool:
    """Whether tensor names look like a network's file rather than a checkpoint's."""
    suffixes = {meaning.tensor: None for meaning in map(parse, names) if meaning is not None}
    return kind_of(suffixes) is not None


def save_copy(
    path: Path,
    change: Change,
    metadata: dict[str, str],
    *,
    format: Format = "kohya",
    dtype: torch.dtype = torch.bfloat16,
) -> list[Path]:
    """Write a network that was made from another file, keeping what that file said about itself but its hashes."""
    kept = {name: text for name, text in metadata.items() if name not in _HASHES and name not in _NEVER}
    ranks = [factors.rank for (module, _), factors in change.entries.items() if module != "img_in"]
    commonest = max(set(ranks), key=lambda rank: (ranks.count(rank), rank), default=None)
    facts = describe(Description(path.stem, network_dim=commonest))
    own = ("ss_output_name", "ss_network_dim", "ss_network_alpha")
    written = []
    for file, tensors in layouts(path, change, format, dtype):
        write_network(file, tensors, {**facts, **kept, **{name: facts[name] for name in own if name in facts}})
        written.append(file)
    return written
