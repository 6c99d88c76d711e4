"""The linears of a FLUX transformer under both names: BFL's fused modules and diffusers' separate ones.

BFL computes q, k, v (and the single blocks' mlp input) with one linear; diffusers has one linear for each. A `Part` is
one diffusers linear, seen as a row range of the BFL module that holds it. Needs no torch: plans and name checks use it.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

Rows = tuple[int, int]

_QKV = ("to_q", "to_k", "to_v")
_ADDED_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")
_DOUBLE = {
    "img_attn.qkv": tuple(f"attn.{name}" for name in _QKV),
    "txt_attn.qkv": tuple(f"attn.{name}" for name in _ADDED_QKV),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
}
_SINGLE = {
    "linear1": (*(f"attn.{name}" for name in _QKV), "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
_TOP = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
SWAPPED_HALVES = "final_layer.adaLN_modulation.1"
"""The one module whose halves diffusers keeps in the other order (BFL: shift, scale; diffusers: scale, shift)."""

_BLOCK = re.compile(r"(double|single)_blocks\.(\d+)\.(.+)")
_DIFFUSERS_BLOCK = re.compile(r"(single_transformer_blocks|transformer_blocks)\.(\d+)\.(.+)")
_FROM_DIFFUSERS = {
    "double": {name: (own, index) for own, names in _DOUBLE.items() for index, name in enumerate(names)},
    "single": {name: (own, index) for own, names in _SINGLE.items() for index, name in enumerate(names)},
    "top": {name: own for own, name in _TOP.items()},
}


@dataclass(frozen=True)
class Part:
    """Rows [start, stop) of the BFL linear ``module``: what diffusers calls ``diffusers``."""

    module: str
    start: int
    stop: int
    diffusers: str

    @property
    def rows(self) -> Rows:
        """The row range as a pair."""
        return (self.start, self.stop)


def diffusers_names(module: str) -> tuple[str, ...]:
    """The diffusers linears inside the BFL linear ``module``, in row order. Raises KeyError for a name of neither."""
    if module in _TOP:
        return (_TOP[module],)
    match = _BLOCK.fullmatch(module)
    if match is None:
        raise KeyError(module)
    kind, index, own = match.groups()
    prefix = "transformer_blocks" if kind == "double" else "single_transformer_blocks"
    return tuple(f"{prefix}.{index}.{name}" for name in (_DOUBLE if kind == "double" else _SINGLE)[own])


def parts(module: str, out_features: int, in_features: int) -> tuple[Part, ...]:
    """The parts of the BFL linear ``module`` of that size, covering all its rows."""
    names = diffusers_names(module)
    if len(names) == 1:
        return (Part(module, 0, out_features, names[0]),)
    starts = [index * in_features for index in range(len(names))]
    return tuple(
        Part(module, start, stop, name) for start, stop, name in zip(starts, [*starts[1:], out_features], names)
    )


def from_diffusers(name: str) -> tuple[str, int]:
    """(BFL module, index of the part in it) of the diffusers linear ``name``. Raises KeyError if there is none."""
    match = _DIFFUSERS_BLOCK.fullmatch(name)
    if match is None:
        return _FROM_DIFFUSERS["top"][name], 0
    kind = "double" if match[1] == "transformer_blocks" else "single"
    own, index = _FROM_DIFFUSERS[kind][match[3]]
    return f"{kind}_blocks.{match[2]}.{own}", index


def is_known(module: str) -> bool:
    """Whether ``module`` is the name of a BFL linear."""
    match = _BLOCK.fullmatch(module)
    return module in _TOP or (match is not None and match[3] in (_DOUBLE if match[1] == "double" else _SINGLE))


def is_block(module: str) -> bool:
    """Whether the BFL linear lies in a transformer block: only those reach diffusers from a kohya file."""
    return _BLOCK.fullmatch(module) is not None


def is_modulation(module: str) -> bool:
    """Whether the BFL linear computes a block's shifts, scales and gates."""
    return module.endswith(("_mod.lin", "modulation.lin"))


def all_modules(num_double: int, num_single: int, guidance: bool = True) -> Iterator[str]:
    """The names of every linear of a FLUX transformer of that depth."""
    for name in _TOP:
        if guidance or not name.startswith("guidance_in"):
            yield name
    yield from (f"double_blocks.{index}.{own}" for index in range(num_double) for own in _DOUBLE)
    yield from (f"single_blocks.{index}.{own}" for index in range(num_single) for own in _SINGLE)
