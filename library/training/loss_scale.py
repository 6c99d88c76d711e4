"""Loss scaling for fp16: gradients too small for fp16 are lifted into its range and brought back before the step."""

from dataclasses import dataclass

GROWTH_INTERVAL = 2000
START = 65536.0


@dataclass
class LossScale:
    """The present scale. It halves after an overflow and doubles after 2000 good steps, as torch's GradScaler does.

    acts: whether there is scaling at all. The scale never falls below 1.
    """

    value: float = 1.0
    good_steps: int = 0
    acts: bool = False

    @classmethod
    def for_precision(cls, mixed_precision: str) -> "LossScale":
        """Only fp16 needs scaling; 1 otherwise, and for good."""
        return cls(START, acts=True) if mixed_precision == "fp16" else cls()

    @property
    def can_fall(self) -> bool:
        """Whether an overflow may be the scale's fault rather than the run's."""
        return self.acts and self.value > 1.0

    def after(self, finite: bool) -> None:
        """Take note of a step."""
        if not self.acts:
            return
        if not finite:
            self.value, self.good_steps = max(1.0, self.value / 2), 0
            return
        self.good_steps += 1
        if self.good_steps == GROWTH_INTERVAL:
            self.value, self.good_steps = self.value * 2, 0
