"""Folders, .npz files and statistics: the same images are the same, and what is wrong is named."""

import json
import re
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lamamba.config import EvaluateConfig
from lamamba.data import fashion_mnist, load_fashion_mnist
from lamamba.errors import ConfigError, DataError
from lamamba.evaluation.image_sets import ImageSet, open_images, open_reference, read_settings


def pixels(num: int = 5, size: tuple[int, int] = (6, 8), channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num, *size, channels), dtype=np.uint8)


def write_folder(folder: Path, images: np.ndarray, settings: list[dict[str, object] | None] | None = None) -> Path:
    folder.mkdir(parents=True)
    for index, image in enumerate(images):
        metadata = PngInfo()
        if settings and settings[index] is not None:
            metadata.add_text("lamamba", json.dumps(settings[index]))
        Image.fromarray(image.squeeze()).save(folder / f"{index:04d}.png", pnginfo=metadata)
    return folder


def read(images: ImageSet, channels: int = 3, batch_size: int = 2) -> np.ndarray:
    return torch.cat([batch for _, batch in images.batches(batch_size, channels)]).numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_and_both_kinds_of_npz_are_the_same(tmp_path: Path, channels: int) -> None:
    images = pixels(channels=channels)
    write_folder(tmp_path / "folder", images)
    np.savez(tmp_path / "plain.npz", images)
    np.savez_compressed(tmp_path / "small.npz", arr_0=images, labels=np.arange(5))
    found = [open_images(str(tmp_path / name)) for name in ("folder", "plain.npz", "small.npz")]
    for one in found:
        assert one.num_images == 5
        np.testing.assert_array_equal(read(one), np.broadcast_to(images, (5, 6, 8, 3)))
        assert one.size == (6, 8)
        if channels == 1:
            np.testing.assert_array_equal(read(one, channels=1, batch_size=5), images)
    assert len({one.pixels_sha256 for one in found}) == 1
    write_folder(tmp_path / "other", images[::-1])
    other = open_images(str(tmp_path / "other"))
    read(other)
    assert other.pixels_sha256 != found[0].pixels_sha256


def test_folders_at_any_depth_and_cropped(tmp_path: Path) -> None:
    write_folder(tmp_path / "set" / "one" / "deep", pixels(2, (12, 16)))
    write_folder(tmp_path / "set" / "two", pixels(3, (20, 10)))
    (tmp_path / "set" / "two" / "up").symlink_to("..")
    (tmp_path / "set" / "x.heic").write_text("no image")
    images = open_images(str(tmp_path / "set"), image_size=6)
    assert read(images).shape == (5, 6, 6, 3)
    assert images.left_out == "1 .heic, 1 links to folders that are read already"


def test_named_sets() -> None:
    images = open_images("builtin")
    assert images.num_images == 10_000
    names, batch = next(images.batches(4, 1))
    assert batch.shape == (4, 1, 32, 32)
    assert names[3] == "image 3 of builtin"


def test_fashion_mnist_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fashion_mnist, "FASHION_MNIST_FOLDER", tmp_path)
    for number, prefix in ((6, "train"), (5, "t10k")):
        for name, magic, shape in (("images-idx3", 0x0803, (number, 28, 28)), ("labels-idx1", 0x0801, (number,))):
            content = np.random.default_rng(number).integers(0, 10, shape, np.uint8).tobytes()
            header = struct.pack(f">{1 + len(shape)}I", magic, *shape)
            (tmp_path / f"{prefix}-{name}-ubyte").write_bytes(header + content)
    for name, split, number in (("fashion-mnist", "train", 6), ("fashion-mnist-test", "test", 5)):
        images = open_images(name)
        assert images.num_images == number
        (_, batch), _ = images.batches(3, 1)
        np.testing.assert_array_equal(batch, load_fashion_mnist(split).images[:3])
    monkeypatch.setattr(fashion_mnist, "FASHION_MNIST_FOLDER", tmp_path / "missing")
    assert open_images("fashion-mnist-test", data_folder=tmp_path).num_images == 5
    with pytest.raises(ConfigError, match="left out without fashion-mnist"):
        EvaluateConfig("samples", "builtin", data_folder=tmp_path)


