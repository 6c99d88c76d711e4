"""The plain arithmetic on what a network adds to one weight: change of weight, folding, merging, SVD.

Everything that must agree between training, files, tools and other programs is computed here, on the `Factors` of
`kinds`.
"""

import torch
from torch import Tensor

from library.flow.draws import generator
from library.networks.kinds import DOWN, UP, Factors, diagonal_blocks, kind_of

__all__ = ["DOWN", "UP", "Factors", "kind_of"]

_SCALED = {"lora": UP, "loha": "hada_w1_a", "glora": ("a1.weight", "b1.weight")}


def delta(factors: Factors, base: Tensor | None) -> Tensor:
    """The change of the weight, (out, in), in the factors' own precision; see `Factors.delta`."""
    return _DELTAS[factors.kind](factors, base)


def _lora_delta(factors: Factors, base: Tensor | None) -> Tensor:
    return (factors.tensors[UP] @ factors.tensors[DOWN]) * factors.scale


def _loha_delta(factors: Factors, base: Tensor | None) -> Tensor:
    tensors = factors.tensors
    first = tensors["hada_w1_a"] @ tensors["hada_w1_b"]
    return first * (tensors["hada_w2_a"] @ tensors["hada_w2_b"]) * factors.scale


def _lokr_delta(factors: Factors, base: Tensor | None) -> Tensor:
    tensors = factors.tensors
    whole = [
        tensors[name] if name in tensors else tensors[f"{name}_a"] @ tensors[f"{name}_b"]
        for name in ("lokr_w1", "lokr_w2")
    ]
    return torch.kron(whole[0], whole[1]) * factors.scale


def _glora_delta(factors: Factors, base: Tensor | None) -> Tensor:
    assert base is not None, "GLoRA's change depends on the weight it changes"
    a1, a2, b1, b2 = (factors.tensors[f"{name}.weight"] for name in ("a1", "a2", "b1", "b2"))
    return (base.to(a1) @ a1 @ a2 + b1 @ b2) * factors.scale


def _oft_delta(factors: Factors, base: Tensor | None) -> Tensor:
    """(R - 1) W, block by block, with R the Cayley transform of the skew part of ``oft_blocks``."""
    assert base is not None, "OFT's change depends on the weight it changes"
    blocks = factors.tensors["oft_blocks"]
    rotation = cayley(blocks, (factors.alpha or 0.0) * base.shape[0])
    identity = torch.eye(blocks.shape[1], dtype=rotation.dtype, device=rotation.device)
    rows = base.to(rotation).view(blocks.shape[0], blocks.shape[1], -1)
    delta = torch.einsum("knm,kni->kmi", rotation - identity, rows).reshape(base.shape)
    rescale = factors.tensors.get("rescale")
    return delta if rescale is None else rescale * delta + (rescale - 1) * base.to(rotation)


def cayley(blocks: Tensor, limit: float = 0.0) -> Tensor:
    """Rotations (I + Q)(I - Q)^-1 of the skew-symmetric Q = blocks - blocks^T; |Q| held to ``limit`` if positive."""
    skew = blocks - blocks.transpose(1, 2)
    if limit > 0:
        norm = torch.linalg.vector_norm(skew) + 1e-8
        skew = skew * torch.clamp(limit / norm, max=1.0)
    identity = torch.eye(blocks.shape[1], dtype=blocks.dtype, device=blocks.device)
    return (identity + skew) @ torch.linalg.inv(identity - skew)


def _full_delta(factors: Factors, base: Tensor | None) -> Tensor:
    return factors.tensors["diff"]


_DELTAS = {
    "lora": _lora_delta,
    "loha": _loha_delta,
    "lokr": _lokr_delta,
    "glora": _glora_delta,
    "oft": _oft_delta,
    "full": _full_delta,
}


def lora(down: Tensor, up: Tensor, alpha: float | None = None) -> Factors:
    """A low-rank change ``up @ down``; alpha = rank (no scaling) unless given."""
    return Factors("lora", {DOWN: down, UP: up}, float(down.shape[0]) if alpha is None else alpha)


def folded(factors: Factors) -> Factors:
    """The same change with alpha = rank: programs disagree about every other alpha."""
    if factors.kind in ("oft", "full"):
        return factors
    return scaled(factors.kind, factors.tensors, factors.scale)


def scaled(kind: str, tensors: dict[str, Tensor], scale: float) -> Factors:
    """Factors whose product is multiplied by ``scale``, which goes into one of them; alpha = rank."""
    tensors = dict(tensors)
    names = _SCALED.get(kind) or ("lokr_w2" if "lokr_w2" in tensors else "lokr_w2_a")
    if scale != 1.0:
        for name in names if isinstance(names, tuple) else (names,):
            tensors[name] = tensors[name] * scale
    plain = Factors(kind, tensors)
    return Factors(kind, tensors, float(plain.rank))


def exact_lora(delta: Tensor) -> Factors:
    """``delta`` as a LoRA without any loss: one factor is the identity, on the smaller side."""
    out_features, in_features = delta.shape
    if in_features <= out_features:
        return lora(torch.eye(in_features, dtype=delta.dtype, device=delta.device), delta)
    return lora(delta, torch.eye(out_features, dtype=delta.dtype, device=delta.device))


