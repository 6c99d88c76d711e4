"""Learning rate over a run: a factor on the base rate for every optimizer step, a pure function of the step number.

Warm-up comes first, then the named curve over what is left. Because the factor depends on nothing but the step, a
resumed run needs no scheduler state, and several processes cannot disagree. Needs no torch.
"""

import math
from dataclasses import dataclass, replace

from library.config.tables import OptimizerTable
from library.errors import ConfigError

SCHEDULES = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "cosine_with_min_lr",
    "warmup_stable_decay",
    "inverse_sqrt",
    "rex",
)
_POLYNOMIAL_END = 1e-7  # the learning rate that diffusers' polynomial schedule ends at
_RANGES = {
    "num_cycles": (1, math.inf), "power": (1e-6, math.inf), "min_lr_ratio": (0, 1), "timescale": (1, math.inf),
}  # fmt: skip


@dataclass(frozen=True)
class Schedule:
    """A curve with all it depends on. Counts are in optimizer steps.

    `min_ratio`: the lowest factor of cosine_with_min_lr, warmup_stable_decay and rex. `end_ratio`: polynomial's last.
    """

    name: str
    num_steps: int
    warmup_steps: int = 0
    decay_steps: int = 0
    num_cycles: int = 1
    power: float = 1.0
    min_ratio: float = 0.0
    end_ratio: float = 0.0
    timescale: int | None = None

    def factor(self, step: int) -> float:
        """The factor for the optimizer step with index `step` (0 is the first)."""
        warmup = 0 if self.name == "constant" else self.warmup_steps
        if step < warmup:
            return step / warmup
        left = max(1, self.num_steps - warmup)
        return _CURVES[self.name](self, min(step - warmup, left), left)


def build(
    name: str,
    num_steps: int,
    warmup: int | float = 0,
    decay: int | float = 0,
    num_cycles: int = 1,
    power: float = 1.0,
    min_ratio: float = 0.0,
    end_ratio: float = 0.0,
    timescale: int | None = None,
) -> Schedule:
    """A checked schedule; `warmup` and `decay` below 1 are fractions of `num_steps`."""
    if name not in SCHEDULES:
        raise ConfigError(f"lr_scheduler = {name!r} is not known. Known: {', '.join(SCHEDULES)}")
    warmup_steps, decay_steps = steps_of(warmup, num_steps), steps_of(decay, num_steps)
    if name == "warmup_stable_decay" and not decay_steps:
        decay_steps = max(1, num_steps // 10)
    if warmup_steps + decay_steps > num_steps and name != "constant":
        raise ConfigError(
            f"lr_warmup_steps ({warmup_steps}) and lr_decay_steps ({decay_steps}) are more than the run's {num_steps} "
            "steps; shorten them or train longer"
        )
    return Schedule(name, num_steps, warmup_steps, decay_steps, num_cycles, power, min_ratio, end_ratio, timescale)


def of_table(table: OptimizerTable, steps: int) -> Schedule:
    """The learning rate's course."""
    extra = schedule_arguments(table)
    warmup = table.lr_warmup_steps if table.changed("lr_warmup_steps") else min(table.lr_warmup_steps, steps // 10)
    schedule = build(
        table.lr_scheduler,
        steps,
        warmup,
        table.lr_decay_steps,
        table.lr_scheduler_num_cycles,
        table.lr_scheduler_power,
        table.lr_scheduler_min_lr_ratio or 0.0,
        min(1.0, _POLYNOMIAL_END / table.learning_rate) if table.learning_rate else 0.0,
        table.lr_scheduler_timescale,
    )
    return replace(schedule, **extra)


def schedule_arguments(table: OptimizerTable) -> dict[str, float]:
    """`lr_scheduler_args` as fields of a schedule, within the ranges that the keys of these names have."""
    known = {"num_cycles": int, "power": float, "min_lr_ratio": float, "timescale": int}
    names = {"min_lr_ratio": "min_ratio"}
    found = {}
    for pair in table.lr_scheduler_args:
        name, _, value = pair.partition("=")
        if name.strip() not in known:
            raise ConfigError(f"lr_scheduler_args: {name.strip()!r} is not known. Known: {', '.join(known)}")
        try:
            found[names.get(name.strip(), name.strip())] = known[name.strip()](value.strip())
        except ValueError as error:
            raise ConfigError(f"lr_scheduler_args: {pair!r}: {error}") from error
        lowest, highest = _RANGES[name.strip()]
        if not lowest <= found[names.get(name.strip(), name.strip())] <= highest:
            raise ConfigError(
                f"lr_scheduler_args: {pair!r}: {name.strip()} is at least {lowest:g}, at most {highest:g}"
            )
    return found


def steps_of(amount: int | float, num_steps: int) -> int:
    """A number of steps, or a fraction below 1 of `num_steps`."""
    return round(amount * num_steps) if 0 < amount < 1 else int(amount)


def _constant(schedule: Schedule, step: int, left: int) -> float:
    return 1.0


def _linear(schedule: Schedule, step: int, left: int) -> float:
    return 1 - step / left


def _cosine(schedule: Schedule, step: int, left: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * step / left))


def _restarts(schedule: Schedule, step: int, left: int) -> float:
    progress = step / left
    if progress >= 1:
        return 0.0
    return 0.5 * (1 + math.cos(math.pi * ((schedule.num_cycles * progress) % 1)))


def _polynomial(schedule: Schedule, step: int, left: int) -> float:
    return schedule.end_ratio + (1 - schedule.end_ratio) * (1 - step / left) ** schedule.power


def _cosine_with_floor(schedule: Schedule, step: int, left: int) -> float:
    return schedule.min_ratio + (1 - schedule.min_ratio) * _cosine(schedule, step, left)


def _stable_then_decay(schedule: Schedule, step: int, left: int) -> float:
    stable = left - schedule.decay_steps
    if step < stable:
        return 1.0
    return schedule.min_ratio + (1 - schedule.min_ratio) * (1 - (step - stable) / schedule.decay_steps)


def _inverse_sqrt(schedule: Schedule, step: int, left: int) -> float:
    scale = schedule.timescale or schedule.warmup_steps or 10_000
    return (1 + step / scale) ** -0.5


def _rex(schedule: Schedule, step: int, left: int) -> float:
    """Reflected exponential, Chen et al. 2021 (arXiv 2107.04197): (1 - p) / (1/2 + (1 - p) / 2)."""
    remaining = 1 - step / left
    return schedule.min_ratio + (1 - schedule.min_ratio) * remaining / (0.5 + 0.5 * remaining)


_CURVES = {
    "constant": _constant,
    "constant_with_warmup": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _restarts,
    "polynomial": _polynomial,
    "cosine_with_min_lr": _cosine_with_floor,
    "warmup_stable_decay": _stable_then_decay,
    "inverse_sqrt": _inverse_sqrt,
    "rex": _rex,
}
