"""Count what one training step costs, without noise: FLOPs, kernels, memory traffic and peak activations.

The step runs on fake tensors at any size, so a laptop counts the 12B model: `python -m benchmarks.counters`.
Arms: InFlux (eager, and with torch_compile), diffusers' transformer with PEFT, and with LyCORIS. Definitions:
  kernels   operators that compute or copy (views and allocations are free)
  traffic   bytes those operators read and write, matrix products and attention not counted
  flops     matrix products; attention is counted apart, its backward pass as 2.5 times its forward
  peak      live bytes of everything the step allocates but the trained parameters' gradients
Operators are the CPU's: there RMSNorm is eight of them, which CUDA fuses, in every eager arm alike.
Of a compiled region, kernels and traffic are those that inductor plans after fusing (`scheduled.py`): for each kernel
the bytes of the buffers it reads and writes. What lives only inside a region is not in the peak.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.scheduled import Scheduler
from library.config.tables.network import NetworkTable
from library.flow.packing import image_ids
from library.models.compiled import compile_elementwise
from library.models.flux import FluxTransformer
from library.models.shape import FluxShape

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_int_mm", "_scaled_mm")
ATTENTION = "scaled_dot_product"
ALLOCATIONS = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted")
GATES = {
    "kernels": 15_343, "traffic_gb": 242.0, "compiled_traffic_gb": 160.0, "flops_ratio": 0.89,
    "peak_gb": {512: 1.09, 1024: 2.63},
}  # fmt: skip


@dataclass
class Counts:
    """What one step costs."""

    product_tflop: float = 0.0
    attention_tflop: float = 0.0
    kernels: int = 0
    traffic_gb: float = 0.0
    peak_gb: float = 0.0

    @property
    def tflop(self) -> float:
        """Matrix products and attention."""
        return self.product_tflop + self.attention_tflop


class Counter(TorchDispatchMode):
    """Counts operators and follows the life of every allocation."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()
        self.events: list[tuple[int, int]] = []
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.aside = False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Without this, compiled functions would run eagerly below a dispatch mode."""
        return True

    def compiled(self, kernels: int, moved: int, outputs: Sequence[Any]) -> None:
        """Count a compiled graph, whose operators were not counted one by one."""
        self.counts.kernels += kernels
        self.counts.traffic_gb += moved / 1e9
        for tensor in outputs:
            if isinstance(tensor, Tensor):
                self._follow(tensor)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if self.aside:
            return func(*args, **(kwargs or {}))
        inputs = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        before = {_storage(tensor) for tensor in inputs}
        result = func(*args, **(kwargs or {}))
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        name = func._schema.name.split("::")[1]
        writes = func._schema.is_mutable
        fresh = [tensor for tensor in outputs if _storage(tensor) not in before]
        for tensor in fresh:
            self._follow(tensor)
        if name not in ALLOCATIONS and (fresh or writes):
            self._count(name, func, inputs, outputs, args)
        return result

    def _count(self, name: str, func, inputs: list[Tensor], outputs: list[Tensor], args: tuple) -> None:
        self.counts.kernels += 1
        if ATTENTION in name:
            batch, heads, queries, width = inputs[0].shape if "backward" not in name else inputs[1].shape
            forward = 4 * batch * heads * queries * queries * width / 1e12
            self.counts.attention_tflop += forward * (2.5 if "backward" in name else 1)
        elif name.rstrip("_") in PRODUCTS:
            self.counts.product_tflop += _product_flops(name, inputs) / 1e12
        else:
            self.counts.traffic_gb += sum(map(_bytes, (*inputs, *outputs))) / 1e9

    def _follow(self, tensor: Tensor) -> None:
        """Note an allocation, after those that have ended by now."""
        for key in [key for key, (reference, _) in self.live.items() if reference.expired()]:
            self.events.append((key, -self.live.pop(key)[1]))
        storage = tensor.untyped_storage()
        if storage._cdata not in self.live:
            self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
            self.events.append((storage._cdata, storage.nbytes()))

    def peak(self, without: set[int]) -> float:
        """The largest sum of live bytes (GB), leaving out these storages (which are alive at the end)."""
        left_out = {key: position for position, (key, size) in enumerate(self.events) if size > 0 and key in without}
        live = highest = 0
        for position, (key, size) in enumerate(self.events):
            if left_out.get(key) != position:
                live += size
                highest = max(highest, live)
        return highest / 1e9


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensor: Tensor) -> int:
    """Bytes a kernel moves for this operand: a broadcast one is read once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _product_flops(name: str, inputs: list[Tensor]) -> float:
    left, right = inputs[-2:]
    return 2.0 * left.numel() * right.shape[-1]


