"""Our LoRA against PEFT's and LyCORIS's on the same transformer in one run: kernels, bytes, saved bytes, time.

    python -m benchmarks.lora_forward [--output benchmarks/results/lora_forward.json]

Counts are deterministic; times are interleaved repeats on the CPU, compared pairwise. All three put a LoRA of the same
rank on the same linears of our FluxTransformer, fp32, no checkpointing. Gates: fewer kernels, bytes and saved bytes
than either, and no more time than PEFT (median of the paired ratios).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.counters import count
from library.config.tables.network import NetworkTable
from library.models.flux import FluxTransformer
from library.models.shape import FluxShape
from library.networks import build

RESULT = Path(__file__).with_name("results") / "lora_forward.json"
ARMS = ("influx", "peft", "lycoris")


@dataclass(frozen=True)
class Setting:
    """The model, the input and the LoRA that are measured."""

    hidden: int = 1024
    double_blocks: int = 1
    single_blocks: int = 2
    image_tokens: int = 256
    text_tokens: int = 128
    rank: int = 16

    @property
    def shape(self) -> FluxShape:
        """FLUX.1 Fill at this width and depth."""
        heads = self.hidden // 128
        return FluxShape(
            hidden=self.hidden, heads=heads, mlp=4 * self.hidden, double_blocks=self.double_blocks,
            single_blocks=self.single_blocks, text_width=512, pooled_width=256,
        )  # fmt: skip


@dataclass
class Arm:
    """What one implementation costs: per step, and the median time with the interval of the median."""

    kernels: int = 0
    traffic_gb: float = 0.0
    saved_mb: float = 0.0
    seconds: float = 0.0
    ratio_to_peft: float = 0.0
    interval: tuple[float, float] = (0.0, 0.0)


def make_model(setting: Setting) -> FluxTransformer:
    """The base, equal for every arm."""
    torch.manual_seed(0)
    model = FluxTransformer(setting.shape)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            torch.nn.init.ones_(parameter) if name.endswith("scale") else torch.nn.init.normal_(parameter, std=0.02)
    return model


def targets(model: FluxTransformer) -> list[str]:
    """The linears that carry a LoRA: all of the blocks but modulation."""
    return [name for name in model.linears() if "_blocks." in name and "mod" not in name.split(".", 2)[2]]


def put_influx(model: FluxTransformer, rank: int) -> list[nn.Parameter]:
    """Our adapters."""
    return build(NetworkTable(network_dim=rank), model, 0).attach()


def put_peft(model: FluxTransformer, rank: int) -> list[nn.Parameter]:
    """PEFT's layers around ours."""
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets(model)), model)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def put_lycoris(model: FluxTransformer, rank: int) -> list[nn.Parameter]:
    """lycoris-lora's LoCon in its faster form (bypass)."""
    from lycoris.modules.locon import LoConModule

    parameters = []
    for name in targets(model):
        module = LoConModule(name, model.get_submodule(name), lora_dim=rank, alpha=rank, bypass_mode=True)
        module.apply_to()
        parameters += module.parameters()
    return parameters


PUT = {"influx": put_influx, "peft": put_peft, "lycoris": put_lycoris}


def make_step(setting: Setting, arm: str) -> tuple[Callable[[], None], list[nn.Parameter]]:
    """(one forward and backward pass, the parameters it gives gradients to)."""
    model = make_model(setting)
    parameters = PUT[arm](model, setting.rank)
    draw = torch.Generator().manual_seed(1)
    shape = setting.shape
    given = {
        "tokens": torch.randn(1, setting.image_tokens, shape.in_channels, generator=draw),
        "text": torch.randn(1, setting.text_tokens, shape.text_width, generator=draw),
        "pooled": torch.randn(1, shape.pooled_width, generator=draw),
        "timestep": torch.tensor([0.5]), "guidance": torch.tensor([1.0]),
        "image_ids": torch.zeros(setting.image_tokens, 3),
    }  # fmt: skip

    def step() -> None:
        model(**given).square().mean().backward()

    return step, parameters


def saved_bytes(step: Callable[[], None], parameters: list[nn.Parameter]) -> float:
    """Bytes that autograd keeps between the passes, every storage once, parameters and base weights apart (MB)."""
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and not isinstance(tensor, nn.Parameter):
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(seen.values()) / 1e6


def measure(setting: Setting, repeats: int) -> dict[str, Arm]:
    """Count every arm, then time them in turn ``repeats`` times."""
    steps = {arm: make_step(setting, arm) for arm in ARMS}
    arms = {arm: Arm() for arm in ARMS}
    for arm, (step, parameters) in steps.items():
        counts = count(step, parameters)
        arms[arm].kernels, arms[arm].traffic_gb = counts.kernels, round(counts.traffic_gb, 4)
        arms[arm].saved_mb = round(saved_bytes(step, parameters), 2)
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for repeat in range(repeats):
        for arm in ARMS[repeat % 3 :] + ARMS[: repeat % 3]:
            step, parameters = steps[arm]
            for parameter in parameters:
                parameter.grad = None
            start = time.process_time()
            step()
            times[arm].append(time.process_time() - start)
    for arm in ARMS:
        ratios = sorted(own / other for own, other in zip(times[arm], times["peft"]))
        arms[arm].seconds = round(statistics.median(times[arm]), 4)
        arms[arm].ratio_to_peft = round(statistics.median(ratios), 4)
        arms[arm].interval = (round(ratios[1], 4), round(ratios[-2], 4))
    return arms


def failures(arms: dict[str, Arm], *, timed: bool = True) -> list[str]:
    """The gates that were missed."""
    ours, missed = arms["influx"], []
    for other in ("peft", "lycoris"):
        for measure_of in ("kernels", "traffic_gb", "saved_mb"):
            if getattr(ours, measure_of) >= getattr(arms[other], measure_of):
                missed.append(f"{measure_of}: {getattr(ours, measure_of)} is not below {other}'s")
    if timed and ours.ratio_to_peft > 1.0:
        missed.append(f"time: {ours.ratio_to_peft} of PEFT's, interval {ours.interval}")
    return missed


def main() -> int:
    """Measure, print and write; 1 if a gate was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=9, help="at least 7")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    setting = Setting(hidden=options.hidden)
    arms = measure(setting, max(7, options.repeats))
    for name, arm in arms.items():
        print(
            f"{name:8} {arm.kernels:6} kernels {arm.traffic_gb:8.3f} GB {arm.saved_mb:9.1f} MB saved"
            f" {arm.seconds:7.3f} s  {arm.ratio_to_peft:.3f} x PEFT {arm.interval}"
        )
    content = {"setting": asdict(setting), "repeats": max(7, options.repeats), "torch": torch.__version__}
    content["arms"] = {name: asdict(arm) for name, arm in arms.items()}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    missed = failures(arms)
    print("\n".join(missed) or "every gate is met")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
