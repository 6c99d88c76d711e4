"""The frozen base split over the processes with FSDP2: each keeps its share of every block's weights.

A weight is gathered while a product with it is computed, forward and backward, and given back at once. Trained
parameters stay whole on every process: they are small, and stepping, saving and continuing stay the same code.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from library.errors import ConfigError
from library.memory.linear import Linear
from library.memory.storage import Storage
from library.models.flux import FluxTransformer
from library.training.processes import World


class _Holder(nn.Module):
    """The module that FSDP2 needs around a parameter."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)


class ShardedStorage(Storage):
    """A plain (out, in) weight of which this process keeps a share of the rows."""

    def __init__(self, weight: Tensor, mesh: DeviceMesh):
        self.holder = _Holder(weight)
        fully_shard(self.holder, mesh=mesh, reshard_after_forward=False)
        super().__init__((weight.shape[0], weight.shape[1]), {"share": self.holder.weight.to_local()})

    @contextlib.contextmanager
    def gathered(self) -> Iterator[Tensor]:
        """The whole weight. Every process must come here the same number of times, in the same order."""
        self.holder.unshard()
        try:
            yield self.holder.weight
        finally:
            self.holder.reshard()

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        with self.gathered() as weight:
            return F.linear(x, weight.to(x.dtype), bias)

    def input_gradient(self, grad: Tensor) -> Tensor:
        with self.gathered() as weight:
            return grad @ weight.to(grad.dtype)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        with self.gathered() as weight:
            return weight.to(dtype, copy=True)


def shard_blocks(transformer: FluxTransformer, world: World, device: torch.device) -> None:
    """Split the weights of all blocks. Raises ConfigError for weights that are quantised or streamed."""
    mesh = init_device_mesh(device.type, (world.size,))
    for blocks in (transformer.double_blocks, transformer.single_blocks):
        for module in blocks.modules():
            if isinstance(module, Linear):
                _shard(module, mesh)


def _shard(linear: Linear, mesh: DeviceMesh) -> None:
    if linear.storage is not None:
        raise ConfigError(
            "the launcher asks to split the base over the processes (FSDP, or DeepSpeed stage 3), which works for "
            "plain weights only: set base_precision to bf16 and blocks_to_swap to 0, or launch data parallel (ddp.yaml)"
        )
    linear.set_storage(ShardedStorage(linear.weight, mesh))