def count(step: Callable[[], None], parameters: list[Tensor], counter: Counter | None = None) -> Counts:
    """Run `step` (forward and backward, gradients from None) and count it."""
    for parameter in parameters:
        parameter.grad = None
    counter = counter or Counter()
    with counter:
        step()
    gradients = {_storage(parameter.grad) for parameter in parameters if parameter.grad is not None}
    counter.counts.peak_gb = counter.peak(gradients)
    return counter.counts


@dataclass(frozen=True)
class Step:
    """The step that is counted: a model of this shape, one sample of this size."""

    shape: FluxShape
    pixels: int = 512
    text: int = 512
    rank: int = 16

    def inputs(self) -> dict[str, Tensor]:
        """Random inputs in bf16."""
        side = self.pixels // 8
        draw = lambda *size: torch.randn(1, *size, dtype=torch.bfloat16)
        return {
            "tokens": draw(side * side // 4, self.shape.in_channels), "text": draw(self.text, self.shape.text_width),
            "pooled": draw(self.shape.pooled_width), "timestep": torch.rand(1), "guidance": torch.ones(1),
            "image_ids": image_ids(side, side),
        }  # fmt: skip


def materialise(*modules: nn.Module) -> None:
    """Replace parameters and buffers on the meta device by fake ones on the CPU."""
    for module in (part for whole in modules for part in whole.modules()):
        for name, tensor in module._parameters.items():
            if tensor is not None:
                fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                module._parameters[name] = nn.Parameter(fake, requires_grad=tensor.requires_grad)
        for name, tensor in module._buffers.items():
            if tensor is not None:
                module._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype)


def influx(step: Step) -> Counts:
    """InFlux's transformer and its fused LoRA."""
    with fake_tensors():
        run, _, parameters = influx_step(step)
        return count(run, parameters)


def influx_compiled(step: Step) -> Counts:
    """The same with torch_compile; one graph for each size, whose bytes are then exact."""
    counter: Counter | None = None

    def report(kernels: int, moved: int, outputs: Callable[[], Sequence[Any]]) -> Sequence[Any]:
        if counter is None:
            return outputs()
        counter.aside = True
        made = outputs()
        counter.aside = False
        counter.compiled(kernels, moved, made)
        return made

    with fake_tensors(), torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        run, model, parameters = influx_step(step)
        compile_elementwise(model.ops, Scheduler(report), any_length=False)
        run()
        counter = Counter()
        return count(run, parameters, counter)


def influx_step(step: Step) -> tuple[Callable[[], None], FluxTransformer, list[Tensor]]:
    """Forward and backward of InFlux on fake tensors; its transformer and what it trains."""
    from library.networks import build

    model = FluxTransformer(step.shape, dtype=torch.bfloat16)
    model.runner.checkpointing = True
    parameters = build(NetworkTable(network_dim=step.rank), model).attach()
    given = step.inputs()
    # The rotation table and the embedding of the guidance are remembered between steps.
    model._rotation_table(given["image_ids"])
    with torch.no_grad():
        model.modulate(given["timestep"], given["guidance"], given["pooled"])
    return lambda: model(**given).float().square().mean().backward(), model, parameters


