"""What may be found in a data set, in the order of how much it spoils, and what to do about each."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Kind:
    """A kind of finding. title: a few words; advice: what it does to a training and how to mend it."""

    title: str
    advice: str


KINDS: dict[str, Kind] = {
    "identical": Kind(
        "source and target are the same", "nothing to learn from it; look whether both folders hold the same files"
    ),
    "shifted": Kind(
        "target is shifted against its source", "the model learns to move pictures; export both with one size and crop"
    ),
    "mask_misses_change": Kind(
        "change outside the mask", "the model must change what it is told to keep; grow the mask or mend the pair"
    ),
    "constant_mask": Kind(
        "mask of one value", "the model is not told where to paint; look at the mask file, and at its alpha channel"
    ),
    "duplicate": Kind("same pictures as another item", "they count twice; remove one, or use num_repeats"),
    "cropped": Kind(
        "much is cropped away", "the model sees a part of the picture; enable_bucket, or a wider range of buckets"
    ),
    "enlarged": Kind(
        "enlarged far beyond its own pixels",
        "the model learns blur; lower the resolution, set bucket_no_upscale, or find a larger picture",
    ),
    "long_caption": Kind(
        "caption longer than T5 reads", "its end is not seen; shorten it or raise t5xxl_max_token_length"
    ),
}


@dataclass(frozen=True)
class Finding:
    """One thing found about one item. values: the numbers behind the message, for programs."""

    item: str
    kind: str
    message: str
    values: dict[str, float | str | list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.kind in KINDS, self.kind
