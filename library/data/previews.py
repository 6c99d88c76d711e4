"""The conditions of previews, planned like items: the caching command encodes them, the trainer never needs the files.

No torch here; the pixels are made in previews' own function of library.data.pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from library.conditioning import MODES, ModeSettings
from library.config.tables import DatasetTable
from library.data.buckets import ALIGNMENT, Bucketing
from library.data.geometry import WHOLE, Geometry, crop_box, same_aspect
from library.data.images import BadImage
from library.data.ledger import Known, Ledger
from library.data.pairs import LEFT, Picture
from library.data.prompts import PreviewRequest
from library.data.recipe import FORMAT, ImageEncoding, digest
from library.data.records import FileBlob
from library.data.report import Report

JOINED_TOLERANCE = 0.01  # of the canvas's aspect: its sides were rounded to a bucket's


@dataclass(frozen=True)
class PlannedPreview:
    """One preview with everything that decides its condition. image None: painted from nothing but the prompt."""

    fingerprint: str
    request: PreviewRequest
    mode: str
    settings: ModeSettings
    geometry: Geometry
    image: Picture | None
    mask: Picture | None
    max_pixels: int

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
    first: Mapping[str, Picture] | None = None,
) -> tuple[PlannedPreview, ...]:
    """Check every preview. Raises DataError listing all that cannot be made.

    first: the first item's source of each mode, which a preview without an image of its own starts from.
    """
    report = Report()
    files = [path for request in requests for path in (request.image, request.mask) if path is not None]
    known = ledger.look([FileBlob(path, path.parent) for path in files], max_pixels)
    found = []
    for number, request in enumerate(requests, start=1):
        name = f"preview {number} ({request.prompt[:40]})"
        pictures = {role: _picture(path, known, name, report) for role, path in _paths(request).items()}
        mode, settings = _mode(request, datasets)
        if request.from_data and first and mode in first and "mask" not in MODES[mode].needs:
            pictures["image"] = first[mode]
        reason = _unfit(mode, request, pictures)
        if reason is not None:
            report.bad(name, reason)
        elif len(pictures) == sum(picture is not None for picture in pictures.values()):
            found.append(_planned(request, mode, settings, bucketing, encoding, pictures, max_pixels))
    report.stop_if_bad(False)
    return tuple(found)


def _paths(request: PreviewRequest) -> dict:
    return {role: path for role, path in (("image", request.image), ("mask", request.mask)) if path is not None}


def _picture(path, known: dict[str, Known | BadImage], name: str, report: Report) -> Picture | None:
    found = known[str(path)]
    if isinstance(found, BadImage):
        report.bad(f"{name}, {path.name}", str(found))
        return None
    return Picture(FileBlob(path, path.parent), found)


def _mode(request: PreviewRequest, datasets: tuple[DatasetTable, ...]) -> tuple[str, ModeSettings]:
    """The mode a preview asks for, or the data's; of several, `mask` for a preview with a mask, else the first."""
    subsets = [subset for dataset in datasets for subset in dataset.subsets]
    trained = list(dict.fromkeys(subset.mode for subset in subsets))
    mode = request.mode
    if mode is None:
        mode = "mask" if request.mask is not None and "mask" in trained and len(trained) > 1 else trained[0]
    values = next((subset.edit_mask_value for subset in subsets if subset.mode == mode), 1.0)
    return mode, ModeSettings(edit_mask_value=values, mask_only_right=True)


def _unfit(mode: str, request: PreviewRequest, pictures: dict[str, Picture | None]) -> str | None:
    if mode not in MODES:
        return f"--mode {mode} is unknown; there are {', '.join(MODES)}"
    needs_mask = "mask" in MODES[mode].needs
    if "image" not in pictures and not needs_mask:
        return f"mode {mode} needs a condition image: add --ci PATH"
    if request.image is None and request.mask is not None:
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
    settings: ModeSettings,
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
    content = {
        "format": FORMAT,
        "kind": "preview",
        "mode": mode,
        "settings": asdict(settings),
        "image": image and image.identity,
        "mask": mask and mask.identity,
        "geometry": asdict(geometry),
        **asdict(encoding),
    }
    return PlannedPreview(digest(content), request, mode, settings, geometry, image, mask, max_pixels)


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
