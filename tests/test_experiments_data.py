"""What the comparison takes from others: CIFAR-10, and feature networks."""

import io
import pickle
import sys
import tarfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

import cifar
import features
from lamamba.errors import DataError
from lamamba.evaluation.features import open_features


def test_packed_cifar_holds_the_same_pictures(tmp_path: Path) -> None:
    files, colors = [], ((200, 30, 30), (30, 30, 200), (30, 200, 30))
    for color in colors:
        file = io.BytesIO()
        Image.new("RGB", (32, 32), color).save(file, "JPEG", quality=95)
        files.append({"bytes": file.getvalue(), "path": None})
    pyarrow.parquet.write_table(pyarrow.table({"image": files, "label": [3, 0, 9]}), tmp_path / "test-0.parquet")
    cifar.pack(tmp_path / "test-0.parquet", tmp_path / "cifar10-test.xz")
    source = cifar.load_cifar("test", tmp_path)
    assert source.labels.tolist() == [3, 0, 9]
    assert np.abs(source.images.mean((2, 3)) - np.array(colors)).max() < 3
    with pytest.raises(DataError, match="train"):
        cifar.load_cifar("train", tmp_path)


@pytest.mark.parametrize("name", ["vgg16", "squeezenet"])
def test_feature_networks_take_images_of_both_kinds(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a package to packed weights, to a network."""
    random = np.random.default_rng(0)

    def weights(side: int, inputs: int, outputs: int) -> list[np.ndarray]:
        scale = (2 / (side * side * inputs)) ** 0.5
        weight = random.standard_normal((side, side, inputs, outputs), np.float32) * scale
        return [weight, np.zeros(outputs, np.float32)]

    if name == "vgg16":
        widths = (3, 64, 64, 128, 128, 256, 256, 256, *[512] * 6)
        layers = [dict(zip(("kernel", "bias"), weights(3, *pair), strict=True)) for pair in pairwise(widths)]
        arrays = {"VGG16_0": {f"Conv_{i}": layer for i, layer in enumerate(layers)}, "unused": np.ones(3)}
        file = "vgg16.ckpt"
    else:
        arrays, inputs = {"conv1": weights(3, 3, 64)}, 64
        for fire, narrow in zip(range(2, 10), (16, 16, 32, 32, 48, 48, 64, 64), strict=True):
            arrays[f"fire{fire}/squeeze1x1"] = weights(1, inputs, narrow)
            arrays[f"fire{fire}/expand1x1"] = weights(1, narrow, 4 * narrow)
            arrays[f"fire{fire}/expand3x3"] = weights(3, narrow, 4 * narrow)
            inputs = 8 * narrow
        file = "squeezenet_weights.pkl"
    (tmp_path / file).write_bytes(pickle.dumps(arrays))
    with tarfile.open(tmp_path / "package.tar.gz", "w:gz", compresslevel=1) as archive:
        archive.add(tmp_path / file, f"package-0.1/weights/{file}")
    for given in (["package.tar.gz", "--pack"], [f"{name}.npz"]):
        monkeypatch.setattr(sys, "argv", ["features.py", str(tmp_path / given[0]), *given[1:], "--out", str(tmp_path)])
        features.main()
    assert "unused" not in np.load(tmp_path / f"{name}.npz")

    extract = open_features(str(tmp_path / f"{name}.pt"), torch.device("cpu"))
    gray = torch.from_numpy(random.integers(0, 256, (2, 1, 32, 32), np.uint8))
    found = extract(gray.expand(-1, 3, -1, -1)).features
    assert found.shape == (2, 512)
    assert found.std() > 0
    network = features.NETWORKS[name](features.unflatten(dict(features.flatten(arrays))))
    torch.testing.assert_close(network(gray), found)


def test_arrays_are_read_without_running_code() -> None:
    with pytest.raises(pickle.UnpicklingError, match="is not an array"):
        features.read_arrays(io.BytesIO(pickle.dumps(print)))
