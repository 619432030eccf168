"""The networks: Inception's layers and its scaling, its file, and any other TorchScript."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_networks import Flat, FloatMeans, Means, TinyInception, save, save_tiny_inception
from torch import nn

from lamamba.errors import ConfigError
from lamamba.evaluation import features
from lamamba.evaluation.features import open_features, resize_as_in_2015
from lamamba.files import checksum

CPU = torch.device("cpu")


def images(num: int = 3, channels: int = 3, size: tuple[int, int] = (20, 30)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num, channels, *size), generator=generator, dtype=torch.uint8)


@pytest.fixture
def inception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = save_tiny_inception(tmp_path / "graph.pt")
    monkeypatch.setattr(features, "INCEPTION_SHA256", checksum(path))
    monkeypatch.setattr(features, "INCEPTION_URL", path.as_uri())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return path


@pytest.mark.parametrize("size", [(5, 7), (299, 299), (400, 310)])
def test_scaling_as_in_2015_by_loops(size: tuple[int, int]) -> None:
    image = images(1, 1, size)
    found = resize_as_in_2015(image.float())[0, 0].numpy()
    pixels = image[0, 0].numpy().astype(float)
    height, width = size
    for row, column in ((0, 0), (3, 298), (298, 2), (150, 151), (298, 298)):
        y, x = row * height / 299, column * width / 299
        top, left = int(y), int(x)
        bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
        above = pixels[top, left] + (pixels[top, right] - pixels[top, left]) * (x - left)
        below = pixels[bottom, left] + (pixels[bottom, right] - pixels[bottom, left]) * (x - left)
        assert found[row, column] == pytest.approx(above + (below - above) * (y - top), abs=1e-3)


def test_inception_by_its_layers(inception: Path) -> None:
    network = open_features(str(inception), CPU)
    assert (network.name, network.sha256, network.channels, network.is_standard) == (
        "inception", checksum(inception), 3, True,
    )  # fmt: skip
    found = network(images())
    module = torch.jit.load(inception)
    with torch.no_grad():
        torch.testing.assert_close(found.features, module(images(), return_features=True), rtol=1e-4, atol=1e-4)
        assert found.logits is not None
        classes = module(images(), no_output_bias=True)
        torch.testing.assert_close(found.logits.softmax(dim=1), classes, rtol=1e-4, atol=1e-5)
        assert (module(images()) - classes).abs().max() > 1e-3, "the bias matters"
    assert found.spatial is not None
    assert found.spatial.shape == (3, 2023)


def test_spatial_features_are_in_the_order_of_published_statistics(inception: Path) -> None:
    found = open_features(str(inception), CPU)(images(1)).spatial
    module = torch.jit.load(inception)
    x = (resize_as_in_2015(images(1).float()) - 128) / 128
    with torch.no_grad():
        planes = module.layers.mixed_6.conv(module.layers.conv(x))[0].numpy()
    expected = np.array([planes[c, y, x] for y in range(17) for x in range(17) for c in range(7)])
    assert found is not None
    np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_inception_is_fetched_once_and_checked(inception: Path, tmp_path: Path) -> None:
    open_features("inception", CPU)
    cached = tmp_path / "cache" / "lamamba" / "graph.pt"
    assert cached.read_bytes() == inception.read_bytes()
    inception.rename(tmp_path / "gone")
    open_features("inception", CPU)
    cached.write_bytes(b"damaged")
    with pytest.raises(ConfigError, match=r"graph.pt does not have the checksum .*: delete it"):
        open_features("inception", CPU)


def test_inception_that_cannot_be_fetched(inception: Path, tmp_path: Path) -> None:
    content = inception.read_bytes()
    inception.write_bytes(content[:-1])
    with pytest.raises(ConfigError, match=r"could not be downloaded .*its checksum is not .* elsewhere and give it"):
        open_features("inception", CPU)
    inception.unlink()
    with pytest.raises(ConfigError, match=r"could not be downloaded .* elsewhere and give it with features"):
        open_features("inception", CPU)
    assert not list(tmp_path.glob("cache/lamamba/*"))


def test_a_graph_that_is_not_what_its_layers_say_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = TinyInception()
    network.layers.add_module("more", nn.Dropout())
    path = save(network, tmp_path / "graph.pt")
    monkeypatch.setattr(features, "INCEPTION_SHA256", checksum(path))
    monkeypatch.setattr(features, "resize_as_in_2015", lambda images: torch.zeros(len(images), 3, 299, 299))
    with pytest.raises(ConfigError, match="by its layers is not inception as a whole"):
        open_features(str(path), CPU)(images())


def test_other_files_and_what_they_take(tmp_path: Path) -> None:
    network = open_features(str(save(Means(), tmp_path / "means.pt")), CPU)
    assert (network.name, network.channels, network.is_standard) == ("means.pt", 3, False)
    found = network(images())
    torch.testing.assert_close(found.features[:, :3], images().float().mean(dim=(2, 3)))
    assert (found.logits, found.spatial) == (None, None)

    floats = save(FloatMeans(), tmp_path / "floats.pt")
    found = open_features(str(floats), CPU, "float")(images())
    torch.testing.assert_close(found.features, images().float().mean(dim=(2, 3)) / 255)
    with pytest.raises(ConfigError, match=r"floats.pt cannot take images \(3, 3, 20, 30\) of uint8 .*pixels"):
        open_features(str(floats), CPU)(images())


def test_the_clothes_network_is_small_and_says_its_classes() -> None:
    from lamamba.data import load_builtin

    network = open_features("clothes", CPU)
    assert (network.channels, network.sizes) == (1, ((28, 28), (32, 32)))
    builtin = load_builtin()
    pictures = torch.from_numpy(builtin.images[:500])
    found = network(pictures)
    assert found.features.shape == (500, 64)
    assert found.logits is not None
    assert (found.logits.argmax(dim=1) == torch.from_numpy(builtin.labels[:500])).float().mean() > 0.9
    torch.testing.assert_close(network(pictures[..., 2:-2, 2:-2]).features, found.features, rtol=1e-4, atol=1e-4)
    path = Path(features.__file__).parents[1] / "assets" / "clothes" / "features.safetensors"
    assert path.stat().st_size < 1_000_000
    assert network.sha256 == checksum(path)


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("no network")
    for name, message in (
        ("dinov2", "features dinov2 is no file: give inception, clothes or a TorchScript file"),
        (str(tmp_path / "text.pt"), "text.pt cannot be read as TorchScript"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            open_features(name, CPU)
    with pytest.raises(ConfigError, match=r"pixels .* is not for features clothes"):
        open_features("clothes", CPU, "float")
    with pytest.raises(ConfigError, match=r"flat.pt returned \(3, 3, 20, 30\) for 3 images"):
        open_features(str(save(Flat(), tmp_path / "flat.pt")), CPU)(images())