def svd_lora(delta: Tensor, rank: int | None = None, energy: float | None = None) -> tuple[Factors, float]:
    """The best LoRA of ``rank``, or of the least rank keeping ``energy`` of the squared norm; and its relative error.

    Singular values are shared evenly by the two factors.
    """
    assert (rank is None) != (energy is None), "say either a rank or an energy"
    if rank is not None and 4 * (rank + 8) < min(delta.shape):
        return _leading_lora(delta.float(), rank)
    left, values, right = torch.linalg.svd(delta.float(), full_matrices=False)
    squares = values.square()
    total = squares.sum()
    if rank is None:
        share = torch.cumsum(squares, 0) / total.clamp_min(torch.finfo(torch.float32).tiny)
        rank = int((share < energy - 1e-7).sum()) + 1
    rank = max(1, min(rank, len(values)))
    root = values[:rank].sqrt()
    error = (squares[rank:].sum() / total).sqrt().item() if total > 0 else 0.0
    return lora(right[:rank] * root[:, None], left[:, :rank] * root), error


def _leading_lora(delta: Tensor, rank: int) -> tuple[Factors, float]:
    """`svd_lora` for a rank far below the matrix's, without the other singular values."""
    left, values, right = leading_directions(delta, rank, generator(0, "svd_lora"))
    total = delta.square().sum()
    lost = (total - values.square().sum()).clamp_min(0)
    root = values.sqrt()
    return lora(right.t() * root[:, None], left * root), float((lost / total).sqrt()) if total > 0 else 0.0


def leading_directions(weight: Tensor, rank: int, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular triplets: left (out, r), values (r,), right (in, r).

    A randomised subspace iteration (Halko et al. 2011, algorithm 4.4) whose start comes from ``draw``.
    """
    width = min(rank + 8, *weight.shape)
    basis = weight @ torch.randn(weight.shape[1], width, generator=draw).to(weight.device)
    for _ in range(4):
        basis = torch.linalg.qr(weight.t() @ torch.linalg.qr(basis)[0])[0]
        basis = weight @ basis
    basis = torch.linalg.qr(basis)[0]
    left, values, right = torch.linalg.svd(basis.t() @ weight, full_matrices=False)
    return (basis @ left)[:, :rank], values[:rank], right[:rank].t()


def as_lora(factors: Factors, rank: int | None = None, energy: float | None = None) -> tuple[Factors, float]:
    """A LoRA of the same change, at most of ``rank``, and its relative error; a LoRA that already fits is returned."""
    if factors.kind == "lora" and energy is None and (rank is None or factors.rank <= rank):
        return folded(factors), 0.0
    if factors.kind == "lora":
        return _shrunk(factors, rank, energy)
    delta = factors.delta()
    return (exact_lora(delta), 0.0) if rank is None and energy is None else svd_lora(delta, rank, energy)


def _shrunk(factors: Factors, rank: int | None, energy: float | None) -> tuple[Factors, float]:
    """SVD of a LoRA through its factors' QR: exact, and cheap beside an SVD of the whole weight."""
    left, left_core = torch.linalg.qr(factors.tensors[UP].float())
    right, right_core = torch.linalg.qr(factors.tensors[DOWN].float().t())
    core, error = svd_lora(left_core @ right_core.t() * factors.scale, rank, energy)
    return lora(core.tensors[DOWN] @ right.t(), left @ core.tensors[UP]), error


def block_diagonal(pieces: list[tuple[tuple[int, int], Factors]], out_features: int) -> Factors:
    """One LoRA on the fused weight that is exactly the given LoRAs on row ranges of it.

    Its rank is the sum of theirs, down-projections that are shared counted once.
    """
    downs: list[Tensor] = []
    placed: list[tuple[tuple[int, int], int, Tensor]] = []
    for rows, piece in pieces:
        tensors = folded(piece).tensors
        shared = [index for index, down in enumerate(downs) if torch.equal(down, tensors[DOWN])]
        placed.append((rows, shared[0] if shared else len(downs), tensors[UP]))
        if not shared:
            downs.append(tensors[DOWN])
    columns = [0]
    for down in downs:
        columns.append(columns[-1] + down.shape[0])
    up = downs[0].new_zeros(out_features, columns[-1])
    for (start, stop), index, values in placed:
        up[start:stop, columns[index] : columns[index + 1]] = values
    return lora(torch.cat(downs), up)


def row_slice(factors: Factors, rows: tuple[int, int], members: list[tuple[int, int]]) -> Factors:
    """The LoRA on ``rows`` of a fused LoRA. A block-diagonal one (a merged split network) gets its small rank back.

    ``members``: the rows of every part of the fused weight; ``rows`` is one of them.
    """
    whole = folded(factors)
    up, down = whole.tensors[UP], whole.tensors[DOWN]
    inside = up[rows[0] : rows[1]]
    blocks = diagonal_blocks(up, members)
    if rows in blocks:
        first, last = blocks[rows]
        return lora(down[first:last].clone(), inside[:, first:last].clone())
    return lora(down.clone(), inside.clone())


def stacked(first: Factors, second: Factors, second_weight: float = 1.0) -> Factors:
    """One LoRA that is exactly ``first + second_weight * second``; its rank is the sum of theirs."""
    a, b = folded(first), folded(second)
    return lora(
        torch.cat([a.tensors[DOWN], b.tensors[DOWN]]), torch.cat([a.tensors[UP], b.tensors[UP] * second_weight], dim=1)
    )
