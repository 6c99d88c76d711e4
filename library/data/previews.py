"""The conditions of previews, planned like items: the caching command encodes them, the trainer never needs the files.

No torch here; the pixels are made in previews' own function of library.data.pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from library.conditioning import MODES, ModeSettings
from library.config.tables import DatasetTable, SubsetTable
from library.data.buckets import ALIGNMENT, Bucketing
from library.data.geometry import WHOLE, Geometry, crop_box, same_aspect
from library.data.images import BadImage
from library.data.ledger import Known, Ledger
from library.data.pairs import LEFT, Picture
from library.data.prompts import PreviewRequest
from library.data.recipe import FORMAT, ImageEncoding, digest
from library.data.records import FileBlob
from library.data.report import Report

WHITE = "#ffffff"
JOINED_TOLERANCE = 0.01  # of the canvas's aspect: its sides were rounded to a bucket's


@dataclass(frozen=True)
class PlannedPreview:
    """One preview with everything that decides its condition. image None: painted from nothing but the prompt.

    background, inverted: what is behind a transparent image, and whether black is repainted, as in the data.
    """

    fingerprint: str
    request: PreviewRequest
    mode: str
    settings: ModeSettings
    geometry: Geometry
    image: Picture | None
    mask: Picture | None
    max_pixels: int
    background: str
    inverted: bool

    @property
    def pictures(self) -> list[Picture]:
        """The files it is made from."""
        return [picture for picture in (self.image, self.mask) if picture is not None]

    @property
    def texts(self) -> list[str]:
        """The prompts to encode."""
        return [text for text in (self.request.prompt, self.request.negative) if text is not None]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of what the model sees."""
        return MODES[self.mode].canvas(self.geometry.width, self.geometry.height)


def plan_previews(
    requests: tuple[PreviewRequest, ...],
    datasets: tuple[DatasetTable, ...],
    bucketing: Bucketing,
    encoding: ImageEncoding,
    ledger: Ledger,
    max_pixels: int,
    first: Mapping[str, Picture],
    report: Report,
) -> tuple[PlannedPreview, ...]:
    """Check every preview; what cannot be made is reported.

    first: the first item's source of each mode, which a preview without an image of its own starts from.
    """
    files = [path for request in requests for path in _paths(request).values()]
    known = ledger.look([FileBlob(path, path.parent) for path in files], max_pixels)
    found = []
    for number, request in enumerate(requests, start=1):
        name = f"preview {number} ({request.prompt[:40]})"
        pictures = {role: _picture(path, known, name, report) for role, path in _paths(request).items()}
        mode, like = _mode(request, datasets)
        if "mask" in pictures and mode in MODES and "mask" not in MODES[mode].takes:
            report.notice(f"{name}: its mask does nothing here: mode {mode} makes its own")
            del pictures["mask"]
        if request.from_data and mode in MODES and "mask" not in MODES[mode].needs:
            if mode not in first and mode == like.mode and report.problems:
                continue  # its image is among what is bad
            pictures |= {"image": first[mode]} if mode in first else {}
        reason = _unfit(mode, request, pictures)
        if reason is not None:
            report.bad(name, reason, skippable=False)
        elif None not in pictures.values():
            found.append(_planned(request, mode, like, bucketing, encoding, pictures, max_pixels))
    return tuple(found)


def _paths(request: PreviewRequest) -> dict:
    return {role: path for role, path in (("image", request.image), ("mask", request.mask)) if path is not None}


def _picture(path, known: dict[str, Known | BadImage], name: str, report: Report) -> Picture | None:
    found = known[str(path)]
    if isinstance(found, BadImage):
        report.bad(f"{name}, {path.name}", str(found), skippable=False)
        return None
    return Picture(FileBlob(path, path.parent), found)