def test_all_of_fashion_mnist_by_name(whole_fashion_mnist: None) -> None:
    _, first = next(open_images("builtin").batches(4, 1))
    _, first_of_all = next(open_images("fashion-mnist").batches(4, 1))
    assert torch.equal(torch.as_tensor(first_of_all), torch.as_tensor(first))
    test = open_images("fashion-mnist-test")
    assert (open_images("fashion-mnist").num_images, test.num_images) == (60_000, 10_000)
    _, others = next(test.batches(4, 1))
    np.testing.assert_array_equal(others, load_fashion_mnist("test").images[:4])


def test_statistics_with_and_without_images(tmp_path: Path) -> None:
    mean, covariance = np.arange(4, dtype=np.float32), np.eye(4)
    np.savez(
        tmp_path / "both.npz", arr_0=pixels(), mu=mean, sigma=covariance, mu_s=mean[:2], sigma_s=covariance[:2, :2]
    )
    np.savez(tmp_path / "plain.npz", mu=mean, sigma=covariance)
    both, plain = (open_reference(str(tmp_path / name)) for name in ("both.npz", "plain.npz"))
    assert both.images is not None
    assert read(both.images).shape == (5, 6, 8, 3)
    assert both.features is not None
    assert both.spatial is not None
    assert both.spatial.mean.tolist() == [0, 1]
    assert plain.features is not None
    assert plain.features.mean.dtype == plain.features.covariance.dtype == torch.float64
    assert (plain.images, plain.spatial) == (None, None)
    assert both.sha256 != plain.sha256
    with pytest.raises(DataError, match=r"plain.npz has statistics but no images \(arr_0\)"):
        open_images(str(tmp_path / "plain.npz"))


def test_what_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "shard-00000000.tar").write_text("x")
    (tmp_path / "text.txt").write_text("x")
    (tmp_path / "text.npz").write_text("x")
    eye = np.eye(3)
    arrays: dict[str, dict[str, np.ndarray]] = {
        "floats": {"arr_0": pixels().astype(np.float32)},
        "planes_first": {"arr_0": pixels().transpose(0, 3, 1, 2)},
        "none": {"arr_0": pixels()[:0]},
        "unknown": {"images": pixels(), "y": eye},
        "shapes": {"mu": np.zeros(3), "sigma": np.eye(4)},
        "nan": {"mu": np.array([0, np.nan, 0]), "sigma": eye},
        "askew": {"mu": np.zeros(3), "sigma": eye + np.triu(np.ones((3, 3)))},
        "negative": {"mu": np.zeros(3), "sigma": -eye},
        "half": {"mu": np.zeros(3)},
        "objects": {"mu": np.array([None, 1]), "sigma": eye},
    }
    for name, content in arrays.items():
        np.savez(tmp_path / f"{name}.npz", **content)
    for name, message in (
        ("empty", "empty has no images"),
        ("tars", "tars holds tars: unpack them, or generate the images with --format png or npz"),
        ("gone", "gone is missing: give a folder of images, a .npz file"),
        ("text.txt", "text.txt is none of what can be scored: give a folder of images, a .npz file"),
        ("text.npz", "text.npz cannot be read as a .npz file"),
        ("floats.npz", "floats.npz is float32 (5, 6, 8, 3): images are uint8 (n, height, width, 3)"),
        ("planes_first.npz", "planes_first.npz is uint8 (5, 3, 6, 8)"),
        ("none.npz", "none.npz is uint8 (0, 6, 8, 3)"),
        ("unknown.npz", "unknown.npz has the arrays images, y: images are in arr_0, statistics in mu and sigma"),
        ("shapes.npz", "shapes.npz have shapes (3,) and (4, 4), not (d,) and (d, d)"),
        ("nan.npz", "nan.npz have numbers that are not finite"),
        ("askew.npz", "the matrix is not symmetric"),
        ("negative.npz", "a variance is negative"),
        ("half.npz", "half.npz cannot be read as a .npz file"),
        ("objects.npz", "objects.npz cannot be read as a .npz file"),
    ):
        with pytest.raises(DataError, match=re.escape(message)):
            open_reference(str(tmp_path / name))


def write_array(path: Path, name: str, header: str, content: bytes, compression: int = zipfile.ZIP_STORED) -> str:
    """Write a .npz whose header is as given; returns its path."""
    text = header.encode() + b"\n"
    with zipfile.ZipFile(path, "a", compression) as archive:
        array = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + content
        archive.writestr(f"{name}.npy", array)
    return str(path)


