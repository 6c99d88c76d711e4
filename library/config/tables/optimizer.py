"""How the weights move: optimizer, learning rates, schedule."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BeforeValidator

from library.config.table import Arguments, Table, key

if TYPE_CHECKING:
    from library.config.run import Run

OPTIMIZERS = (
    "AdamW",
    "AdamW8bit",
    "PagedAdamW",
    "PagedAdamW8bit",
    "Lion",
    "Lion8bit",
    "PagedLion8bit",
    "Adafactor",
    "Prodigy",
    "AdamWScheduleFree",
    "SGDScheduleFree",
    "RAdamScheduleFree",
    "SGD",
)
"""The names that need no dotted path. The trainer knows the class behind each."""

_ADAM = "optimizer_type=AdamW|AdamW8bit|PagedAdamW|PagedAdamW8bit|AdamWScheduleFree|RAdamScheduleFree|Prodigy"


def _canonical(value: object) -> object:
    """Names are known in any case: `prodigy` is Prodigy."""
    by_lower = {name.lower(): name for name in OPTIMIZERS}
    return by_lower.get(value.lower(), value) if isinstance(value, str) else value


_SAID_BY = {
    "betas": ("adam_beta1", "adam_beta2"),
    "eps": ("adam_epsilon",),
    "weight_decay": ("adam_weight_decay",),
    "beta3": ("prodigy_beta3",),
    "decouple": ("prodigy_decouple",),
    "use_bias_correction": ("prodigy_use_bias_correction",),
    "safeguard_warmup": ("prodigy_safeguard_warmup",),
}

OptimizerName = Annotated[str, BeforeValidator(_canonical)]


class OptimizerTable(Table):
    """Optimizer, learning rates and their schedule."""

    section: ClassVar[str] = "optimizer"
    reads: ClassVar[str] = "train"

    optimizer_type: OptimizerName = key("AdamW", aliases=("optimizer",))
    """AdamW, AdamW8bit, PagedAdamW8bit, Prodigy, Adafactor, Lion, AdamWScheduleFree, or the dotted path of a
    subclass of torch.optim.Optimizer."""
    optimizer_args: Arguments = key(())
    """Arguments of the optimizer, as "name=value"."""
    learning_rate: float = key(1e-4, ge=0, kohya="2e-6", rerun=True)
    """Learning rate of the network."""
    unet_lr: float | None = key(None, ge=0, rerun=True)
    """Learning rate of the network on the transformer; learning_rate if not set."""
    x_embedder_lr: float | None = key(None, ge=0, rerun=True, only_with="train_x_embedder")
    """Learning rate of x_embedder; learning_rate if not set."""
    text_encoder_lr: float = key(5e-6, ge=0, kohya="learning_rate", rerun=True, only_with="train_text_encoder")
    """Learning rate of the network on CLIP-L."""
    loraplus_lr_ratio: float | None = key(None, gt=0)
    """LoRA+: the up-projection learns this many times faster. For lora and locon; other kinds have none."""
    adam_beta1: float = key(0.9, ge=0, lt=1, only_with=_ADAM)
    """First beta of the Adam family and of Prodigy."""
    adam_beta2: float = key(0.999, ge=0, lt=1, only_with=_ADAM)
    """Second beta of the Adam family and of Prodigy."""
    adam_epsilon: float = key(1e-8, gt=0, only_with=_ADAM)
    """Epsilon of the Adam family and of Prodigy."""
    adam_weight_decay: float = key(1e-4, ge=0, kohya="0.01", only_with=_ADAM)
    """Weight decay of the Adam family and of Prodigy."""
    adam_weight_decay_text_encoder: float = key(1e-3, ge=0, kohya="0.01", only_with="train_text_encoder")
    """Weight decay of the network on CLIP-L."""
    prodigy_beta3: float | None = key(None, ge=0, lt=1, only_with="optimizer_type=Prodigy")
    """Prodigy: coefficient of the running step size; the square root of beta2 if not set."""
    prodigy_decouple: bool = key(True, only_with="optimizer_type=Prodigy")
    """Prodigy: weight decay as in AdamW."""
    prodigy_use_bias_correction: bool = key(True, kohya="false", only_with="optimizer_type=Prodigy")
    """Prodigy: bias correction."""
    prodigy_safeguard_warmup: bool = key(True, kohya="false", only_with="optimizer_type=Prodigy")
    """Prodigy: leave the warm-up out of the step size's denominator."""
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial",
        "cosine_with_min_lr", "warmup_stable_decay", "inverse_sqrt", "rex",
    ] = key("constant", rerun=True)  # fmt: skip
    """Course of the learning rate."""
    lr_scheduler_args: Arguments = key((), rerun=True)
    """Further arguments of the schedule, as "name=value"."""
    lr_warmup_steps: int | float = key(500, ge=0, kohya="0", rerun=True)
    """Steps over which the rate rises from 0; a number below 1 is a share of all steps. A run too short for the default
    takes a tenth of its steps. `constant` has no warm-up: use constant_with_warmup."""
    lr_decay_steps: int | float = key(0, ge=0, rerun=True, only_with="lr_scheduler=warmup_stable_decay")
    """warmup_stable_decay: steps of the fall at the end; below 1, a share of all steps."""
    lr_scheduler_num_cycles: int = key(
        1, ge=1, aliases=("lr_num_cycles",), rerun=True, only_with="lr_scheduler=cosine_with_restarts"
    )
    """cosine_with_restarts: number of cycles."""
    lr_scheduler_power: float = key(1.0, gt=0, aliases=("lr_power",), rerun=True, only_with="lr_scheduler=polynomial")
    """polynomial: power."""
    lr_scheduler_min_lr_ratio: float | None = key(
        None, ge=0, le=1, rerun=True, only_with="lr_scheduler=cosine_with_min_lr|warmup_stable_decay|rex"
    )
    """Lowest rate as a share of the highest."""
    lr_scheduler_timescale: int | None = key(None, ge=1, rerun=True, only_with="lr_scheduler=inverse_sqrt")
    """inverse_sqrt: time scale in steps; the warm-up's length, or 10000 without one, if not set."""
    scale_lr: bool = key(False, rerun=True)
    """Multiply the rates by accumulation x batch x processes."""
    max_grad_norm: float = key(1.0, ge=0, rerun=True)
    """Gradients are scaled down to this norm; 0 turns it off."""
    full_bf16: bool = key(False)
    """Keep the trained weights in bf16 and round stochastically, instead of fp32 master weights."""

    def problems(self, run: Run) -> Iterator[tuple[list[str], str]]:
        """A name that means no optimizer, arguments said twice, two kinds of half precision."""
        name = self.optimizer_type
        if name not in OPTIMIZERS and not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", name):
            near = difflib.get_close_matches(name.lower(), [known.lower() for known in OPTIMIZERS], n=1)
            meant = [known for known in OPTIMIZERS if known.lower() in near]
            yield (
                ["optimizer_type"],
                f"optimizer_type = {name} is not known.{f' Did you mean {meant[0]}?' if meant else ''} "
                f"Known: {', '.join(OPTIMIZERS)}; or the dotted path of a class, as torch.optim.NAdam.",
            )
        said = {text.partition("=")[0].strip() for text in self.optimizer_args}
        for argument, keys in _SAID_BY.items():
            both = [key for key in keys if self.changed(key)]
            if argument in said and both:
                yield ["optimizer_args", *both], f"{argument} in optimizer_args and {both[0]} say the same. Keep one."
        if self.full_bf16 and run.training.mixed_precision == "fp16":
            yield ["full_bf16", "mixed_precision"], "full_bf16 and mixed_precision = fp16 exclude each other."

    def cautions(self, run: Run) -> Iterator[tuple[list[str], str]]:
        """Schedules without a warm-up."""
        if self.lr_scheduler == "constant" and self.changed("lr_warmup_steps") and self.lr_warmup_steps:
            yield (
                ["lr_warmup_steps"],
                "lr_warmup_steps does nothing here: lr_scheduler = constant has no warm-up. Use constant_with_warmup.",
            )
