"""Converts images to what the network sees and back: pixels, or latents of an autoencoder.

The only file that knows the autoencoder.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from lamamba.data import to_float, to_uint8
from lamamba.errors import CheckpointError, ConfigError, reading
from lamamba.files import checksum
from lamamba.files.records import AutoencoderRecord
from lamamba.files.weights import CONFIG, check_class, check_model, load_model

IMAGE_CHANNELS = (1, 3)  # grey; red, green and blue: without an autoencoder, a network of others samples latents
_PIXELS_AT_ONCE = 16 * 256**2


class Pixels:
    """The network sees pixels, scaled to -1 to 1."""

    bounded = True
    """Whether clean inputs of the network lie between -1 and 1, so that predictions can be clipped to that."""
    factor = 1
    """Pixels per row of the network's grid."""

    def channels(self, image_channels: int) -> int:
        """Return the number of channels that the network sees."""
        return image_channels

    def grid_size(self, pixels: int) -> int:
        """Convert a side in pixels to rows of the network's grid; raises ConfigError if it does not fit."""
        if pixels % 2 or pixels < 4:
            raise ConfigError(f"image size {pixels} is not an even number from 4 up: use {max(4, pixels + pixels % 2)}")
        return pixels

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Convert what a data source holds to float32 training inputs."""
        return to_float(images)

    def decode(self, x: Tensor) -> Tensor:
        """Convert what the network samples to (b, c, h, w) uint8 images."""
        return to_uint8(x)

    def encode_float(self, images: Tensor) -> Tensor:
        """Convert (b, c, h, w) images from -1 to 1 to what the network samples."""
        return images.float()

    def decode_float(self, x: Tensor) -> Tensor:
        """Convert what the network samples to float32 images, about -1 to 1."""
        return x.float()


class Latents:
    """The network sees latents of a diffusers AutoencoderKL, scaled as its configuration says.

    It has the same methods as `Pixels`.
    """

    bounded = False

    def __init__(self, autoencoder: Any) -> None:
        self.autoencoder = autoencoder
        self.image_channels: int = autoencoder.config.in_channels
        self.factor = 2 ** (len(autoencoder.config.block_out_channels) - 1)
        self.scale: float = autoencoder.config.scaling_factor
        self.shift: float = autoencoder.config.shift_factor or 0.0
        self._is_compiled = False

    @classmethod
    def open(cls, folder: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> Self:
        """Load a folder that `AutoencoderKL.save_pretrained` wrote, in a dtype; nothing is downloaded.

        Raises:
            CheckpointError: the folder holds no autoencoder, or an incomplete one.
        """
        from diffusers import AutoencoderKL

        _check_class(folder)
        autoencoder = load_model(AutoencoderKL, folder, AutoencoderRecord)
        # diffusers' own `to` warns about layers that keep their dtype, although there are none.
        torch.nn.Module.to(autoencoder, device, dtype)
        return cls(autoencoder.eval().requires_grad_(False))

    def check_network(self, in_channels: int) -> None:
        """Raise ConfigError unless a network has as many channels as the latents."""
        channels = int(self.autoencoder.config.latent_channels)
        if in_channels != channels:
            raise ConfigError(
                f"the autoencoder has latents of {channels} channels, and the network samples {in_channels}: give "
                "(--vae) the one that it was trained with"
            )

    def channels(self, image_channels: int) -> int:
        wanted, channels = self.image_channels, self.autoencoder.config.latent_channels
        if image_channels != wanted:
            raise ConfigError(
                f"the images have {image_channels} channels, the autoencoder takes {wanted}: set channels"
            )
        return int(channels)

    def grid_size(self, pixels: int) -> int:
        """Divide a side in pixels by the autoencoder's factor; the result must be even and at least 4."""
        multiple = 2 * self.factor
        if pixels % multiple or pixels < 2 * multiple:
            below = max(2, pixels // multiple) * multiple
            raise ConfigError(
                f"image size {pixels} is not a multiple of {multiple} from {2 * multiple} up "
                f"({self.factor} for the autoencoder, 2 for the network): use {below} or {below + multiple}"
            )
        return pixels // self.factor

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Tensor | None) -> Tensor:
        """Draw latents with standard normal noise, or return the most likely ones without noise.

        Args:
            images: (b, c, h, w) uint8 images; or (b, 2 c', h', w'), the mean and standard deviation of latents that
                were encoded before.
            noise: (b, c', h', w') or None.
        """
        mean, deviation = self.moments(images) if images.dtype == torch.uint8 else images.float().chunk(2, dim=1)
        return self._scaled(mean if noise is None else mean + deviation * noise)

    @torch.no_grad()
    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute mean and standard deviation of the latents of uint8 or float images, before they are scaled."""
        pixels = to_float(images) if images.dtype == torch.uint8 else images
        distribution = self.autoencoder.encode(pixels.to(self.autoencoder.dtype)).latent_dist
        return distribution.mean, distribution.std

    def encode_float(self, images: Tensor) -> Tensor:
        """Compute the most likely latents of images from -1 to 1, as many at once as fit in memory."""
        at_once = max(1, _PIXELS_AT_ONCE // images[0, 0].numel())
        means = in_parts(lambda part: self.moments(images[part])[0].float(), len(images), at_once)
        return self._scaled(torch.cat(list(means)))

    def _scaled(self, latents: Tensor) -> Tensor:
        return (latents - self.shift) * self.scale

    def compile(self) -> None:
        """Compile the decoder at its next call. This takes half a minute and doubles its speed on a GPU."""
        # Tensor cores are faster with channels last, but norms are slower unless compiled.
        self.autoencoder.to(memory_format=torch.channels_last)
        self.autoencoder.decoder.compile(dynamic=False)
        self._is_compiled = True

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        return torch.cat([to_uint8(part) for part in self._decoded(x)])[: len(x)]

    @torch.no_grad()
    def decode_float(self, x: Tensor) -> Tensor:
        return torch.cat(list(self._decoded(x)))[: len(x)]

    def _decoded(self, x: Tensor) -> Iterator[Tensor]:
        latents = (x / self.scale + self.shift).to(self.autoencoder.dtype)
        at_once = max(1, _PIXELS_AT_ONCE // (x[0, 0].numel() * self.factor**2))
        if self._is_compiled:  # compiled for one shape: use parts of equal size, and fill up the last one
            at_once = math.ceil(len(x) / math.ceil(len(x) / at_once))
            latents = torch.cat([latents, latents[:1].expand(-len(x) % at_once, -1, -1, -1)])
        return in_parts(lambda part: self.autoencoder.decode(latents[part]).sample.float(), len(latents), at_once)


Space = Pixels | Latents
"""What the network sees, and the conversion to and from images."""


def check_autoencoder(folder: Path, variant: str | None = None) -> None:
    """Raise CheckpointError unless a folder holds an autoencoder with all weights. Only their names are read."""
    from diffusers import AutoencoderKL

    _check_class(folder)
    check_model(AutoencoderKL, folder, AutoencoderRecord, variant)


def _check_class(folder: Path) -> None:
    if not (folder / CONFIG).is_file():
        inside = folder / "vae"  # of a pipeline
        hint = f", such as {inside}" if (inside / CONFIG).is_file() else ""
        raise CheckpointError(
            f"{folder} holds no autoencoder: give (--vae) a folder with its config.json and weights{hint}"
        )
    check_class(folder, ("AutoencoderKL",))


def identify(folder: Path) -> str:
    """Compute a checksum of an autoencoder's weights."""
    return checksum(*sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")))


def identify_autoencoder(folder: Path) -> str:
    """Compute a digest of an autoencoder's weights and configuration, to recognize it after it has moved."""
    with reading(f"{folder} cannot be read as an AutoencoderKL", "give (--vae) another folder", CheckpointError):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        known = {name: value for name, value in config.items() if not name.startswith("_")}  # not where it was loaded
        return hashlib.sha256(json.dumps([identify(folder), known], sort_keys=True).encode()).hexdigest()


def open_space(vae: Path | None, device: torch.device, dtype: torch.dtype = torch.float32) -> Space:
    """Return `Latents` of an autoencoder folder, computed in a dtype, or `Pixels` without one."""
    return Pixels() if vae is None else Latents.open(vae, device, dtype)


def in_parts(work: Callable[[slice], Tensor], number: int, at_once: int) -> Iterator[Tensor]:
    """Process a batch of `number` items in parts of up to `at_once`, and halve the parts when GPU memory runs out.

    `work` takes a slice of the batch and returns one result per item.

    Raises:
        torch.OutOfMemoryError: a single item does not fit.
    """
    done, at_once = 0, min(at_once, number)
    while done < number:
        try:
            part = work(slice(done, min(done + at_once, number)))
        except torch.OutOfMemoryError:
            if at_once == 1:
                raise
            at_once = -(-at_once // 2)
            torch.cuda.empty_cache()
            continue
        done += len(part)
        yield part
