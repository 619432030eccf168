"""Uploads are kept within limits, and drawings decoded within limits."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lamamba.demo import uploads as uploads_module
from lamamba.demo.uploads import MAX_AGE_S, MAX_BYTES, MAX_FILE_BYTES, MAX_FILES, MAX_PIXELS, Uploads, read_drawing
from lamamba.errors import ConfigError


def encode(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    content = io.BytesIO()
    picture.save(content, format=kind, **options)
    return content.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """Make a PNG of a size, grey, that has no pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize(("limit", "kept"), [("MAX_BYTES", 2), ("MAX_FILES", 3)])
def test_the_oldest_go_first(limit: str, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads_module, limit, {"MAX_BYTES": 29, "MAX_FILES": 3}[limit])
    uploads = Uploads()
    names = [uploads.add(bytes([index]) * 10) for index in range(5)]
    assert len(uploads) == kept
    assert [uploads[name] for name in names[-kept:]] == [bytes([index]) * 10 for index in range(5 - kept, 5)]
    with pytest.raises(ConfigError, match="upload it again"):
        uploads[names[-kept - 1]]


def test_what_is_sent_again_is_kept_once_and_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads_module, "MAX_FILES", 2)
    uploads = Uploads()
    first, second = uploads.add(b"first"), uploads.add(b"second")
    assert uploads.add(b"first") == first
    assert len(uploads) == 2
    uploads.add(b"third")
    assert uploads[first] == b"first"
    with pytest.raises(ConfigError):
        uploads[second]


def test_uploads_grow_old(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(uploads_module.time, "monotonic", lambda: now)
    uploads = Uploads()
    name = uploads.add(b"image")
    now = 599.0
    assert uploads[name] == b"image"
    now = 601.0
    uploads.drop_old()
    assert len(uploads) == 0


def test_a_drawing_is_an_image_and_a_mask() -> None:
    background = Image.new("RGBA", (8, 6), (10, 20, 30, 255))
    background.putpixel((0, 0), (0, 0, 0, 0))
    layer = Image.new("RGBA", (8, 6))
    layer.paste((219, 39, 119, 1), (2, 1, 5, 4))
    image, mask = read_drawing(encode(background), [encode(layer)])
    assert (image.mode, image.size, mask.mode, mask.size) == ("RGB", (8, 6), "L", (8, 6))
    assert image.getpixel((0, 0)) == (255, 255, 255)  # what is transparent is white, as in training
    assert image.getpixel((7, 5)) == (10, 20, 30)
    expected = np.zeros((6, 8), np.uint8)
    expected[1:4, 2:5] = 255
    assert np.array_equal(np.asarray(mask), expected)


def test_a_drawing_of_another_size_is_scaled_and_an_opaque_one_covers_all() -> None:
    background = encode(Image.new("L", (8, 6)))
    half = Image.new("RGBA", (4, 3))
    half.paste((0, 0, 0, 255), (0, 0, 2, 3))
    assert read_drawing(background, [encode(half)])[1].getbbox() == (0, 0, 4, 6)
    assert read_drawing(background, [encode(Image.new("L", (8, 6)))])[1].getextrema() == (255, 255)
    assert read_drawing(background, [])[1].getbbox() is None


def test_the_drawing_is_turned_upright_with_the_image() -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # the top is at the right
    layer = Image.new("RGBA", (8, 6))
    layer.paste((0, 0, 0, 255), (0, 0, 8, 1))
    image, mask = read_drawing(encode(Image.new("L", (8, 6)), exif=turned), [encode(layer, exif=turned)])
    assert image.size == (6, 8)
    assert mask.getbbox() == (5, 0, 6, 8)


@pytest.mark.parametrize(
    ("background", "layer"),
    [((8190, 8190), (1, 1)), ((4096, 4096), (4096, 4097)), ((1, 1), (60_000, 60_000)), ((1 << 26, 1), (1, 1))],
)
def test_pixels_are_counted_before_any_are_decoded(background: tuple[int, int], layer: tuple[int, int]) -> None:
    # These files have no pixels: to decode them would be another error.
    with pytest.raises(ConfigError, match=r"more than 33,554,432 pixels together: upload a smaller image"):
        read_drawing(png(*background), [png(*layer)])


def test_the_largest_drawing_is_not_too_large() -> None:
    with pytest.raises(ConfigError, match="or damaged"):
        read_drawing(png(4096, 4096), [png(4096, 4096)])


def test_layers_are_counted() -> None:
    file = encode(Image.new("L", (8, 8)))
    with pytest.raises(ConfigError, match="the drawing has 2 layers, and the canvas has 1"):
        read_drawing(file, [file, file])


_BOMB = zlib.compress(b"\0" * (70 << 20), 9)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"no image", encode(Image.effect_noise((64, 64), 50))[:2000], png(0, 8), png(8, 8),
        *(encode(Image.new("L", (8, 8)), kind) for kind in ("GIF", "TIFF", "JPEG", "WEBP", "ICO", "BMP")),
        png(8, 8, *[chunk(b"zTXt", b"a\0\0" + _BOMB)] * 3),
        png(8, 8, chunk(b"iTXt", b"a\0\1\0\0\0" + _BOMB)),
        png(8, 8, chunk(b"iCCP", b"a\0\0" + _BOMB)),
    ],
    ids=lambda content: f"{content[:4]!r}-{len(content)}",
)  # fmt: skip
def test_only_whole_png_files_are_read(content: bytes) -> None:
    good = encode(Image.new("L", (8, 8)))
    for files in ((content, [good]), (good, [content])):
        with pytest.raises(ConfigError, match="the file is no PNG image, or damaged: upload another"):
            read_drawing(*files)


def test_the_documented_limits_are_these() -> None:
    text = " ".join((Path(__file__).parents[2] / "docs" / "demo.md").read_text().split())
    for said in (
        f"an uploaded file at most {MAX_FILE_BYTES >> 20} MiB",
        f"may have at most {MAX_PIXELS:,} pixels together",
        f"at most {MAX_FILES} files and {MAX_BYTES >> 20} MiB together, each for {MAX_AGE_S / 60:g} minutes",
    ):
        assert said in text
