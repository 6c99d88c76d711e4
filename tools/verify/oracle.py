"""diffusers' own transformer over the same file, within little memory, as the oracle of one prediction.

Names and row order are diffusers' (its converter, its classes). Weights stay in the mapped file and visit the device
one module at a time (accelerate's hooks), so that the 24 GB of a bf16 file need neither RAM nor VRAM.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from library.errors import ModelError
from library.flow.packing import pack_latents
from library.models.checkpoint_file import TransformerFile
from library.models.cost import GB
from library.models.predict import grid_ids
from library.models.readers import Reader, Renamed
from library.models.scaled_fp8 import Unscaled
from library.models.shape import diffusers_config
from tools.verify import room

CONVERTER_WIDTH = 3072
"""diffusers' converter of BFL files splits fused tensors at this width, whatever the file says."""
COPIED_SHARE = 0.32
"""Share of a BFL file that the converter copies to RAM: the fused projections of q, k, v and MLP."""
LEVEL, GUIDANCE = 0.5, 1.0
"""Where the two are compared. diffusers multiplies both by 1000 in bf16, which is exact for these values; at guidance
30 it embeds 29,952 instead of 30,000, and a random toy's prediction differs by 46% for that reason alone."""
TOLERANCE = {"fp32": 1e-4, "fp16": 0.02, "bf16": 0.04, "int8": 0.08, "fp8": 0.16, "nf4": 0.45}
"""Largest relative difference (norm of the difference over norm) from diffusers in the activations' dtype that counts
as rounding. For nf4 a third more, for the others about twice the largest that was measured on a CPU with the right
weights (trained ones suffer less than random ones):

              nano     random toys of 2 + 2, 6 + 12 and 19 + 38 blocks
    bf16      0.0073   0.0065   0.0100   0.0151      (two roundings of the same bf16 weights)
    int8      0.0099   0.0150   0.0238   0.0311
    fp8       0.0223   0.0411   0.0757   0.0734
    nf4       0.0722   0.1241   0.1870   0.3369

One double and one single block of FLUX.1 Fill's own width: 0.0060 in bf16, 0.0096 from a Q8_0 GGUF.
A misread layout is far outside: exchanging shift and scale of the last layer alone gives 0.51 (nano) and 0.80 to 0.92.
nf4 finds only such gross mistakes; --base_precision int8 looks closer."""
GGUF_EXTRA = 0.01
"""diffusers multiplies a GGUF's scales in the activations' dtype; InFlux dequantises in fp32."""


class Skipped(Exception):
    """Why the comparison cannot be made here; the base may be fine."""


class Placed(Mapping[str, Tensor]):
    """Tensors by diffusers' names, each converted to `dtype` when it is asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype):
        self.tensors = tensors
        self.dtype = dtype

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name].to(self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def require_readable(file: TransformerFile) -> None:
    """Raise Skipped where diffusers cannot read the file, or not in the free RAM."""
    chain = list(_chain(file.reader))
    if any(isinstance(reader, Unscaled) and reader.scales for reader in chain):
        raise Skipped("diffusers cannot read scaled fp8")
    if file.is_diffusers:
        return
    if file.shape.hidden != CONVERTER_WIDTH:
        raise Skipped(
            f"diffusers reads single files of width {CONVERTER_WIDTH} alone, this one has {file.shape.hidden}"
        )
    needed = file.reader.num_bytes() * (1.3 if is_gguf(file) else COPIED_SHARE) + GB
    free = room.free_ram()
    if needed > free:
        raise Skipped(f"it needs {needed / GB:.1f} GB of free RAM for this file, and {free / GB:.1f} GB are free")


def is_gguf(file: TransformerFile) -> bool:
    """Whether the weights come from a GGUF file."""
    return Path(file.reader.files[0]).suffix.lower() == ".gguf"


def tolerance(file: TransformerFile, precision: str) -> float:
    """The largest relative difference that counts as rounding, for our weights in this precision."""
    return TOLERANCE[precision] + (GGUF_EXTRA if is_gguf(file) else 0.0)


def load(file: TransformerFile, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, torch.device]:
    """diffusers' `FluxTransformer2DModel` over `file`, and the device to call it on. Raises Skipped."""
    require_readable(file)
    if is_gguf(file):
        return _load_gguf(file, device, dtype)
    from accelerate import cpu_offload
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(file.config or diffusers_config(file.shape))
    nn.Module.to(model, dtype=dtype)
    weights = _diffusers_tensors(file)
    wanted = model.state_dict()
    strange = sorted(set(weights) ^ set(wanted)) + [
        n for n in wanted if n in weights and weights[n].shape != wanted[n].shape
    ]
    if strange:
        raise ModelError(f"{file.source}: diffusers' transformer does not fit: {', '.join(strange[:8])}")
    return cpu_offload(model.eval(), device, state_dict=Placed(weights, dtype)), device


