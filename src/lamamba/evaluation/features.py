"""Feature networks: the shipped one, and TorchScript files.

inception   the graph of 2015 that FID is defined with, as NVIDIA converted it: three of its layers in one pass
clothes     shipped: a small classifier of Fashion-MNIST, for grey images of 28 or 32 pixels
any other   colour images -> features (b, d), or a pair of features and logits (b, c)
"""

import os
import urllib.request
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from lamamba.errors import ConfigError, reading
from lamamba.evaluation.clothes import ClothesNetwork
from lamamba.files import atomic_write, checksum
from lamamba.files.weights import check_weights

INCEPTION_URL = (
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"  # 91 MiB
)
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"

Pixels = Literal["uint8", "float"]


@dataclass(frozen=True)
class Features:
    """The outputs of a feature network for b images, in float32."""

    features: Tensor
    """(b, d)."""
    logits: Tensor | None = None
    """(b, c), if it knows classes."""
    spatial: Tensor | None = None
    """(b, s), if it has features that keep places."""


@dataclass(frozen=True)
class FeatureNetwork:
    """A feature network, and what must be the same for scores to be comparable."""

    name: str
    """inception, clothes, or the name of its file."""
    sha256: str
    channels: int
    """Channels of the images that it takes, 1 or 3."""
    sizes: tuple[tuple[int, int], ...]
    """Heights and widths that it takes and treats alike; empty if it takes any size."""
    extract: Callable[[Tensor], Features]
    """uint8 (b, channels, h, w) -> Features, without gradients."""

    @property
    def is_standard(self) -> bool:
        """Whether distances of its features have the names in papers, such as FID."""
        return self.name == "inception"

    def __call__(self, images: Tensor) -> Features:
        # TF32, which CUDA convolutions use by default, changes scores.
        exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
        try:
            with torch.inference_mode(), exact:
                return self.extract(images)
        except (RuntimeError, torch.jit.Error) as error:  # the last line of the error says why
            if "out of memory" in str(error):
                raise ConfigError(f"{len(images)} images at once do not fit: give a smaller batch_size") from error
            said = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            raise ConfigError(
                f"features {self.name} cannot take images {tuple(images.shape)} of uint8 ({said[-1]}): give a "
                "module that does, or pixels (--pixels) float; docs/evaluation.md shows how to wrap a network"
            ) from error


def open_features(name: str, device: torch.device, pixels: Pixels = "uint8") -> FeatureNetwork:
    """Open a network by name or file; a file with the checksum of the standard graph counts as the standard graph.

    Args:
        name: "inception", "clothes", or the path of a TorchScript file.
        device: where it computes.
        pixels: what a file takes: uint8 from 0 to 255, or float32 from 0 to 1.

    Raises:
        ConfigError: the file is missing or not TorchScript, or pixels is given for a known network.
    """
    if name == "clothes":
        with as_file(files("lamamba") / "assets" / "clothes" / "features.safetensors") as path:
            digest, weights = checksum(path), load_file(path)  # stored as float16, used as float32
            clothes = ClothesNetwork()
            check_weights(path, clothes.state_dict(), weights)
        clothes.load_state_dict(weights)
        extract = _wrap(clothes.eval().to(device), name, "uint8")
        network = FeatureNetwork(name, digest, 1, ((28, 28), (32, 32)), extract)
    else:
        path = _fetch_inception() if name == "inception" else Path(name).expanduser()
        if not path.is_file():
            raise ConfigError(f"features {name} is no file: give inception, clothes or a TorchScript file")
        digest, module = checksum(path), _load(path, device)
        if digest != INCEPTION_SHA256:
            return FeatureNetwork(path.name, digest, 3, (), _wrap(module, path.name, pixels))
        network = FeatureNetwork("inception", digest, 3, (), _Inception(module))
    if pixels != "uint8":
        raise ConfigError(f"pixels (--pixels) {pixels} is not for features {name}, which take uint8: leave it out")
    return network


