"""Image files, opened as a person would see them: upright, in sRGB, eight bits, on a chosen background.

Every picture and mask of InFlux passes through here, so that a pair cannot be treated in two ways. Nothing is repaired:
a file that does not decode whole is refused with its reason.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageCms, ImageColor, ImageOps, UnidentifiedImageError

from library.errors import DataError

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".gif"})
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "AVIF", "GIF")  # an EPS named .png must not run a PostScript
SMALLEST_SIDE = 16
MASK_THRESHOLD = 128  # of 255, after resizing: 127 is kept, 128 is repainted
_SIXTEEN_BIT = 65535
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    NotImplementedError,
    AttributeError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip  (what Pillow's readers raise on damaged files)
_ORIENTATION = 0x0112


class BadImage(DataError):
    """A file that cannot serve as a picture; the message is the reason, without the file's name."""


@dataclass(frozen=True)
class ImageFacts:
    """What a full decode of a file showed. Kept in the cache, so that an unchanged file is never decoded for it again.

    width, height: after EXIF rotation. white, opaque: shares of pixels at or above the mask threshold (grey, alpha).
    notices: what was done to it that its owner may not expect.
    """

    width: int
    height: int
    has_alpha: bool
    white: float
    opaque: float
    notices: tuple[str, ...] = ()


def inspect(data: bytes, max_pixels: int) -> ImageFacts:
    """Decode ``data`` whole and report on it. Raises BadImage with the reason."""
    with _opened(data, max_pixels) as image:
        if image.format == "PNG":
            _check_png(data)
        notices = _notices(image)
        upright = _decoded(image)
        grey = np.asarray(_grey(upright))
        alpha = _alpha(upright)
        if min(upright.size) < SMALLEST_SIDE:
            raise BadImage(f"only {upright.width}x{upright.height} pixels: at least {SMALLEST_SIDE} a side are needed")
        opaque = 1.0 if alpha is None else float((np.asarray(alpha) >= MASK_THRESHOLD).mean())
        white = float((grey >= MASK_THRESHOLD).mean())
        if alpha is not None and opaque < 1:
            notices.append("has transparent parts")
        return ImageFacts(*upright.size, alpha is not None, white, opaque, tuple(notices))


def read_rgb(data: bytes, max_pixels: int, background: str | None) -> Image.Image:
    """The picture in sRGB over ``background`` (any CSS colour); None keeps the colours hidden under transparency."""
    with _opened(data, max_pixels) as image:
        upright = _decoded(image)
        colours = _srgb(upright, image.info.get("icc_profile"))
        alpha = _alpha(upright)
        if alpha is None or background is None:
            return colours
        canvas = Image.new("RGB", colours.size, ImageColor.getrgb(background)[:3])
        canvas.paste(colours, mask=alpha)
        return canvas


def read_mask(data: bytes, max_pixels: int) -> Image.Image:
    """A mask file as grey levels, colour profile and transparency ignored."""
    with _opened(data, max_pixels) as image:
        return _grey(_decoded(image))


def read_alpha(data: bytes, max_pixels: int) -> Image.Image:
    """Transparency as a mask: what is transparent is white. Raises BadImage if there is no alpha channel."""
    with _opened(data, max_pixels) as image:
        alpha = _alpha(_decoded(image))
        if alpha is None:
            raise BadImage("has no alpha channel to take the mask from")
        return ImageOps.invert(alpha)


def _opened(data: bytes, max_pixels: int) -> Image.Image:
    if not data:
        raise BadImage("an empty file")
    Image.MAX_IMAGE_PIXELS = None  # the limit below is the user's, and an error rather than a warning
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise BadImage(_what_it_is(data)) from error
    except _BROKEN as error:
        raise BadImage(f"damaged ({error})") from error
    if image.width * image.height > max_pixels:
        raise BadImage(f"{image.width}x{image.height} pixels, more than max_image_pixels = {max_pixels}")
    return image


