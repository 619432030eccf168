"""From an image file to pixels of one size, and between uint8 pixels and the network's floats."""

from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lamamba.errors import DataError


def read_image(path: str | Path, channels: int) -> Image.Image:
    """Decode a file (of an animation, the first frame) to mode L (channels 1) or RGB (3), upright, on white.

    The EXIF orientation is applied, transparency is composited on white, 16-bit grey is scaled to 8 bits.

    Raises:
        DataError: the file is missing, damaged or truncated, or has pixels that have no 8-bit meaning.
    """
    try:
        return decode_image(path, channels)
    except MemoryError:
        raise
    except DataError as error:
        raise DataError(f"{path} has {error}: save it with 8 or 16 bits") from error
    except Exception as error:  # Pillow's decoders raise nearly everything on damaged files, even SyntaxError
        raise DataError(
            f"{path} cannot be read as an image ({type(error).__name__}: {error}): replace or delete it, "
            "or skip it with skip_bad_images (--skip-bad-images)"
        ) from error


def decode_image(file: str | Path | BinaryIO, channels: int) -> Image.Image:
    """Decode as `read_image` does, from memory too; errors are Pillow's own, which are of nearly any type.

    Raises:
        DataError: the pixels have no 8-bit meaning; the message names them alone.
    """
    with Image.open(file) as opened:
        opened.load()
        kind = opened.format
        image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I;16") or (image.mode == "I" and kind == "PNG"):  # older Pillow: 16-bit PNG is "I"
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise DataError(f"32-bit pixels (mode {image.mode}) of unknown range")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")


def crop_centre(image: Image.Image, size: int) -> Image.Image:
    """Scale an image so that its shorter side is `size` pixels and cut the central square out of it.

    Halving with the box filter comes first, as in the preparation of ImageNet for ADM (Dhariwal & Nichol 2021,
    arXiv 2105.05233): scores are only comparable between sets that were scaled the same way.
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