def _load(path: Path, device: torch.device) -> Any:
    advice = "save the network with torch.jit.trace(...).save(...)"
    with reading(f"features {path} cannot be read as TorchScript", advice, ConfigError), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript, the format of these networks
        return torch.jit.load(path, map_location=device).eval()


def _wrap(module: Any, name: str, pixels: Pixels) -> Callable[[Tensor], Features]:
    def extract(images: Tensor) -> Features:
        found = module(images if pixels == "uint8" else images.float() / 255)
        outputs = found if isinstance(found, tuple) and len(found) == 2 else (found,)
        for tensor in outputs:
            if not isinstance(tensor, Tensor) or tensor.ndim != 2 or len(tensor) != len(images):
                said = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
                raise ConfigError(
                    f"features {name} returned {said} for {len(images)} images: it must be (b, d), or a pair of that "
                    "and logits (b, c); docs/evaluation.md shows how to wrap a network"
                )
        return Features(*(tensor.float() for tensor in outputs))

    return extract


class _Inception:
    """The Inception graph of 2015: pooled features, logits without bias, and mixed_6/conv features for sFID.

    One pass computes all three. For the first images, they are compared with the outputs of the whole module.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self.checked = False

    def __call__(self, images: Tensor) -> Features:
        found = self._extract(images)
        if not self.checked and found.logits is not None:
            pooled = self.module(images, return_features=True)
            classes = self.module(images, no_output_bias=True)
            if not (_agree(found.features, pooled) and _agree(found.logits.softmax(dim=1), classes)):
                raise ConfigError("inception by its layers is not inception as a whole on this device: try device cpu")
            self.checked = True
        return found

    def _extract(self, images: Tensor) -> Features:
        x = (resize_as_in_2015(images.float()) - 128) / 128
        spatial = None
        for name, layer in self.module.layers.named_children():
            if name == "mixed_6":
                # ADM's order: row, column, channel, the first 7 channels of 17 x 17. Published statistics depend on it.
                spatial = layer.conv(x)[:, :7].permute(0, 2, 3, 1).flatten(1)
            x = layer(x)
        features = x.flatten(1)
        return Features(features, F.linear(features, self.module.output.weight), spatial)


def _agree(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-3 * b.abs().max())


def resize_as_in_2015(images: Tensor, size: int = 299) -> Tensor:
    """Scale images (b, c, h, w) to `size` square as the graph does: linear, with pixel i at i h / size, no smoothing.

    Pixels are placed by their corners, not their centers, and images larger than `size` alias. FID is defined so.
    """
    for dim in (2, 3):
        length = images.shape[dim]
        places = torch.arange(size, device=images.device, dtype=torch.float64) * (length / size)
        low = places.floor().long().clamp_max(length - 1)
        high = (low + 1).clamp_max(length - 1)
        share = (places - low).float().view(-1, *[1] * (3 - dim))
        below, above = images.index_select(dim, low), images.index_select(dim, high)
        images = below + (above - below) * share
    return images


def _fetch_inception() -> Path:
    """Return the file of the standard graph in the cache, downloaded the first time; raises ConfigError."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lamamba"
    path = cache / INCEPTION_URL.rsplit("/", 1)[-1]
    if not path.is_file():
        what = f"the Inception network could not be downloaded to {path}"
        with reading(
            what, f"download {INCEPTION_URL} elsewhere and give it with features (--features) FILE", ConfigError
        ):
            with urllib.request.urlopen(INCEPTION_URL, timeout=60) as answer:
                content = answer.read()
            if sha256(content).hexdigest() != INCEPTION_SHA256:
                raise OSError(f"its checksum is not {INCEPTION_SHA256}")
            with atomic_write(path) as temporary:
                temporary.write_bytes(content)
    elif checksum(path) != INCEPTION_SHA256:
        raise ConfigError(f"{path} does not have the checksum {INCEPTION_SHA256}: delete it to download it again")
    return path
