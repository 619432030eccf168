"""`lamamba evaluate`: scores that mean what they say, and every doubt said."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tiny_networks import Means, NotANumber, save, save_tiny_inception

from lamamba.cli import main
from lamamba.data import ArraySource, load_builtin, load_fashion_mnist
from lamamba.evaluation import evaluate as command
from lamamba.evaluation import features, metrics
from lamamba.files import checksum
from refusals import refusal


def clothes(num: int, first: int = 0) -> np.ndarray:
    """Clothes, uint8 (n, 32, 32, 1)."""
    images: np.ndarray = load_builtin().images[first : first + num].transpose(0, 2, 3, 1)
    return images


def write(folder: Path, images: np.ndarray, **settings: object) -> Path:
    folder.mkdir(parents=True)
    for index, image in enumerate(images):
        metadata = PngInfo()
        if settings:
            metadata.add_text("lamamba", json.dumps({**settings, "label": index % 10, "seed": index}))
        Image.fromarray(image.squeeze()).save(folder / f"{index:04d}.png", pnginfo=metadata)
    return folder


def write_npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def run(folder: Path, generated: object, reference: object, *options: str) -> dict[str, Any]:
    out = folder / "scores.json"
    main(["evaluate", str(generated), str(reference), "--device", "cpu", "--out", str(out), *options])
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: object) -> str:
    out = folder / "none.json"
    line = refusal(capsys, lambda: main(["evaluate", *map(str, arguments), "--device", "cpu", "--out", str(out)]))
    assert not out.exists()
    return line


CLOTHES = ("--features", "clothes")


def test_the_result_says_all_that_tells_two_numbers_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generated = write(
        tmp_path / "generated", clothes(100), checkpoint="runs/a", sampler="dpm++", steps=25, guidance=2.0
    )
    reference = write_npz(tmp_path / "reference.npz", arr_0=clothes(120, 100))
    result = run(tmp_path, generated, reference, *CLOTHES)
    assert set(result["scores"]) == {
        "fd", "class_score", "kd", "kd_deviation", "precision", "recall", "density", "coverage",
    }  # fmt: skip
    assert result["left_out"] == {"sfd": "features clothes have no spatial part"}
    assert result["generated"]["images"], result["reference"]["images"] == (100, 120)
    assert (result["generated"]["height"], result["generated"]["width"]) == (32, 32)
    assert result["features"]["dimension"] == 64
    asset = Path(features.__file__).parents[1] / "assets" / "clothes" / "features.safetensors"
    assert result["features"]["sha256"] == checksum(asset)
    assert result["generation"]["sampler"] == "dpm++"
    assert result["generation"]["seeds"] == {"first": 0, "last": 99, "different": 100}
    assert result["torch"] == torch.__version__
    assert [text.split(" are few for")[0] for text in result["warnings"]] == [
        "100 generated images",
        "120 reference images",
    ]
    shown = capsys.readouterr().out
    for text in ("100 images of", "against 120 images of", "features clothes, 64 numbers", "Fréchet distance", "±"):
        assert text in shown
    assert "FID" not in shown, "which is the name of another number"
    assert f"{result['scores']['fd']:.5g}" in shown


def test_the_scores_are_those_of_the_features(tmp_path: Path) -> None:
    ours, theirs = clothes(60), clothes(70, 60)
    result = run(tmp_path, write(tmp_path / "a", ours), write(tmp_path / "b", theirs), *CLOTHES, "--batch-size", "7")
    network = features.open_features("clothes", torch.device("cpu"))
    one, other = (network(torch.from_numpy(images.transpose(0, 3, 1, 2))) for images in (ours, theirs))
    moments = []
    for found in (one, other):
        moments.append(metrics.Moments())
        moments[-1].add(found.features)
    expected = metrics.frechet_distance(moments[0].gaussian(), moments[1].gaussian())
    assert result["scores"]["fd"] == pytest.approx(expected, rel=1e-5)
    assert result["scores"]["kd"] == pytest.approx(metrics.kernel_distance(one.features, other.features)[0], rel=1e-3)
    assert one.logits is not None
    assert result["scores"]["class_score"] == pytest.approx(metrics.inception_score(one.logits)[0], rel=1e-5)
    assert result["scores"]["recall"] == metrics.compare_neighbours(one.features, other.features).recall


def test_all_kinds_of_references_agree(tmp_path: Path) -> None:
    generated, images = write(tmp_path / "generated", clothes(80)), clothes(90, 80)
    found = features.open_features("clothes", torch.device("cpu"))(torch.from_numpy(images.transpose(0, 3, 1, 2)))
    x = found.features.double().numpy()
    statistics = {"mu": x.mean(axis=0), "sigma": np.cov(x, rowvar=False)}
    in_colour = images.repeat(3, axis=3)
    results = [
        run(tmp_path, generated, reference, *CLOTHES)
        for reference in (
            write(tmp_path / "folder", images),
            write_npz(tmp_path / "images.npz", arr_0=in_colour),
            write_npz(tmp_path / "both.npz", arr_0=in_colour, **statistics),
            write_npz(tmp_path / "statistics.npz", **statistics),
        )
    ]
    folder, npz, both, alone = (result["scores"] for result in results)
    assert folder == npz
    assert both == pytest.approx(folder, rel=1e-6)
    assert alone["fd"] == both["fd"]
    assert alone.keys() == {"fd", "class_score"}
    assert results[3]["left_out"]["kd"] == f"{tmp_path / 'statistics.npz'} has statistics and no images"
    assert results[0]["reference"]["pixels_sha256"] == results[1]["reference"]["pixels_sha256"]
    assert results[3]["reference"]["statistics_sha256"] == checksum(tmp_path / "statistics.npz")
    assert any("does not say which features" in warning for warning in results[3]["warnings"])


def test_published_statistics_go_before_images(tmp_path: Path) -> None:
    statistics = {"mu": np.zeros(64), "sigma": np.eye(64)}
    generated = write(tmp_path / "generated", clothes(70))
    both = run(tmp_path, generated, write_npz(tmp_path / "both.npz", arr_0=clothes(70, 70), **statistics), *CLOTHES)
    alone = run(tmp_path, generated, write_npz(tmp_path / "alone.npz", **statistics), *CLOTHES)
    assert both["scores"]["fd"] == alone["scores"]["fd"]


def test_inception_has_the_names_of_papers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    graph = save_tiny_inception(tmp_path / "graph.pt", side=5)
    monkeypatch.setattr(features, "INCEPTION_SHA256", checksum(graph))
    pixels = np.random.default_rng(0).integers(0, 256, (30, 10, 12, 3), dtype=np.uint8)
    generated = write(tmp_path / "generated", pixels[:15])
    images = write_npz(tmp_path / "images.npz", arr_0=pixels[15:])
    result = run(tmp_path, generated, images, "--features", str(graph))
    assert {"fid", "sfid", "inception_score", "kid", "precision"} < set(result["scores"])
    assert result["features"]["name"] == "inception"
    assert any("published FIDs are of 50,000 images; 15 give a higher one" in text for text in result["warnings"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("FID", "sFID", "KID", "Inception score"))

    network = features.open_features(str(graph), torch.device("cpu"))
    found = network(torch.from_numpy(pixels[15:].transpose(0, 3, 1, 2)))
    assert found.spatial is not None
    x, s = found.features.double().numpy(), found.spatial.double().numpy()
    published = {"mu": x.mean(axis=0), "sigma": np.cov(x, rowvar=False)}
    spatial = {"mu_s": s.mean(axis=0), "sigma_s": np.cov(s, rowvar=False)}
    all_of_it = run(
        tmp_path, generated, write_npz(tmp_path / "all.npz", **published, **spatial), "--features", str(graph)
    )
    for name in ("fid", "sfid"):
        assert all_of_it["scores"][name] == pytest.approx(result["scores"][name], rel=1e-4)
    part = run(tmp_path, generated, write_npz(tmp_path / "part.npz", **published), "--features", str(graph))
    assert part["left_out"]["sfid"] == f"{tmp_path / 'part.npz'} has no mu_s and sigma_s"


def test_the_definitions_are_those_that_were_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "KERNEL_SUBSET_SIZE", 20)
    folders = write(tmp_path / "a", clothes(12)), write(tmp_path / "b", clothes(30))
    assert run(tmp_path, *folders, *CLOTHES)["definitions"]["kernel_subset_size"] == 12
    assert run(tmp_path, folders[1], folders[1], *CLOTHES)["definitions"]["kernel_subset_size"] == 20


def test_too_few_images_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(tmp_path, write(tmp_path / "a", clothes(5)), write(tmp_path / "b", clothes(30, 5)), *CLOTHES)
    assert any("5 generated images are too few for 64 features" in warning for warning in result["warnings"])
    assert any("30 reference images are too few for 64 features" in warning for warning in result["warnings"])
    assert result["left_out"]["recall"] == "they need 6 images of each set"
    shown = capsys.readouterr().out
    assert "warning: 5 generated images are too few" in shown
    assert "left out: precision, recall, density, coverage: they need 6 images" in shown


def test_what_does_not_fit_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small, large = (
        write(tmp_path / "small", clothes(8)),
        write(tmp_path / "large", clothes(8).repeat(2, 1).repeat(2, 2)),
    )
    colour = write(tmp_path / "colour", np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8))
    means = save(Means(), tmp_path / "means.pt")
    statistics = write_npz(tmp_path / "statistics.npz", mu=np.zeros(3), sigma=np.eye(3))
    for arguments, message in (
        ((small, large, "--features", means), "large has images of 64x64, which scores would compare too"),
        ((small, large, *CLOTHES), "large has images of 64x64, and features clothes are of 28x28 or 32x32"),
        ((colour, small, *CLOTHES), "0000.png is in color and these features are for gray images"),
        ((small, statistics, *CLOTHES), "mu and sigma of " + str(statistics) + " are of 3 features and clothes has 64"),
        ((statistics, small, *CLOTHES), "statistics.npz has statistics but no images (arr_0)"),
        ((write(tmp_path / "one", clothes(1)), small, *CLOTHES), "one has 1 image: statistics need 2"),
        ((small, tmp_path / "gone", *CLOTHES), "gone is missing"),
        ((small, small, "--features", "clothing"), "features clothing is no file"),
        ((small, small, *CLOTHES, "--nearest-images", "5"), "nearest_images is 5: it must be 6 or more"),
        ((small, small, *CLOTHES, "--image-size", "0"), "image_size is 0: it must be 1 or more"),
    ):
        assert message in refused(capsys, tmp_path, *arguments)


def test_a_feature_that_is_not_finite_names_the_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = clothes(12)
    images[7] = 0
    generated, network = write(tmp_path / "generated", images), save(NotANumber(), tmp_path / "network.pt")
    error = refused(capsys, tmp_path, generated, generated, "--features", network, "--batch-size", "5")
    assert "0007.png are not finite" in error


def test_without_torchmetrics_two_scores_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "HAS_TORCHMETRICS", False)
    result = run(tmp_path, write(tmp_path / "a", clothes(10)), write(tmp_path / "b", clothes(10, 10)), *CLOTHES)
    assert "fd" in result["scores"]
    for name in ("class_score", "kd"):
        assert "pip install 'lamamba[evaluate]'" in result["left_out"][name]


def test_every_option_changes_something(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", clothes(40).repeat(2, 1)), write(tmp_path / "b", clothes(40, 40).repeat(2, 1))
    means = str(save(Means(), tmp_path / "means.pt"))

    def scores(*options: str) -> dict[str, float]:
        found: dict[str, float] = run(tmp_path, a, b, "--features", means, *options)["scores"]
        return found

    plain = scores()
    assert scores() == plain
    assert scores("--pixels", "float")["fd"] == pytest.approx(plain["fd"] / 255**2, rel=1e-4)
    assert scores("--image-size", "32")["fd"] != pytest.approx(plain["fd"], rel=1e-3)
    few = scores("--nearest-images", "10")
    assert few["fd"] == plain["fd"]
    assert few["density"] != plain["density"]
    assert scores("--nearest-images", "10", "--seed", "1")["density"] != few["density"]


def test_sizes_that_the_network_makes_alike(tmp_path: Path) -> None:
    generated = write(tmp_path / "generated", clothes(70))
    padded = run(tmp_path, generated, write(tmp_path / "padded", clothes(70, 70)), *CLOTHES)
    bare = run(tmp_path, generated, write(tmp_path / "bare", clothes(70, 70)[:, 2:-2, 2:-2]), *CLOTHES)
    assert bare["scores"] == pytest.approx(padded["scores"], rel=1e-4)


def test_a_score_that_is_not_finite_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command.metrics, "kernel_distance", lambda *_, seed: (float("nan"), 0.0))
    images = write(tmp_path / "a", clothes(10))
    assert "kd of" in refused(capsys, tmp_path, images, images, *CLOTHES)


@pytest.fixture
def held_out_images(whole_fashion_mnist: None) -> ArraySource:
    return load_fashion_mnist("test")


@pytest.fixture
def training_images() -> ArraySource:
    return load_builtin()


@pytest.mark.parametrize("others", ["training_images", "held_out_images"])
def test_the_clothes_network_sees_what_is_wrong_with_clothes(request: pytest.FixtureRequest, others: str) -> None:
    """Its distances grow with noise, blur and every missing class; other images of the set are near."""
    network = features.open_features("clothes", torch.device("cpu"))

    def statistics(images: torch.Tensor) -> metrics.Gaussian:
        moments = metrics.Moments()
        for part in images.split(500):
            moments.add(network(part).features)
        return moments.gaussian()

    reference = statistics(torch.from_numpy(load_builtin().images[:2000]))
    source = request.getfixturevalue(others)
    images, labels = torch.from_numpy(source.images[-1000:]), torch.from_numpy(source.labels[-1000:])
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))

    def blurred(radius: int) -> torch.Tensor:
        window = torch.nn.functional.avg_pool2d(images.float(), 2 * radius + 1, 1, radius, count_include_pad=False)
        return window.round().to(torch.uint8)

    cases = {
        "noise": [(images + amount * noise).clamp(0, 255).to(torch.uint8) for amount in (16, 32, 64)],
        "blur": [blurred(radius) for radius in (1, 2, 3)],
        "classes": [images[labels < num] for num in (9, 6, 3)],
    }
    near = metrics.frechet_distance(statistics(images), reference)
    for name, worse in cases.items():
        distances = [near, *(metrics.frechet_distance(statistics(part), reference) for part in worse)]
        assert distances == sorted(distances), (name, distances)
        assert distances[-1] > 5 * near, (name, distances)
