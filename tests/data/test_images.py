"""Files of every kind come out as a person would see them, or are refused with the reason."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from library.data.images import BadImage, inspect, read_alpha, read_mask, read_rgb

LIMIT = 1_000_000


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def arrow(mode: str = "RGB") -> Image.Image:
    """A picture that no rotation or mirroring maps to itself: 32x20, a red corner, a blue edge."""
    image = Image.new("RGB", (32, 20), "white")
    image.paste("red", (0, 0, 8, 8))
    image.paste("blue", (0, 16, 32, 20))
    return image.convert(mode)


def pixel(data: bytes, at: tuple[int, int] = (10, 10), background: str | None = "#ffffff") -> tuple[int, ...]:
    return read_rgb(data, LIMIT, background).getpixel(at)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    data = encoded(arrow(), kind, exif=exif, **options)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert np.array_equal(np.asarray(read_rgb(data, LIMIT, None)), np.asarray(expected))
    facts = inspect(data, LIMIT)
    assert (facts.width, facts.height) == expected.size == ((20, 32) if orientation > 4 else (32, 20))
    assert bool(facts.notices) == (orientation != 1)


def test_damaged_exif_leaves_the_picture_as_it_is() -> None:
    data = encoded(arrow(), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    assert inspect(data, LIMIT).width == 32


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    grey = np.full((20, 32), 40_000, np.uint16)
    data = encoded(Image.fromarray(grey))
    assert pixel(data) == (round(40_000 / 257),) * 3
    assert "16 bits reduced to 8" in inspect(data, LIMIT).notices


def sixteen_bit_rgb(value: int) -> bytes:
    """A PNG of 16 bits a channel, which Pillow reads but does not write."""
    rows = b"".join(b"\0" + struct.pack(">3H", value, value // 2, 0) * 32 for _ in range(20))

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 32, 20, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_sixteen_bit_colour() -> None:
    assert pixel(sixteen_bit_rgb(51_400)) == (200, 100, 0)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_unknown_ranges_are_refused(mode: str) -> None:
    values = np.full((20, 32), 1e6 if mode == "I" else 0.5)
    data = encoded(Image.fromarray(values.astype(np.int32 if mode == "I" else np.float32)), "TIFF")
    with pytest.raises(BadImage, match="white and black are not known"):
        inspect(data, LIMIT)


@pytest.mark.parametrize(
    ("image", "kind", "expected"),
    [
        (Image.new("L", (32, 20), 77), "PNG", (77, 77, 77)),
        (Image.new("1", (32, 20), 1), "PNG", (255, 255, 255)),
        (Image.new("LA", (32, 20), (0, 0)), "PNG", (255, 255, 255)),
        (Image.new("RGBA", (32, 20), (255, 0, 0, 0)), "PNG", (255, 255, 255)),
        (Image.new("RGBA", (32, 20), (0, 0, 0, 51)), "PNG", (204, 204, 204)),
        (arrow("P"), "PNG", (255, 255, 255)),
        (Image.new("CMYK", (32, 20), (0, 255, 255, 0)), "JPEG", (255, 0, 0)),
        (Image.new("CMYK", (32, 20), (0, 255, 255, 0)), "TIFF", (255, 0, 0)),
        (Image.new("YCbCr", (32, 20), (128, 128, 128)), "JPEG", (128, 128, 128)),
    ],
    ids=["grey", "bits", "grey-alpha", "transparent", "half", "palette", "cmyk-jpeg", "cmyk-tiff", "ycbcr"],
)
def test_modes_give_known_colours(image: Image.Image, kind: str, expected: tuple[int, ...]) -> None:
    assert pixel(encoded(image, kind)) == expected


def test_a_transparent_palette_is_laid_over_the_background() -> None:
    image = Image.new("P", (32, 20), 3)
    image.putpalette([0, 0, 0] * 3 + [9, 9, 9] + [0, 0, 0] * 252)
    assert pixel(encoded(image, transparency=3), background="#102030") == (16, 32, 48)


def test_colours_under_transparency_can_be_kept() -> None:
    assert pixel(encoded(Image.new("RGBA", (32, 20), (255, 0, 0, 0))), background=None) == (255, 0, 0)


def test_a_colour_profile_is_converted_and_a_damaged_one_is_not_fatal() -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ"))
    data = encoded(Image.new("RGB", (32, 20), (100, 150, 200)), icc_profile=lab.tobytes())
    assert inspect(data, LIMIT).notices
    broken = encoded(Image.new("RGB", (32, 20), (100, 150, 200)), icc_profile=b"nonsense" * 20)
    assert pixel(broken) == (100, 150, 200)
    assert any("damaged colour profile" in notice for notice in inspect(broken, LIMIT).notices)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    plain = encoded(Image.new("RGB", (32, 20), (100, 150, 200)), icc_profile=srgb)
    assert pixel(plain) == (100, 150, 200) and inspect(plain, LIMIT).notices == ()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_animations_the_first_frame_is_used_and_said(kind: str) -> None:
    frames = [Image.new("RGB", (32, 20), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert pixel(data) == (255, 0, 0)
    assert any("3 frames" in notice for notice in inspect(data, LIMIT).notices)


def header_only(width: int, height: int) -> bytes:
    """A PNG that claims a size it does not have."""
    content = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    crc = struct.pack(">I", zlib.crc32(b"IHDR" + content))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + content + crc + encoded(arrow())[33:]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"just text", "not an image"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
        (encoded(arrow())[:60], "damaged"),
        (encoded(arrow(), "JPEG")[:400], "damaged"),
        (encoded(arrow())[:-30] + b"\0" * 30, "damaged"),
        (header_only(40_000, 30_000), "more than max_image_pixels"),
        (encoded(Image.new("L", (2000, 600))), "more than max_image_pixels"),
        (encoded(Image.new("L", (1, 10_000))), "only 1x10000"),
        (encoded(Image.new("L", (1, 1))), "only 1x1"),
    ],
    ids=["empty", "text", "html", "eps", "cut-png", "cut-jpeg", "zeroed", "liar", "large", "thin", "dot"],
)
def test_what_is_no_whole_picture_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=reason):
        inspect(data, LIMIT)


def test_masks_are_read_as_grey_levels() -> None:
    grey = Image.new("L", (32, 20), 0)
    grey.paste(127, (0, 0, 16, 20))
    grey.paste(128, (16, 0, 32, 20))
    facts = inspect(encoded(grey), LIMIT)
    assert facts.white == 0.5
    assert read_mask(encoded(grey), LIMIT).getpixel((20, 3)) == 128


def test_alpha_masks_repaint_what_is_transparent() -> None:
    image = Image.new("RGBA", (32, 20), (1, 2, 3, 255))
    image.paste((1, 2, 3, 0), (0, 0, 16, 20))
    mask = read_alpha(encoded(image), LIMIT)
    assert mask.getpixel((3, 3)) == 255 and mask.getpixel((20, 3)) == 0
    with pytest.raises(BadImage, match="no alpha"):
        read_alpha(encoded(arrow()), LIMIT)
