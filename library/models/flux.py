"""The FLUX transformer, with BFL's module names over weights from any checkpoint layout.

The same function as diffusers' `FluxTransformer2DModel`, arranged for training on frozen weights: the modulation
vectors of all blocks are computed first, once; rotation tables are cached; text and image stay one tensor through the
single blocks; nothing but what is trained ever needs a gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from library.memory.attention import Attention
from library.memory.checkpoint import Segment
from library.memory.linear import Linear
from library.memory.runner import BlockRunner
from library.models.blocks import DoubleBlock, SingleBlock
from library.models.elementwise import Elementwise, modulated_norm
from library.models.rope import rotation_table
from library.models.shape import FluxShape

EMBEDDING_WIDTH = 256


@dataclass(frozen=True)
class Modulation:
    """Every block's modulation vectors for one batch: (B, count, h) each, the ones already added to the scales."""

    image: tuple[Tensor, ...]
    text: tuple[Tensor, ...]
    single: tuple[Tensor, ...]
    final: Tensor

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Modulation:
        """The same vectors on another device."""
        move = [tuple(x.to(device, dtype, non_blocking=True) for x in part) for part in (self.image, self.text)]
        single = tuple(x.to(device, dtype, non_blocking=True) for x in self.single)
        return Modulation(move[0], move[1], single, self.final.to(device, dtype, non_blocking=True))