def _mode(request: PreviewRequest, datasets: tuple[DatasetTable, ...]) -> tuple[str, SubsetTable]:
    """The mode a preview asks for, or the data's, and the first subset that trains it (any, if none does). Of several
    modes, a preview with a mask takes `mask`, or another one that takes masks."""
    subsets = [subset for dataset in datasets for subset in dataset.subsets]
    trained = list(dict.fromkeys(subset.mode for subset in subsets))
    mode = request.mode
    if mode is None:
        masked = sorted((one for one in trained if "mask" in MODES[one].takes), key=lambda one: one != "mask")
        mode = masked[0] if request.mask is not None and masked else trained[0]
    return mode, next((subset for subset in subsets if subset.mode == mode), subsets[0])


def _unfit(mode: str, request: PreviewRequest, pictures: dict[str, Picture | None]) -> str | None:
    if mode not in MODES:
        return f"--mode {mode} is unknown; there are {', '.join(MODES)}"
    needs_mask = "mask" in MODES[mode].needs
    if "image" not in pictures and not needs_mask:
        return f"mode {mode} needs a condition image: add --ci PATH"
    if request.image is None and "mask" in pictures:
        return "--mask without --ci: add the image it belongs to"
    if request.image is not None and request.mask is None and needs_mask:
        return f"mode {mode} needs a mask: add --mask PATH"
    image, mask = pictures.get("image"), pictures.get("mask")
    if image is not None and mask is not None and not same_aspect(image.size, mask.size):
        return f"the mask is {mask.size[0]:g}x{mask.size[1]:g}, its image {image.size[0]:g}x{image.size[1]:g}"
    return None


def _planned(
    request: PreviewRequest,
    mode: str,
    like: SubsetTable,
    bucketing: Bucketing,
    encoding: ImageEncoding,
    pictures: dict[str, Picture | None],
    max_pixels: int,
) -> PlannedPreview:
    image = pictures.get("image")
    mask = pictures.get("mask") if "mask" in MODES[mode].takes else None
    bucket = _size(request, mode, image, bucketing)
    if image is not None and image.region == WHOLE and MODES[mode].pictures_across == 2:
        image = _left_of_joined(image, bucket)
    size = image.size if image is not None else bucket
    geometry = Geometry(*bucket, crop_box(size, bucket, (0.5, 0.5), unscaled=False))
    settings = ModeSettings(like.edit_mask_value if like.mode == mode else 1.0, mask_only_right=True)
    background = like.background_color if image is not None and image.facts.opaque < 1 else WHITE
    inverted = like.invert_mask and mask is not None
    content = {
        "format": FORMAT,
        "kind": "preview",
        "mode": mode,
        "settings": asdict(settings),
        "image": image and image.identity,
        "mask": mask and mask.identity,
        "geometry": asdict(geometry),
        **({"background": background} if background != WHITE else {}),
        **({"invert": True} if inverted else {}),
        **asdict(encoding),
    }
    return PlannedPreview(
        digest(content), request, mode, settings, geometry, image, mask, max_pixels, background, inverted
    )


def _left_of_joined(image: Picture, bucket: tuple[int, int]) -> Picture:
    """The source's half of a picture that has the shape of the whole canvas; any other picture as it is."""
    width, height = image.size
    is_joined = abs(width * bucket[1] / (height * 2 * bucket[0]) - 1) <= JOINED_TOLERANCE
    return Picture(image.blob, image.known, LEFT) if is_joined else image


def _size(request: PreviewRequest, mode: str, image: Picture | None, bucketing: Bucketing) -> tuple[int, int]:
    """The picture's size: as asked, one side completed by the image's aspect; else as the data set would take it.

    A width that is asked for is that of the whole canvas, as InFluxEdit's validation_width is.
    """
    width, height = request.width, request.height
    if width is not None:
        width = max(ALIGNMENT, width // MODES[mode].pictures_across)
    if width is None and height is None:
        return bucketing.size if image is None else bucketing.choose(*image.size)
    aspect = 1.0 if image is None else image.size[0] / image.size[1]
    sides = (width or height * aspect, height or width / aspect)
    return tuple(max(ALIGNMENT, round(side / ALIGNMENT) * ALIGNMENT) for side in sides)