def header(shape: str, dtype: str = "|u1", fortran: bool = False) -> str:
    return f"{{'descr': '{dtype}', 'fortran_order': {fortran}, 'shape': {shape}, }}"


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("(2, 60000, 60000, 3)", "arr_0 claims 21,600,000,000 bytes for uint8 (2, 60000, 60000, 3), but has 192"),
        ("(10000000000000, 8, 8, 3)", "arr_0 claims 1,920,000,000,000,000 bytes"),
        ("(1, 8, 8, 3, )", None),
        ("(2, 8, 8, 3)", "arr_0 claims 384 bytes for uint8 (2, 8, 8, 3), but has 192"),
        ("(1, True, 64, 3)", "arr_0 has the shape (1, True, 64, 3)"),
        ("(-1, -8, 8, 3)", "arr_0 has the shape (-1, -8, 8, 3)"),
        ("(1.0, 8, 8, 3)", "cannot be read as a .npz file"),
        ("192", "cannot be read as a .npz file"),
        ("(((((((", "cannot be read as a .npz file"),
        ("(2," * 5000 + ")" * 5000, "is large and may not be safe to load securely"),
        ("(0, 8, 8, 3)", "claims 0 bytes for uint8 (0, 8, 8, 3), but has 192"),
    ],
)
def test_what_a_header_claims_is_compared_with_the_file(
    tmp_path: Path, shape: str, message: str | None, compression: int
) -> None:
    path = write_array(tmp_path / "a.npz", "arr_0", header(shape), bytes(192), compression)
    if message is None:
        assert open_images(path).num_images == 1
        return
    with pytest.raises(DataError, match=re.escape(message)):
        open_images(path)


def test_statistics_that_claim_too_much_are_not_read(tmp_path: Path) -> None:
    for name, shape, dtype, message in (
        ("a", "(60000, 60000)", "<f8", "sigma claims 28,800,000,000 bytes for float64 (60000, 60000), but has 192"),
        ("b", "(24,)", "<c8", "sigma of .* is complex64"),
        ("c", "(True, 24)", "<f8", "sigma has the shape (True, 24)"),
        ("d", "(192,)", "|O", "cannot be read as a .npz file"),
        ("e", "(0, 0)", "|V0", "sigma holds"),
    ):
        path = tmp_path / f"{name}.npz"
        np.savez(path, mu=np.zeros(3))
        write_array(path, "sigma", header(shape, dtype), bytes(192))
        with pytest.raises(DataError, match=message if "*" in message else re.escape(message)):
            open_reference(str(path))
    bomb = write_array(tmp_path / "f.npz", "mu", header("(20000,)"), bytes(20_000), zipfile.ZIP_DEFLATED)
    write_array(Path(bomb), "sigma", header("(1, 1)"), bytes(1))
    with pytest.raises(DataError, match=r"mu of .* is uint8 \(20000,\): statistics are .* up to 16,384 features"):
        open_reference(bomb)


def test_a_directory_that_lies_about_sizes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    write_array(path, "arr_0", header("(10000, 100, 100, 3)"), bytes(192))
    content = path.read_bytes()
    length = len(header("(10000, 100, 100, 3)")) + 1 + 10
    true, claimed = ((length + size).to_bytes(4, "little") for size in (192, 300_000_000))
    assert content.count(true) == 4  # compressed and not, in front of the file and in the directory
    path.write_bytes(content.replace(true, claimed))
    with pytest.raises(DataError, match="arr_0 claims 300,000,000 bytes, more than the file can contain"):
        open_images(str(path))


def test_images_beyond_the_limit_of_files_and_in_fortran_order_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez_compressed(tmp_path / "large.npz", np.zeros((1, 300, 300, 1), np.uint8))
    np.savez(tmp_path / "fortran.npz", np.asfortranarray(pixels()))
    assert open_images(str(tmp_path / "large.npz")).num_images == 1
    monkeypatch.setattr("lamamba.evaluation.image_sets._MOST_PIXELS", 300 * 299)
    with pytest.raises(DataError, match=r"images of .*large.npz have 300x300 pixels: 89,700 are the most"):
        open_images(str(tmp_path / "large.npz"))
    with pytest.raises(DataError, match=r"arr_0 of .*fortran.npz is in Fortran order: save numpy.ascontiguousarray"):
        open_images(str(tmp_path / "fortran.npz"))