def _diffusers_tensors(file: TransformerFile) -> dict[str, Tensor]:
    """The file's tensors under diffusers' names, views of the mapped file wherever the converter makes no copy."""
    tensors = {name: file.reader.read(name) for name in file.reader.shapes}
    if file.is_diffusers:
        return tensors
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    return convert_flux_transformer_checkpoint_to_diffusers(tensors)


def _load_gguf(file: TransformerFile, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, torch.device]:
    """Through diffusers' own GGUF loader; it runs on the CPU if the file does not fit the card."""
    from diffusers import FluxTransformer2DModel, GGUFQuantizationConfig

    with tempfile.TemporaryDirectory() as folder:
        # Without a configuration diffusers asks the hub for one, from a repository that needs a token.
        (Path(folder) / "config.json").write_text(json.dumps(diffusers_config(file.shape)), encoding="utf-8")
        model = FluxTransformer2DModel.from_single_file(
            str(file.reader.files[0]), config=folder, torch_dtype=dtype,
            quantization_config=GGUFQuantizationConfig(compute_dtype=dtype),
        )  # fmt: skip
    fits = device.type == "cuda" and file.reader.num_bytes() + 2 * GB < torch.cuda.mem_get_info(device)[0]
    place = device if fits else torch.device("cpu")
    return model.to(place).eval(), place


def _chain(reader: Reader) -> Iterator[Reader]:
    yield reader
    if isinstance(reader, Renamed | Unscaled):
        yield from _chain(reader.reader)


def inputs(transformer, noisy: Tensor, text, condition) -> dict[str, Tensor | None]:
    """One prediction's inputs under diffusers' names, in the transformer's dtype and on its device."""
    device, dtype = transformer.device, transformer.dtype
    embeddings = text.to(device, dtype)
    tokens = torch.cat([pack_latents(noisy.to(device)), condition.to(device).channels()], dim=-1).to(dtype)
    return {
        "hidden_states": tokens,
        "encoder_hidden_states": embeddings.t5,
        "pooled_projections": embeddings.pooled,
        "timestep": torch.full((1,), LEVEL, device=device, dtype=dtype),
        "guidance": torch.full((1,), GUIDANCE, device=device) if transformer.shape.guidance else None,
        "img_ids": grid_ids(*noisy.shape[-2:]).to(device, dtype),
        "txt_ids": torch.zeros(embeddings.t5.shape[1], 3, device=device, dtype=dtype),
    }


@torch.no_grad()
def our_prediction(transformer, given: dict) -> Tensor:
    """What our transformer makes of diffusers' inputs: (1, tokens, 64) float32 on the CPU."""
    output = transformer(
        given["hidden_states"], given["encoder_hidden_states"], given["pooled_projections"],
        given["timestep"].float(), given["guidance"], given["img_ids"].float(),
    )  # fmt: skip
    return output.float().cpu()


@torch.no_grad()
def their_prediction(model: nn.Module, device: torch.device, given: dict) -> Tensor:
    """What diffusers' transformer makes of them."""
    placed = {name: value if value is None else value.to(device) for name, value in given.items()}
    return model(**placed, return_dict=False)[0].float().cpu()


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over the oracle's norm."""
    return float((ours - theirs).norm() / theirs.norm())
