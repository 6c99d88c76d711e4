"""How far a run has come: the counters that a state folder keeps and a continued run starts from."""

from dataclasses import asdict, dataclass


@dataclass
class Progress:
    """Counters at the end of an optimizer step.

    step: optimizer steps done, skipped ones included. epoch: whole passes over the data.
    position: micro-steps done in the present epoch. micro_step: micro-steps done in the whole run; keys the draws.
    group_size: items that one micro-step spans over all processes, which the order of an epoch depends on.
    skipped, skipped_in_row: steps that were left out because a gradient was not finite.
    overflows: steps that were left out because the loss scale of fp16 was too large; each one lowers it.
    """

    step: int = 0
    epoch: int = 0
    position: int = 0
    micro_step: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    overflows: int = 0
    best: float | None = None
    measured_without_gain: int = 0

    def as_json(self) -> dict[str, object]:
        """The counters for a state folder."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict) -> "Progress":
        """The inverse of `as_json`."""
        return cls(**values)
