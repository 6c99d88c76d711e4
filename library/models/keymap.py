"""Where every tensor of a FLUX transformer lives: BFL's names and diffusers' names, with the rows each one holds.

BFL fuses q, k and v (and, in single blocks, the mlp's input) into one linear; diffusers splits them. The map is made
from a `FluxShape`, so the toy models of the tests and the 12B model share it. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.models.shape import FluxShape

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")


@dataclass(frozen=True)
class Part:
    """One diffusers module inside a BFL module: it holds rows [start, stop) of the BFL module's output.

    halves_swapped: diffusers keeps the two halves of these rows in the other order (norm_out: scale, shift).
    """

    module: str
    start: int
    stop: int
    halves_swapped: bool = False


@dataclass(frozen=True)
class Entry:
    """One tensor of our transformer: its BFL name and shape, and the diffusers tensors that make it up in row order."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def suffix(self) -> str:
        """`weight` or `bias` (`scale` in BFL's own normalisation layers is `weight` in diffusers')."""
        last = self.name.rpartition(".")[2]
        return "weight" if last == "scale" else last

    def diffusers_names(self) -> tuple[str, ...]:
        """The diffusers tensors, in row order."""
        return tuple(f"{part.module}.{self.suffix}" for part in self.parts)


def linear_parts(shape: FluxShape) -> dict[str, tuple[Part, ...]]:
    """Every linear by its BFL module path, with the diffusers modules that it fuses."""
    parts: dict[str, tuple[Part, ...]] = {}
    for path, module, _, out in _plain_linears(shape):
        parts[path] = (Part(module, 0, out),)
    for path, names, widths in _fused_linears(shape):
        start, pieces = 0, []
        for name, width in zip(names, widths):
            pieces.append(Part(name, start, start + width))
            start += width
        parts[path] = tuple(pieces)
    parts["final_layer.adaLN_modulation.1"] = (Part("norm_out.linear", 0, 2 * shape.hidden, halves_swapped=True),)
    return parts


def entries(shape: FluxShape) -> list[Entry]:
    """Every tensor of the transformer."""
    parts = linear_parts(shape)
    found = []
    for path, (out_features, in_features) in linear_shapes(shape).items():
        found.append(Entry(f"{path}.weight", (out_features, in_features), parts[path]))
        found.append(Entry(f"{path}.bias", (out_features,), parts[path]))
    for path, module in _norms(shape):
        found.append(Entry(f"{path}.scale", (shape.head_dim,), (Part(module, 0, shape.head_dim),)))
    return found


def linear_shapes(shape: FluxShape) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear by its BFL module path."""
    shapes = {path: (out, width) for path, _, width, out in _plain_linears(shape)}
    for path, _, widths in _fused_linears(shape):
        shapes[path] = (sum(widths), shape.hidden)
    shapes["final_layer.adaLN_modulation.1"] = (2 * shape.hidden, shape.hidden)
    return shapes


def _plain_linears(shape: FluxShape) -> Iterator[tuple[str, str, int, int]]:
    """(BFL path, diffusers path, in, out) of the linears that both sides cut alike."""
    h, mlp = shape.hidden, shape.mlp
    yield "img_in", "x_embedder", shape.in_channels, h
    yield "txt_in", "context_embedder", shape.text_width, h
    yield "final_layer.linear", "proj_out", h, shape.out_channels
    embedders = [("time_in", "timestep_embedder", 256), ("vector_in", "text_embedder", shape.pooled_width)]
    if shape.guidance:
        embedders.append(("guidance_in", "guidance_embedder", 256))
    for path, module, width in embedders:
        yield f"{path}.in_layer", f"time_text_embed.{module}.linear_1", width, h
        yield f"{path}.out_layer", f"time_text_embed.{module}.linear_2", h, h
    for i in range(shape.double_blocks):
        ours, theirs = f"double_blocks.{i}", f"transformer_blocks.{i}"
        yield f"{ours}.img_mod.lin", f"{theirs}.norm1.linear", h, 6 * h
        yield f"{ours}.txt_mod.lin", f"{theirs}.norm1_context.linear", h, 6 * h
        yield f"{ours}.img_attn.proj", f"{theirs}.attn.to_out.0", h, h
        yield f"{ours}.txt_attn.proj", f"{theirs}.attn.to_add_out", h, h
        for stream, feed_forward in (("img", "ff"), ("txt", "ff_context")):
            yield f"{ours}.{stream}_mlp.0", f"{theirs}.{feed_forward}.net.0.proj", h, mlp
            yield f"{ours}.{stream}_mlp.2", f"{theirs}.{feed_forward}.net.2", mlp, h
    for i in range(shape.single_blocks):
        ours, theirs = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        yield f"{ours}.linear2", f"{theirs}.proj_out", h + mlp, h
        yield f"{ours}.modulation.lin", f"{theirs}.norm.linear", h, 3 * h


def _fused_linears(shape: FluxShape) -> Iterator[tuple[str, tuple[str, ...], tuple[int, ...]]]:
    """(BFL path, diffusers paths, rows of each) of the linears that BFL fuses."""
    h = shape.hidden
    for i in range(shape.double_blocks):
        attention = f"transformer_blocks.{i}.attn"
        image = tuple(f"{attention}.{name}" for name in ("to_q", "to_k", "to_v"))
        text = tuple(f"{attention}.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj"))
        yield f"double_blocks.{i}.img_attn.qkv", image, (h, h, h)
        yield f"double_blocks.{i}.txt_attn.qkv", text, (h, h, h)
    for i in range(shape.single_blocks):
        block = f"single_transformer_blocks.{i}"
        names = (f"{block}.attn.to_q", f"{block}.attn.to_k", f"{block}.attn.to_v", f"{block}.proj_mlp")
        yield f"single_blocks.{i}.linear1", names, (h, h, h, shape.mlp)


def _norms(shape: FluxShape) -> Iterator[tuple[str, str]]:
    """(BFL path, diffusers path) of the RMS normalisations of queries and keys."""
    for i in range(shape.double_blocks):
        for stream, names in (("img", ("norm_q", "norm_k")), ("txt", ("norm_added_q", "norm_added_k"))):
            for kind, name in zip(("query_norm", "key_norm"), names):
                yield f"double_blocks.{i}.{stream}_attn.norm.{kind}", f"transformer_blocks.{i}.attn.{name}"
    for i in range(shape.single_blocks):
        for kind, name in (("query_norm", "norm_q"), ("key_norm", "norm_k")):
            yield f"single_blocks.{i}.norm.{kind}", f"single_transformer_blocks.{i}.attn.{name}"


def strip_prefix(names: list[str]) -> str:
    """The prefix that a single file puts before BFL's names ('' if none)."""
    for prefix in PREFIXES:
        if f"{prefix}img_in.weight" in names:
            return prefix
    return ""
