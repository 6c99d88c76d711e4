"""What one cache entry is made of, and the fingerprint that covers all of it.

Two recipes with one fingerprint give the same bytes; anything that could change a byte is in it, nothing else is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256

from library.conditioning import MODES, Mode, ModeSettings
from library.data.geometry import Geometry, same_aspect
from library.data.masks import MaskSettings
from library.data.pairs import Pair, Picture

FORMAT = 1  # raised when the same recipe gives other bytes than before


@dataclass(frozen=True)
class ImageEncoding:
    """How pixels become latents. vae: identity of its files. tiling: side of the tiles, False without."""

    vae: str
    dtype: str = "fp32"
    tiling: int = False
    latents_as: str = "distribution"


@dataclass(frozen=True)
class TextEncoding:
    """How captions become embeddings. encoders: identity of their files."""

    encoders: str
    length: int = 512
    precision: str = "bf16"

    def fingerprint(self, caption: str) -> str:
        """The name of a caption's text entry."""
        return digest({"format": FORMAT, "kind": "text", "caption": caption, **asdict(self)})


@dataclass(frozen=True)
class Look:
    """How a subset's pictures are brought to one size."""

    mode: str
    settings: ModeSettings
    masks: MaskSettings
    mismatch: str
    background: str
    interpolation: str | None
    max_pixels: int


@dataclass(frozen=True)
class Recipe:
    """One entry: an item at one size, one crop, mirrored or not, with all its condition variants."""

    fingerprint: str
    pair: Pair
    look: Look
    geometry: Geometry
    encoding: ImageEncoding

    @property
    def mode(self) -> Mode:
        """How the item conditions the model."""
        return MODES[self.look.mode]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of what the model sees."""
        return self.mode.canvas(self.geometry.width, self.geometry.height)

    @property
    def crop_share(self) -> float:
        """Share of the picture's area that is cut off."""
        left, top, right, bottom = self.geometry.box
        return 1 - (right - left) * (bottom - top)

    @property
    def enlargement(self) -> float:
        """Scale from the file's pixels to the cached ones; above 1 is enlarged."""
        left, _, right, _ = self.geometry.box
        return self.geometry.width / (self.pair.frame[0] * (right - left))

    @property
    def num_masks(self) -> int:
        """How many condition variants it has, at most."""
        if "mask" not in self.mode.takes:
            return 1 if self.look.settings.mask_only_right else 2
        if self.pair.mask is None and not self.look.masks.kinds:
            return 1
        return self.look.masks.count(drawn=self.pair.mask is None)

    @property
    def content(self) -> dict:
        """What the fingerprint covers; travels with the entry, so that a stale one can say why."""
        return _content(self.pair, self.look, self.geometry, self.encoding)


def make_recipe(pair: Pair, look: Look, geometry: Geometry, encoding: ImageEncoding) -> Recipe:
    """The recipe of a checked pair; its fingerprint holds only what acts on it."""
    return Recipe(digest(_content(pair, look, geometry, encoding)), pair, look, geometry, encoding)


def _content(pair: Pair, look: Look, geometry: Geometry, encoding: ImageEncoding) -> dict:
    mode = MODES[look.mode]
    masked = "mask" in mode.takes and (pair.mask is not None or bool(look.masks.kinds))
    return {
        "format": FORMAT,
        "kind": "image",
        "mode": mode.name,
        "settings": {} if masked else {name: getattr(look.settings, name) for name in sorted(mode.settings)},
        "source": pair.source.identity,
        "target": pair.target and pair.target.identity,
        "mask": _mask_identity(pair, look) if masked else None,
        "geometry": asdict(geometry),
        "interpolation": look.interpolation,
        **_conditional(pair, look),
        **asdict(encoding),
    }


def _mask_identity(pair: Pair, look: Look) -> dict:
    masks = look.masks
    identity: dict = {"with_full": masks.with_full, "dilation": masks.dilation, "jitter": masks.jitter}
    if masks.jitter or pair.mask is None:
        identity |= {"seed": masks.seed, "variants": masks.variants}
    if pair.mask is None:
        return identity | {"kinds": list(masks.kinds)}
    return identity | {"invert": masks.invert, "file": pair.mask.identity, "alpha": pair.mask is pair.source}


def _conditional(pair: Pair, look: Look) -> dict:
    """Settings that act on some pictures only: the background of transparent ones, how another aspect is fitted."""
    found = {}
    pictures: list[Picture] = [picture for picture in (pair.source, pair.target) if picture is not None]
    misfit = not same_aspect(pair.source.size, pair.frame)
    if misfit:
        found["mismatch"] = look.mismatch
    if any(picture.facts.opaque < 1 for picture in pictures) or (misfit and look.mismatch == "pad"):
        found["background"] = look.background
    return found


def digest(content: Mapping) -> str:
    """32 hex digits of a canonical spelling of ``content``."""
    spelled = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return sha256(spelled.encode("utf-8", "surrogateescape")).hexdigest()[:32]
