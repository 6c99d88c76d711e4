"""What a run will need and take, said before it starts; and the memory settings chosen for a VRAM budget.

Reading order: work (what the configuration asks for, at its worst), choice (settings for a budget), lines (the words
of `--dry_run`). Works from the configuration and headers alone: no torch, no weights. Every time is an estimate from
the card's peak figures, and says so.
"""

from library.forecast.choice import settle, settle_encoders, settle_painting, this_card
from library.forecast.lines import caching_lines, inference_lines, training_lines
from library.forecast.work import PRECISION_NAMES, largest_bucket, painting_of, preview_picture, work_of

__all__ = [
    "PRECISION_NAMES",
    "caching_lines",
    "inference_lines",
    "largest_bucket",
    "painting_of",
    "preview_picture",
    "settle",
    "settle_encoders",
    "settle_painting",
    "this_card",
    "training_lines",
    "work_of",
]
