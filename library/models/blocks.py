"""The blocks of the FLUX transformer (double: image and text streams; single: one joint stream) and their parts.

Module names are BFL's (https://github.com/black-forest-labs/flux, model.py and modules/layers.py), because LoRA files
use them. The modulation vectors come in ready-made: one linear per block acts on one vector per sample, so they are
computed once per step, outside the recomputed blocks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.memory.attention import Attention
from library.memory.checkpoint import Segment
from library.memory.linear import Linear
from library.models.elementwise import Elementwise, join_gelu
from library.models.shape import FluxShape


class RmsScale(nn.Module):
    """BFL's RMSNorm over a head, whose parameter is called `scale`."""

    def __init__(self, width: int, **factory):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(width, **factory), requires_grad=False)


class QueryKeyNorm(nn.Module):
    """The normalisations of queries and keys."""

    def __init__(self, width: int, **factory):
        super().__init__()
        self.query_norm = RmsScale(width, **factory)
        self.key_norm = RmsScale(width, **factory)


class StreamAttention(nn.Module):
    """The attention linears of one stream of a double block."""

    def __init__(self, shape: FluxShape, **factory):
        super().__init__()
        self.heads = shape.heads
        self.qkv = Linear(shape.hidden, 3 * shape.hidden, **factory)
        self.norm = QueryKeyNorm(shape.head_dim, **factory)
        self.proj = Linear(shape.hidden, shape.hidden, **factory)

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, h) -> queries, keys and values before their normalisation, each (B, T, H, D)."""
        return self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)


class ModulationLinear(nn.Module):
    """Holds `lin`: silu(vec) (B, h) -> `count` vectors of the block."""

    def __init__(self, hidden: int, count: int, **factory):
        super().__init__()
        self.lin = Linear(hidden, count * hidden, **factory)


class DoubleBlock(Segment):
    """Image and text attend jointly, with weights of their own."""

    def __init__(self, shape: FluxShape, attention: Attention, ops: Elementwise, **factory):
        super().__init__()
        self.attention = attention
        self.ops = ops
        for stream in ("img", "txt"):
            mlp = [
                Linear(shape.hidden, shape.mlp, **factory),
                nn.Identity(),
                Linear(shape.mlp, shape.hidden, **factory),
            ]
            self.add_module(f"{stream}_mod", ModulationLinear(shape.hidden, 6, **factory))
            self.add_module(f"{stream}_attn", StreamAttention(shape, **factory))
            self.add_module(f"{stream}_mlp", nn.Sequential(*mlp))

    def body(self, img: Tensor, txt: Tensor, img_mod: Tensor, txt_mod: Tensor, table: Tensor):
        """Inputs: both streams (B, ., h), their modulations (B, 6, h) and the rotation table."""
        streams = ((txt, txt_mod, self.txt_attn, self.txt_mlp), (img, img_mod, self.img_attn, self.img_mlp))
        attended = self._attend(streams, table).split([txt.shape[1], img.shape[1]], dim=1)
        residuals, last_inputs = [], []
        for (x, mod, attention, mlp), output in zip(streams, attended):
            _, _, gate, shift, scale, _ = mod.split(1, dim=1)
            x, normalised = self.ops.gated_norm(x, gate, attention.proj(output), shift, scale)
            residuals.append(x)
            last_inputs.append(F.gelu(mlp[0](normalised), approximate="tanh"))
        return tuple(residuals[::-1]), tuple(last_inputs[::-1])

    def _attend(self, streams: tuple, table: Tensor) -> Tensor:
        """Joint attention of the normalised streams, text before image: (B, T, h)."""
        parts = []
        for x, mod, attention, _ in streams:
            shift, scale = mod.split(1, dim=1)[:2]
            parts.append(attention.queries_keys_values(self.ops.modulated_norm(x, shift, scale)))
        (txt_q, txt_k, txt_v), (img_q, img_k, img_v) = parts
        txt_norm, img_norm = (attention.norm for _, _, attention, _ in streams)
        q = self.ops.joint_norm(txt_q, img_q, txt_norm.query_norm.scale, img_norm.query_norm.scale, table)
        k = self.ops.joint_norm(txt_k, img_k, txt_norm.key_norm.scale, img_norm.key_norm.scale, table)
        return self.attention(q, k, torch.cat([txt_v, img_v], dim=1)).flatten(2)

    def gates(self, img: Tensor, txt: Tensor, img_mod: Tensor, txt_mod: Tensor, table: Tensor) -> tuple[Tensor, ...]:
        return img_mod[:, 5:], txt_mod[:, 5:]

    def gated_sum(self, residual: Tensor, gate: Tensor, value: Tensor) -> Tensor:
        return self.ops.gated_sum(residual, gate, value)

    def last_linears(self) -> tuple[Linear, ...]:
        return self.img_mlp[2], self.txt_mlp[2]


class SingleBlock(Segment):
    """Text and image as one stream; attention and mlp side by side."""

    def __init__(self, shape: FluxShape, attention: Attention, ops: Elementwise, **factory):
        super().__init__()
        self.attention = attention
        self.ops = ops
        self.heads = shape.heads
        self.widths = (shape.hidden, shape.hidden, shape.hidden, shape.mlp)
        self.linear1 = Linear(shape.hidden, sum(self.widths), **factory)
        self.linear2 = Linear(shape.hidden + shape.mlp, shape.hidden, **factory)
        self.norm = QueryKeyNorm(shape.head_dim, **factory)
        self.modulation = ModulationLinear(shape.hidden, 3, **factory)

    def body(self, x: Tensor, mod: Tensor, table: Tensor):
        """Inputs: the joint stream (B, T, h), its modulation (B, 3, h) and the rotation table."""
        shift, scale, _ = mod.split(1, dim=1)
        # One split, so that the four gradients meet in one copy.
        *qkv, mlp = self.linear1(self.ops.modulated_norm(x, shift, scale)).split(self.widths, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in qkv)
        q = self.ops.rotated_norm(q, self.norm.query_norm.scale, table)
        k = self.ops.rotated_norm(k, self.norm.key_norm.scale, table)
        return (x,), (join_gelu(self.attention(q, k, v).flatten(2), mlp),)

    def gates(self, x: Tensor, mod: Tensor, table: Tensor) -> tuple[Tensor, ...]:
        return (mod[:, 2:],)

    def gated_sum(self, residual: Tensor, gate: Tensor, value: Tensor) -> Tensor:
        return self.ops.gated_sum(residual, gate, value)

    def last_linears(self) -> tuple[Linear, ...]:
        return (self.linear2,)
