"""How the weights move: optimizer, learning rates, schedule."""

from __future__ import annotations

from typing import ClassVar, Literal

from library.config.table import Strings, Table, key


class OptimizerTable(Table):
    """Optimizer, learning rates and their schedule."""

    section: ClassVar[str] = "optimizer"
    reads: ClassVar[str] = "train"

    optimizer_type: str = key("AdamW", aliases=("optimizer",))
    """AdamW, AdamW8bit, PagedAdamW8bit, Prodigy, Adafactor, Lion, AdamWScheduleFree, or the dotted path of a
    subclass of torch.optim.Optimizer."""
    optimizer_args: Strings = key(())
    """Arguments of the optimizer, as "name=value"."""
    learning_rate: float = key(1e-4, ge=0, kohya="2e-6", rerun=True)
    """Learning rate of the network."""
    unet_lr: float | None = key(None, ge=0, rerun=True)
    """Learning rate of the network on the transformer; learning_rate if not set."""
    x_embedder_lr: float | None = key(None, ge=0, rerun=True)
    """Learning rate of x_embedder; learning_rate if not set."""
    text_encoder_lr: float = key(5e-6, ge=0, kohya="learning_rate", rerun=True)
    """Learning rate of the network on CLIP-L."""
    loraplus_lr_ratio: float | None = key(None, gt=0)
    """LoRA+: the up-projection learns this many times faster."""
    adam_beta1: float = key(0.9, ge=0, lt=1)
    """First beta of AdamW, AdamW8bit, PagedAdamW8bit and Prodigy."""
    adam_beta2: float = key(0.999, ge=0, lt=1)
    """Second beta of the same."""
    adam_epsilon: float = key(1e-8, gt=0)
    """Epsilon of the same."""
    adam_weight_decay: float = key(1e-4, ge=0, kohya="0.01")
    """Weight decay of the same."""
    adam_weight_decay_text_encoder: float = key(1e-3, ge=0, kohya="0.01")
    """Weight decay of the network on CLIP-L."""
    prodigy_beta3: float | None = key(None, ge=0, lt=1)
    """Prodigy: coefficient of the running step size; the square root of beta2 if not set."""
    prodigy_decouple: bool = key(True)
    """Prodigy: weight decay as in AdamW."""
    prodigy_use_bias_correction: bool = key(True, kohya="false")
    """Prodigy: bias correction."""
    prodigy_safeguard_warmup: bool = key(True, kohya="false")
    """Prodigy: leave the warm-up out of the step size's denominator."""
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial",
        "cosine_with_min_lr", "warmup_stable_decay", "inverse_sqrt", "rex",
    ] = key("constant", rerun=True)  # fmt: skip
    """Course of the learning rate."""
    lr_scheduler_args: Strings = key((), rerun=True)
    """Further arguments of the schedule, as "name=value"."""
    lr_warmup_steps: int | float = key(500, ge=0, kohya="0", rerun=True)
    """Steps over which the rate rises from 0; a number below 1 is a share of all steps. `constant` has no warm-up:
    use constant_with_warmup."""
    lr_decay_steps: int | float = key(0, ge=0, rerun=True)
    """warmup_stable_decay: steps of the fall at the end; below 1, a share of all steps."""
    lr_scheduler_num_cycles: int = key(1, ge=1, aliases=("lr_num_cycles",), rerun=True)
    """cosine_with_restarts: number of cycles."""
    lr_scheduler_power: float = key(1.0, gt=0, aliases=("lr_power",), rerun=True)
    """polynomial: power."""
    lr_scheduler_min_lr_ratio: float | None = key(None, ge=0, le=1, rerun=True)
    """Lowest rate as a share of the highest."""
    lr_scheduler_timescale: int | None = key(None, ge=1, rerun=True)
    """inverse_sqrt: time scale in steps; the warm-up's length, or 10000 without one, if not set."""
    scale_lr: bool = key(False, rerun=True)
    """Multiply the rates by accumulation x batch x processes."""
    max_grad_norm: float = key(1.0, ge=0, rerun=True)
    """Gradients are scaled down to this norm; 0 turns it off."""
    full_bf16: bool = key(False)
    """Keep the trained weights in bf16 and round stochastically, instead of fp32 master weights."""
