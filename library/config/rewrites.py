"""Keys of InFluxEdit and of kohya that are no second name for one key but another way of saying something.

A rewrite turns what was written into keys of InFlux; a spelling turns another form of a value into ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from library.config.given import Given


@dataclass(frozen=True)
class Rewrite:
    """A way of saying something with other keys. `replaces`: values (lower case) that give way to it."""

    keys: tuple[str, ...]
    kind: str
    default: str
    documentation: str
    apply: Callable[[Given], list[Given]]
    replaces: tuple[str, ...] = ()


def _checkpointing_steps(given: Given) -> list[Given]:
    return [given.renamed("save_every_n_steps", given.value), given.renamed("save_state", True)]


def _use_8bit_adam(given: Given) -> list[Given]:
    return [given.renamed("optimizer_type", "AdamW8bit")] if given.value else []


def _center_crop(given: Given) -> list[Given]:
    return [given.renamed("random_crop", not given.value)]


def _use_split_mask(given: Given) -> list[Given]:
    return [given.renamed("mode", "spatial")] if given.value else []


def _fp8_base(given: Given) -> list[Given]:
    return [given.renamed("base_precision", "fp8")] if given.value else []


REWRITES: dict[str, Rewrite] = {
    "checkpointing_steps": Rewrite(
        keys=("save_every_n_steps", "save_state"),
        kind="int",
        default="500",
        documentation="Save the network and the state every N steps.",
        apply=_checkpointing_steps,
    ),
    "use_8bit_adam": Rewrite(
        keys=("optimizer_type",),
        kind="bool",
        default="false",
        documentation="optimizer_type = AdamW8bit. With an optimizer other than AdamW it is an error.",
        apply=_use_8bit_adam,
        replaces=("adamw", "adamw8bit"),
    ),
    "center_crop": Rewrite(
        keys=("random_crop",),
        kind="bool",
        default="true",
        documentation="true crops the centre, which is the default; false means random_crop = true.",
        apply=_center_crop,
    ),
    "use_split_mask": Rewrite(
        keys=("mode",),
        kind="bool",
        default="false",
        documentation="mode = spatial, on images already joined (with target_dir: joined here). Not with edit.",
        apply=_use_split_mask,
        replaces=("mask", "spatial"),
    ),
    "fp8_base": Rewrite(
        keys=("base_precision",), kind="bool", default="false", documentation="base_precision = fp8.", apply=_fp8_base
    ),
    "fp8_base_unet": Rewrite(
        keys=("base_precision",), kind="bool", default="false", documentation="base_precision = fp8.", apply=_fp8_base
    ),
}

EXCLUSIVE = (
    ("resolution", "resolutions"),
    ("guidance_scale", "guidance_scale_range"),
    ("num_repeats", "subset_weight"),
    ("image_dir", "dataset_name"),
    ("prompt", "prompt_dir"),
)
"""Keys that say one thing in two ways: both in one place and different is an error; a nearer place drops the other."""


def _resolution(given: Given) -> Given:
    """InFluxEdit's "704,1024" is a list of sizes; kohya's "768,512" too, so that one string has one meaning."""
    if not isinstance(given.value, str) or "," not in given.value:
        return given
    parts = [part.strip() for part in given.value.split(",")]
    return given.renamed("resolutions", [int(part) if part.isdecimal() else part for part in parts])


def _resolutions(given: Given) -> Given:
    if isinstance(given.value, str):
        parts = [part.strip() for part in given.value.replace(";", ",").split(",")]
        return replace(given, value=[int(part) if part.isdecimal() else part for part in parts])
    return replace(given, value=[given.value]) if isinstance(given.value, int) else given


def _words(**other: str) -> Callable[[Given], Given]:
    def spell(given: Given) -> Given:
        word = str(given.value).lower()
        return replace(given, value=other[word]) if word in other else given

    return spell


SPELLINGS: dict[str, Callable[[Given], Given]] = {
    "resolution": _resolution,
    "resolutions": _resolutions,
    "mode": _words(fill="mask"),
    "inference_mode": _words(fill="mask"),
    "masked_loss": _words(true="mask", false="none"),
    "weighting_scheme": _words(uniform="none"),
}
"""Canonical key -> how other forms of its value are written here."""