def test_statistics_in_fortran_order_and_of_whole_numbers(tmp_path: Path) -> None:
    covariance = np.asfortranarray(np.array([[2, 1], [1, 3]], dtype=np.int32))
    np.savez_compressed(tmp_path / "a.npz", mu=np.arange(2, dtype=np.float16), sigma=covariance)
    features = open_reference(str(tmp_path / "a.npz")).features
    assert features is not None
    assert features.covariance.tolist() == [[2, 1], [1, 3]]


def test_damaged_images_are_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "folder", pixels())
    (tmp_path / "folder" / "0003.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"0003\.png cannot be read .*: replace or delete it$"):
        read(open_images(str(tmp_path / "folder")))
    np.savez(tmp_path / "set.npz", pixels(size=(60, 80)))
    content = bytearray((tmp_path / "set.npz").read_bytes())
    content[40_000] ^= 1
    (tmp_path / "set.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"the array arr_0 of .*set\.npz is damaged"):
        read(open_images(str(tmp_path / "set.npz")))


def test_sizes_that_differ_and_colour_where_grey_is_asked(tmp_path: Path) -> None:
    write_folder(tmp_path / "set" / "a", pixels(2))
    write_folder(tmp_path / "set" / "b", pixels(2, (6, 9)))
    with pytest.raises(DataError, match=r"b/0000.png is 6x9 and .*a/0000.png 6x8: give images of one size"):
        read(open_images(str(tmp_path / "set")))
    with pytest.raises(DataError, match=r"a/0000.png is in color"):
        read(open_images(str(tmp_path / "set" / "a")), channels=1)


def settings(**changes: object) -> dict[str, object]:
    return {"checkpoint": "runs/a", "steps": 25, "guidance": 2.0, "label": 0, "seed": 0, **changes}


def test_settings_are_gathered(tmp_path: Path) -> None:
    folder = write_folder(
        tmp_path / "a", pixels(4), [settings(seed=seed, label=seed // 2) for seed in (10, 11, 12, 13)]
    )
    gathered, warned = read_settings(open_images(str(folder)))
    assert gathered == {
        "checkpoint": "runs/a", "steps": 25, "guidance": 2.0, "images_of_label": {"5": 2, "6": 2},
        "seeds": {"first": 10, "last": 13, "different": 4},
    }  # fmt: skip
    assert warned == []


def test_settings_that_differ_or_lack_are_warned_of(tmp_path: Path) -> None:
    mixed: list[dict[str, object] | None] = [settings(), settings(steps=50), settings(steps=50), None]
    gathered, warned = read_settings(open_images(str(write_folder(tmp_path / "mixed", pixels(4), mixed))))
    assert gathered is not None
    assert gathered["steps"] == {"different": 2, "images_of_value": {"50": 2, "25": 1}}
    assert warned == ["1 of 4 generated images do not say how", "generated images differ in steps: 50, 25"]
    gathered, warned = read_settings(open_images(str(write_folder(tmp_path / "none", pixels(4)))))
    assert gathered is None
    assert "does not say how its images were made" in warned[0]


def test_a_set_in_one_file_has_its_settings_beside_it(tmp_path: Path) -> None:
    np.savez(tmp_path / "samples.npz", arr_0=np.zeros((2, 4, 4, 1), np.uint8))
    assert read_settings(open_images(str(tmp_path)))[0] is None
    (tmp_path / "generation.json").write_text(json.dumps({"format": "png", "steps": 25}))
    assert read_settings(open_images(str(tmp_path)))[0] is None  # of other images
    (tmp_path / "generation.json").write_text(json.dumps({"format": "npz", "steps": 25}))
    for name in (tmp_path, tmp_path / "samples.npz"):
        assert read_settings(open_images(str(name))) == ({"format": "npz", "steps": 25}, [])
    np.savez(tmp_path / "others.npz", arr_0=np.zeros((2, 4, 4, 1), np.uint8))
    assert read_settings(open_images(str(tmp_path / "others.npz")))[0] is None