def _check_png(data: bytes) -> None:
    """Pillow decodes a PNG whose checksums are wrong."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            image.verify()
    except _BROKEN as error:
        raise BadImage(f"damaged ({error})") from error


def _what_it_is(data: bytes) -> str:
    start = data[:64].lstrip().lower()
    if start.startswith((b"<!doctype", b"<html")):
        return "a web page, not an image"
    if start.startswith((b"%!ps", b"\xc5\xd0\xd3\xc6")):
        return "a PostScript file, not an image"
    if data.startswith((b"\x89PNG", b"\xff\xd8")):
        return "damaged: its beginning is an image's, the rest is not"
    return "not an image this program reads (PNG, JPEG, WebP, BMP, TIFF, AVIF, GIF)"


def _decoded(image: Image.Image) -> Image.Image:
    """All pixels, upright. Palettes become RGB(A), 16-bit greys eight bits."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()
            plain = _eight_bits(image)
            orientation = _orientation(image)
        return plain if orientation is None else plain.transpose(orientation)
    except BadImage:
        raise
    except _BROKEN as error:
        raise BadImage(f"damaged ({error})") from error


def _orientation(image: Image.Image) -> Image.Transpose | None:
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except _BROKEN:
        return None
    turns = Image.Transpose
    return {
        2: turns.FLIP_LEFT_RIGHT, 3: turns.ROTATE_180, 4: turns.FLIP_TOP_BOTTOM, 5: turns.TRANSPOSE,
        6: turns.ROTATE_270, 7: turns.TRANSVERSE, 8: turns.ROTATE_90,
    }.get(value)  # fmt: skip


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise BadImage("a floating-point image: its white and black are not known; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > _SIXTEEN_BIT:
            raise BadImage("a 32-bit image: its white and black are not known; save it with 8 or 16 bits")
        return Image.fromarray(np.round(values / 257).astype(np.uint8), "L")
    if image.mode == "1":
        return image.convert("L")
    if image.mode in ("P", "PA"):
        return image.convert("RGBA" if "transparency" in image.info or image.mode == "PA" else "RGB")
    if "transparency" in image.info and image.mode in ("L", "RGB"):
        return image.convert("RGBA")
    return image


def _alpha(image: Image.Image) -> Image.Image | None:
    return image.getchannel("A") if "A" in image.getbands() and image.mode != "LAB" else None


def _without_alpha(image: Image.Image) -> Image.Image:
    plain = {"LA": "L", "La": "L", "RGBA": "RGB", "RGBa": "RGB", "RGBX": "RGB"}.get(image.mode)
    return image if plain is None else image.convert(plain)


def _grey(image: Image.Image) -> Image.Image:
    plain = _without_alpha(image)
    return plain if plain.mode == "L" else plain.convert("RGB").convert("L")


def _srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    plain = _without_alpha(image)
    if profile and not _is_srgb(profile):
        try:
            source = ImageCms.getOpenProfile(io.BytesIO(profile))
            return ImageCms.profileToProfile(plain, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, *_BROKEN):
            return plain.convert("RGB")
    return plain.convert("RGB")


def _is_srgb(profile: bytes) -> bool:
    return b"sRGB" in profile or "sRGB".encode("utf-16-be") in profile


def _profile_notice(profile: bytes) -> str | None:
    if _is_srgb(profile):
        return None
    try:
        name = ImageCms.getProfileDescription(ImageCms.getOpenProfile(io.BytesIO(profile))).strip()
    except (ImageCms.PyCMSError, *_BROKEN):
        return "has a damaged colour profile: read as sRGB"
    return f"converted from {name} to sRGB"


def _notices(image: Image.Image) -> list[str]:
    notices = []
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        notices.append(f"has {image.n_frames} frames: the first is used")
    if image.mode == "CMYK":
        notices.append("converted from CMYK")
    if image.mode.startswith("I"):
        notices.append("16 bits reduced to 8")
    profile = image.info.get("icc_profile")
    if profile and (text := _profile_notice(profile)):
        notices.append(text)
    if _orientation(image) is not None:
        notices.append("rotated as its EXIF says")
    return notices
