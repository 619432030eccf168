"""Decodes image files to pixels of one size, and converts between uint8 pixels and the network's floats."""

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lamamba.errors import ConfigError, DataError, reading

Image.init()  # registers all formats
# Formats that Pillow recognizes but cannot decode; to decode EPS, it would start Ghostscript.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
FORMATS = tuple(sorted(set(Image.OPEN) - _NOT_DECODED))
IMAGE_SUFFIXES = tuple(sorted(suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS))


def read_image(path: str | Path, channels: int, *, can_skip: bool = False) -> Image.Image:
    """Decode a file (of an animation, the first frame) to mode L (channels 1) or RGB (3), see `convert_image`.

    With `can_skip`, the error mentions the option that skips unreadable files.

    Raises:
        DataError: the file is missing, damaged or truncated, or its pixels cannot be converted to 8 bits.
    """
    advice = "replace or delete it" + ", or skip it with skip_bad_images (--skip-bad-images)" * can_skip
    with reading(f"{path} cannot be read as an image", advice):
        return decode_image(path, channels)


def decode_image(file: str | Path | BinaryIO, channels: int) -> Image.Image:
    """Decode a file or bytes like `read_image`; raises Pillow's own errors, which are of nearly any type."""
    with Image.open(file, formats=FORMATS) as opened:
        return convert_image(opened, channels)


def convert_image(image: Image.Image, channels: int, background: str = "white") -> Image.Image:
    """Convert an image of any mode to L (channels 1) or RGB (3).

    The EXIF orientation is applied, transparency is composited on the background, 16-bit grey is scaled to 8 bits.

    Raises:
        ValueError: the pixels cannot be converted to 8 bits; the message does not name the file.
    """
    image = _decode(image)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("L" if channels == 1 else "RGB")


def find_alpha(image: Image.Image) -> Image.Image:
    """Return the alpha channel (L) that `convert_image` composites with: 255 where the image is opaque."""
    return _decode(image).convert("RGBA").getchannel("A")


def _decode(image: Image.Image) -> Image.Image:
    """Turn an image upright and scale it to 8 bits; convert it to RGBA if it has transparency."""
    kind, transparent = image.format, _transparent_value(image)
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and kind == "PNG"):  # older Pillow: 16-bit PNG is "I"
        values = np.asarray(image)
        image = Image.fromarray(scale_16_bits(values))
        if transparent is not None:
            image.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    elif image.mode in ("I", "F"):
        raise ValueError(f"it has 32-bit pixels (mode {image.mode}) of unknown range, and not 8 or 16 bits")
    elif transparent is not None:
        image.info["transparency"] = transparent
    if image.has_transparency_data:
        if image.mode == "La":  # Pillow converts premultiplied grey only to LA
            image = image.convert("LA")
        image = image.convert("RGBA")
    return image


def _transparent_value(image: Image.Image) -> Any:
    """Return the pixel value that is transparent, in the units of the loaded pixels; None if there is none.

    Pillow keeps the value of a PNG file unchanged, but scales pixels of 2 and 4 bits up to 8, and 16-bit colors down to
    8.
    """
    value = image.info.get("transparency")
    tile = getattr(image, "tile", None)  # empty once the image is loaded
    raw_mode = tile[0][3] if tile and image.format == "PNG" else None
    if raw_mode in ("L;2", "L;4") and isinstance(value, int):
        return value * (85 if raw_mode == "L;2" else 17)
    # A loaded image has no raw mode, but a value above 255 must have 16 bits.
    if isinstance(value, tuple) and (raw_mode == "RGB;16B" or max(value) > 255):
        return tuple(part >> 8 for part in value)
    return value


def scale_16_bits(values: np.ndarray) -> np.ndarray:
    """Scale values from 0..65535 to uint8, rounding."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def convert_given(name: str, given: Any, channels: int, background: str = "white") -> Any:
    """Convert images in memory to the pixels that training would read from their files.

    Args:
        name: name of the argument, for errors.
        given: a PIL image of any mode, a uint8 or uint16 array (h, w), (h, w, c) or (n, h, w, c), a tensor with the
            channels first, or a list of these.
        channels: see `convert_image`.
        background: see `convert_image`.

    Returns:
        A list of PIL images of mode L or RGB, or `given` itself if it holds floats.

    Raises:
        ConfigError: it is something else.
        DataError: an image cannot be decoded, or its pixels cannot be converted to 8 bits.
    """
    images: list[Any] = []
    items = given if isinstance(given, list | tuple) else [given]
    if not len(items):
        raise ConfigError(f"{name} is an empty list: give at least one image")
    for item in items:
        if isinstance(item, Tensor) and not item.is_floating_point():
            item = (item.movedim(-3, -1) if item.ndim > 2 else item).cpu().numpy()
        if isinstance(item, np.ndarray) and item.dtype.kind != "f":
            images += [_to_pil(name, pixels) for pixels in (item if item.ndim == 4 else [item])]
        elif isinstance(item, Image.Image):
            images.append(item)
        elif not isinstance(item, np.ndarray | Tensor):
            raise ConfigError(f"{name} holds a {type(item).__name__}: give PIL images, arrays or tensors")
        elif item.ndim not in (2, 3, 4) or 0 in item.shape:
            raise ConfigError(
                f"{name} holds an array of shape {tuple(item.shape)}: give (h, w, c), or tensors (c, h, w)"
            )
        elif images:
            raise ConfigError(f"{name} mixes images of 8 or 16 bits with floats: give one kind")
    if not images:
        return given
    with reading(f"{name} cannot be decoded", "give another image"):  # a lazy PIL image is decoded only now
        return [convert_image(image, channels, background) for image in images]


def _to_pil(name: str, pixels: np.ndarray) -> Image.Image:
    if pixels.dtype == np.uint16:
        pixels = scale_16_bits(pixels)
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    is_image = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[-1] in (2, 3, 4))
    if pixels.dtype != np.uint8 or not is_image or not pixels.size:
        raise ConfigError(
            f"{name} is a {pixels.dtype} array of shape {pixels.shape}: give uint8, uint16 or floats from 0 to 1, "
            "with 1 to 4 channels"
        )
    return Image.fromarray(np.ascontiguousarray(pixels))


def crop_centre(image: Image.Image, size: int) -> Image.Image:
    """Scale an image so that its shorter side is `size` pixels, and crop it to the central square.

    The image is first halved with the box filter as often as possible, as in ADM's preparation of ImageNet (Dhariwal &
    Nichol 2021, arXiv 2105.05233), because scores are comparable only between sets that were scaled in the same way.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_float(images: Tensor) -> Tensor:
    """Map uint8 images to float32 in [-1, 1], any shape; the inverse of `to_uint8`.

    Raises:
        DataError: the images are not uint8.
    """
    if images.dtype != torch.uint8:
        raise DataError(f"images are {images.dtype}, not torch.uint8: to_float takes 0..255 as read by batches")
    return images.to(torch.float32) / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Map float images in [-1, 1] to uint8, any shape, rounding and clamping; the inverse of `to_float`.

    Raises:
        DataError: the images are not floating-point.
    """
    if not images.is_floating_point():
        raise DataError(f"images are {images.dtype}, not floating-point: to_uint8 takes values in [-1, 1]")
    return ((images.to(torch.float32) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