def diffusers_model(shape: FluxShape) -> nn.Module:
    """diffusers' transformer on the meta device, with its own checkpointing."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel(
            in_channels=shape.in_channels, out_channels=shape.out_channels, num_layers=shape.double_blocks,
            num_single_layers=shape.single_blocks, attention_head_dim=shape.head_dim,
            num_attention_heads=shape.heads, joint_attention_dim=shape.text_width,
            pooled_projection_dim=shape.pooled_width, guidance_embeds=shape.guidance, axes_dims_rope=shape.axes_dim,
        )  # fmt: skip
    model.to(torch.bfloat16).requires_grad_(False)
    model.enable_gradient_checkpointing()
    return model.train()


def run_diffusers(model: nn.Module, network: nn.Module, step: Step) -> Counts:
    """One step of diffusers' transformer, training what requires a gradient in `network`."""
    with fake_tensors():
        materialise(model, network) if network is not model else materialise(model)
        given = step.inputs()
        call = lambda: model(
            hidden_states=given["tokens"], encoder_hidden_states=given["text"],
            pooled_projections=given["pooled"], timestep=given["timestep"], guidance=given["guidance"],
            img_ids=given["image_ids"], txt_ids=torch.zeros(step.text, 3), return_dict=False,
        )[0].float().square().mean().backward()  # fmt: skip
        return count(call, [parameter for parameter in network.parameters() if parameter.requires_grad])


BLOCK_LINEARS = (
    r".*blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|to_add_out|add_[qkv]_proj)"
    r"|ff(_context)?\.net\.(0\.proj|2)|proj_mlp|proj_out)"
)


def peft(step: Step) -> Counts:
    """diffusers with PEFT's LoRA on the same linears."""
    from peft import LoraConfig

    model = diffusers_model(step.shape)
    config = LoraConfig(r=step.rank, lora_alpha=step.rank, target_modules=BLOCK_LINEARS)
    with torch.device("meta"):
        model.add_adapter(config)
    return run_diffusers(model, model, step)


def lycoris(step: Step) -> Counts:
    """diffusers with LyCORIS' LoCon as its defaults have it."""
    from lycoris import LycorisNetwork, create_lycoris

    model = diffusers_model(step.shape)
    preset = {
        "enable_conv": False, "target_module": ["FluxTransformerBlock", "FluxSingleTransformerBlock"],
        "target_name": [], "exclude_name": [r".*norm.*"],
    }  # fmt: skip
    LycorisNetwork.apply_preset(preset)
    with torch.device("meta"), contextlib.redirect_stdout(sys.stderr):
        network = create_lycoris(model, 1.0, linear_dim=step.rank, linear_alpha=step.rank, algo="locon")
    network.to(torch.bfloat16).apply_to()
    counts = run_diffusers(model, network.requires_grad_(True), step)
    network.restore()
    return counts


ARMS: dict[str, Callable[[Step], Counts]] = {
    "influx": influx, "influx, compiled": influx_compiled, "diffusers+peft": peft, "diffusers+lycoris": lycoris,
}  # fmt: skip


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    """Tensors without memory: shapes, dtypes and lifetimes are real, values are not."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def measure(step: Step, arms: list[str]) -> dict[str, Counts]:
    """Every arm's counts."""
    return {arm: ARMS[arm](step) for arm in arms}


def table(results: dict[str, Counts]) -> str:
    """The results as lines of text."""
    lines = [f"{'arm':20} {'TFLOP':>8} {'products':>9} {'kernels':>8} {'traffic GB':>11} {'peak GB':>8}"]
    for arm, counts in results.items():
        lines.append(
            f"{arm:20} {counts.tflop:8.2f} {counts.product_tflop:9.2f} {counts.kernels:8} "
            f"{counts.traffic_gb:11.1f} {counts.peak_gb:8.3f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--double", type=int, default=19)
    parser.add_argument("--single", type=int, default=38)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    shape = FluxShape(double_blocks=given.double, single_blocks=given.single)
    results = measure(Step(shape, given.pixels), given.arms)
    print(table(results))
    if given.output:
        record = {"pixels": given.pixels, "double": given.double, "single": given.single}
        record["arms"] = {arm: asdict(counts) for arm, counts in results.items()}
        given.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
