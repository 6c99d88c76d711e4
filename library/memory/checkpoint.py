"""Gradient checkpointing of residual blocks that never recomputes a block's last matrix product.

A block's output is `residual + gate * last(x)`. Its gradients need `residual`'s and `x`'s graphs and the gate, but not
the value of `last(x)`; recomputing that product, as per-block checkpointing usually does, is 10-12% of a FLUX step.
Exact: the gradients are those of the plain backward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from library.memory.attention import Attention
from library.memory.linear import Linear
from library.memory.offload import Keeper

Tensors = tuple[Tensor, ...]


class Segment(nn.Module):
    """A residual block: for each of its streams i, `out_i = residual_i + gate_i * last_i(x_i)`.

    attention: what the block attends with; None if it does not.
    """

    attention: Attention | None = None

    def body(self, *inputs: Tensor) -> tuple[Tensors, Tensors]:
        """All but the last linears: returns every stream's residual and the input of its last linear."""
        raise NotImplementedError

    def gates(self, *inputs: Tensor) -> Tensors:
        """Every stream's gate, broadcastable to its output; a view of the inputs."""
        raise NotImplementedError

    def gated_sum(self, residual: Tensor, gate: Tensor, value: Tensor) -> Tensor:
        """One stream's output from its residual, its gate and its last linear's output."""
        return gated_sum(residual, gate, value)

    def last_linears(self) -> tuple[Linear, ...]:
        """Every stream's last linear."""
        raise NotImplementedError

    def linears(self) -> list[Linear]:
        """All linears of the block."""
        return [module for module in self.modules() if isinstance(module, Linear)]


def run(segment: Segment, inputs: Tensors) -> Tensors:
    """The block's outputs; autograd, if it is on, saves what it needs."""
    residuals, last_inputs = segment.body(*inputs)
    gates, lasts = segment.gates(*inputs), segment.last_linears()
    return tuple(
        segment.gated_sum(residual, gate, last(x))
        for residual, gate, last, x in zip(residuals, gates, lasts, last_inputs)
    )


def gated_sum(residual: Tensor, gate: Tensor, value: Tensor) -> Tensor:
    """residual + gate * value, in one pass; in fp16 clipped to its finite range, as diffusers' FLUX does."""
    output = torch.addcmul(residual, gate, value)
    return output.clip(-65504, 65504) if output.dtype == torch.float16 else output


def run_checkpointed(segment: Segment, inputs: Tensors, keeper: Keeper, keep_attention: bool = False) -> Tensors:
    """The block's outputs, keeping only its inputs (where `keeper` puts them) for the backward pass.

    keep_attention: keep the attention's output on the device as well.
    """
    anchor = None
    if not any(tensor.requires_grad for tensor in inputs):
        if not any(parameter.requires_grad for parameter in segment.parameters()):
            return run(segment, inputs)
        # A node of the graph needs an input that requires a gradient, even if only parameters inside it do.
        anchor = torch.empty(0, requires_grad=True)
    return _Checkpointed.apply(anchor, segment, keeper, keep_attention, *inputs)


class _Checkpointed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, anchor: Tensor | None, segment: Segment, keeper: Keeper, keep_attention: bool, *inputs: Tensor
    ) -> Tensors:
        ctx.segment = segment
        ctx.random_state = _random_state(segment, inputs[0].device)
        ctx.kept = keeper.keep(ctx, inputs)
        ctx.set_materialize_grads(False)
        ctx.attended = None
        if not keep_attention or segment.attention is None:
            return run(segment, inputs)
        with segment.attention.remembering() as ctx.attended:
            return run(segment, inputs)

    @staticmethod
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[4:]
        inputs = tuple(
            tensor.detach().requires_grad_(need) for tensor, need in zip(ctx.kept.restore(ctx), needed, strict=True)
        )
        with torch.enable_grad(), _replayed(ctx.random_state, inputs[0].device):
            # Views, so that a stream's two gradients meet in autograd's buffer instead of being copied into `.grad`.
            views = tuple(tensor.view_as(tensor) if tensor.requires_grad else tensor for tensor in inputs)
            with _recalling(ctx.segment, ctx.attended):
                roots, root_grads = _roots(ctx.segment, views, grads)
        pairs = [(root, grad) for root, grad in zip(roots, root_grads) if grad is not None and root.requires_grad]
        if pairs:
            torch.autograd.backward([root for root, _ in pairs], [grad for _, grad in pairs])
        return None, None, None, None, *(tensor.grad for tensor in inputs)


def _roots(segment: Segment, inputs: Tensors, grads: tuple[Tensor | None, ...]) -> tuple[list, list]:
    """The recomputed tensors from which to go backward, and their gradients."""
    gates, lasts = segment.gates(*inputs), segment.last_linears()
    exact = inputs[0].dtype != torch.float16 and not any(gate.requires_grad for gate in gates)
    if not exact or not all(last.can_be_phantom() for last in lasts):
        return list(run(segment, inputs)), list(grads)
    residuals, last_inputs = segment.body(*inputs)
    outputs = [last.phantom(x) for last, x in zip(lasts, last_inputs)]
    gated = [None if grad is None else grad * gate for grad, gate in zip(grads, gates)]
    return [*residuals, *outputs], [*grads, *gated]


def _recalling(segment: Segment, attended: list | None) -> contextlib.AbstractContextManager:
    if attended is None or segment.attention is None:
        return contextlib.nullcontext()
    return segment.attention.recalling(attended)


def _random_state(segment: Segment, device: torch.device) -> tuple[Tensor, Tensor | None] | None:
    if not any(linear.adapter is not None and linear.adapter.draws_random for linear in segment.linears()):
        return None
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextlib.contextmanager
def _replayed(state: tuple[Tensor, Tensor | None] | None, device: torch.device) -> Iterator[None]:
    """Run a block again with the random numbers of its first run, and leave the generators as they were."""
    if state is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], device)
        yield