def timestep_embedding(t: Tensor, width: int = EMBEDDING_WIDTH) -> Tensor:
    """t (B,) in [0, 1] (or a guidance scale) -> (B, width) float32: cosines, then sines, of 1000 t."""
    half = width // 2
    exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = (t * 1000).float()[:, None] * exponents.exp()
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Embedder(nn.Module):
    """Two linears with a SiLU between them."""

    def __init__(self, width: int, hidden: int, **factory):
        super().__init__()
        self.in_layer = Linear(width, hidden, **factory)
        self.out_layer = Linear(hidden, hidden, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class FinalLayer(nn.Module):
    """The last modulated normalisation and the projection to the output channels."""

    def __init__(self, shape: FluxShape, **factory):
        super().__init__()
        self.linear = Linear(shape.hidden, shape.out_channels, **factory)
        self.adaLN_modulation = nn.Sequential(nn.Identity(), Linear(shape.hidden, 2 * shape.hidden, **factory))

    def forward(self, x: Tensor, mod: Tensor) -> Tensor:
        shift, scale = mod.split(1, dim=1)
        return self.linear(modulated_norm(x, shift, scale))


class FluxTransformer(nn.Module):
    """Predicts the velocity of packed latents. `runner` says how its blocks are executed."""

    def __init__(
        self,
        shape: FluxShape,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        attention: Attention | None = None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.shape = shape
        self.dtype = dtype or torch.get_default_dtype()
        self.runner = BlockRunner()
        self.attention = attention or Attention()
        self.img_in = Linear(shape.in_channels, shape.hidden, **factory)
        self.txt_in = Linear(shape.text_width, shape.hidden, **factory)
        self.time_in = Embedder(EMBEDDING_WIDTH, shape.hidden, **factory)
        self.vector_in = Embedder(shape.pooled_width, shape.hidden, **factory)
        self.guidance_in = Embedder(EMBEDDING_WIDTH, shape.hidden, **factory) if shape.guidance else None
        self.ops = Elementwise()
        doubles = [DoubleBlock(shape, self.attention, self.ops, **factory) for _ in range(shape.double_blocks)]
        singles = [SingleBlock(shape, self.attention, self.ops, **factory) for _ in range(shape.single_blocks)]
        self.double_blocks = nn.ModuleList(doubles)
        self.single_blocks = nn.ModuleList(singles)
        self.final_layer = FinalLayer(shape, **factory)
        self._tables = WeakTensorKeyDictionary()
        self._guidances = WeakTensorKeyDictionary()

    @property
    def device(self) -> torch.device:
        """Where activations live: the device of the input projection."""
        return self.img_in.device

    def linears(self) -> dict[str, Linear]:
        """Every linear by its BFL module path: what networks choose their targets from."""
        return {name: module for name, module in self.named_modules() if isinstance(module, Linear)}

    def blocks(self) -> list[Segment]:
        """Double and single blocks as the one list that streaming counts in."""
        return [*self.double_blocks, *self.single_blocks]

    def streamed_linears(self, index: int) -> list[Linear]:
        """The linears of a block that compute inside it (its modulation is computed before all blocks)."""
        modulation = {id(linear) for linear in self.modulation_linears()}
        return [linear for linear in self.blocks()[index].linears() if id(linear) not in modulation]

    def forward(
        self,
        tokens: Tensor,
        text: Tensor,
        pooled: Tensor,
        timestep: Tensor,
        guidance: Tensor | None,
        image_ids: Tensor,
        modulation: Modulation | None = None,
    ) -> Tensor:
        """The velocity of every token.

        tokens (B, N, in), text (B, L, text_width), pooled (B, pooled_width), timestep (B,) in [0, 1],
        guidance (B,) or None as the shape says, image_ids (N, 3) -> (B, N, out).
        `modulation` saves computing it from timestep, guidance and pooled here.
        """
        dtype = self.dtype
        if modulation is None:
            modulation = self.modulate(timestep, guidance, pooled)
        table = self._rotation_table(image_ids)
        img, txt = self.img_in(tokens.to(dtype)), self.txt_in(text.to(dtype))
        run = self.runner
        run.begin()
        for i, block in enumerate(self.double_blocks):
            img, txt = run(block, i, (img, txt, modulation.image[i], modulation.text[i], table))
        joint = torch.cat([txt, img], dim=1)
        for i, block in enumerate(self.single_blocks):
            (joint,) = run(block, len(self.double_blocks) + i, (joint, modulation.single[i], table))
        return self.final_layer(joint[:, text.shape[1] :], modulation.final)

    def modulate(self, timestep: Tensor, guidance: Tensor | None, pooled: Tensor) -> Modulation:
        """Every block's modulation vectors: one linear per block over one vector per sample."""
        linears = [*self.modulation_linears()]
        home = linears[0].device
        vector = F.silu(self._vector(timestep, guidance, pooled).to(home))
        ones: dict[int, Tensor] = {}
        made = [_with_ones(linear(vector), self.shape.hidden, ones) for linear in linears]
        made = [mod.to(self.device, non_blocking=True) for mod in made]
        doubles = 2 * len(self.double_blocks)
        return Modulation(tuple(made[0:doubles:2]), tuple(made[1:doubles:2]), tuple(made[doubles:-1]), made[-1])

    def modulation_linears(self) -> list[Linear]:
        """The modulation linears in the order image, text, image, text, ..., singles, final."""
        found = []
        for block in self.double_blocks:
            found += [block.img_mod.lin, block.txt_mod.lin]
        found += [block.modulation.lin for block in self.single_blocks]
        return [*found, self.final_layer.adaLN_modulation[1]]

    def vector_linears(self) -> list[Linear]:
        """Every linear that acts on one vector per sample: the embedders of time, guidance and text, and modulation."""
        embedders = [one for one in (self.time_in, self.guidance_in, self.vector_in) if one is not None]
        return [*(layer for one in embedders for layer in (one.in_layer, one.out_layer)), *self.modulation_linears()]

    def _vector(self, timestep: Tensor, guidance: Tensor | None, pooled: Tensor) -> Tensor:
        """The conditioning vector (B, h) of time, guidance and pooled text, where the embedders are."""
        if (guidance is None) == self.shape.guidance:
            raise ValueError(f"guidance={guidance} for a transformer with guidance={self.shape.guidance}")
        exact = torch.float64 if self.dtype == torch.float64 else torch.float32
        home = self.time_in.in_layer.device
        vector = self.time_in(timestep_embedding(timestep.to(home, exact)).to(self.dtype))
        if guidance is not None:
            vector = vector + self._guided(guidance, home, exact)
        return vector + self.vector_in(pooled.to(home, self.dtype))

    def _guided(self, guidance: Tensor, home: torch.device, exact: torch.dtype) -> Tensor:
        """The embedding (B, h) of the guidance: remembered as long as the caller keeps the tensor and nothing changes.

        Where its layers are trained it is computed anew.
        """
        layers = (self.guidance_in.in_layer, self.guidance_in.out_layer)
        trained = any(layer.adapter is not None or layer.weight.requires_grad for layer in layers)
        state = tuple((id(layer.weight), layer.weight._version) for layer in layers)
        remembered, embedding = self._guidances.get(guidance, (None, None))
        if trained or remembered != state:
            embedding = self.guidance_in(timestep_embedding(guidance.to(home, exact)).to(self.dtype))
            if not trained:
                self._guidances[guidance] = state, embedding
        return embedding

    def _rotation_table(self, image_ids: Tensor) -> Tensor:
        """The rotations of these ids, remembered as long as the caller keeps the ids tensor."""
        table = self._tables.get(image_ids)
        wanted = torch.complex128 if self.dtype == torch.float64 else torch.complex64
        if table is None or table.device != self.device or table.dtype != wanted:
            table = rotation_table(image_ids.to(self.device), self.shape.axes_dim, self.dtype)
            self._tables[image_ids] = table
        return table


def _with_ones(vectors: Tensor, hidden: int, ones: dict[int, Tensor]) -> Tensor:
    """(B, count * h) shift, scale[, gate, ...] -> (B, count, h) with 1 added to every scale."""
    vectors = vectors.unflatten(-1, (-1, hidden))
    count = vectors.shape[1]
    if count not in ones:
        pattern = [[float(position % 3 == 1)] for position in range(count)]
        ones[count] = torch.tensor(pattern, device=vectors.device, dtype=vectors.dtype)
    return vectors + ones[count]
