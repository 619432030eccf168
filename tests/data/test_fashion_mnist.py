import gzip
import io
import struct
import sys
from importlib.resources import files

import huggingface_hub
import numpy as np
import pyarrow
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from pyarrow import parquet

from lamamba.data import batches, fashion_mnist, load_builtin, load_fashion_mnist, open_source
from lamamba.errors import ConfigError, DataError

needs_whole_set = pytest.mark.usefixtures("whole_fashion_mnist")


def write_idx(path, array, magic=None, shape=None):
    magic = 0x0800 + array.ndim if magic is None else magic
    shape = array.shape if shape is None else shape
    content = struct.pack(f">{1 + len(shape)}I", magic, *shape) + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def make_idx_folder(folder, suffix=".gz", length=5):
    for number, prefix in enumerate(("train", "t10k")):
        images = np.random.default_rng(number).integers(0, 256, (length, 28, 28))
        write_idx(folder / f"{prefix}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{suffix}", np.arange(length) + number)
    return folder


@pytest.fixture
def without_debian(monkeypatch, tmp_path):
    monkeypatch.setattr(fashion_mnist, "FASHION_MNIST_FOLDER", tmp_path / "nowhere")


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_parquet(path, pngs, labels):
    """As the hub has it; one row group would hide an error with several."""
    images = [{"bytes": content, "path": None} for content in pngs]
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = pyarrow.table({"image": pyarrow.array(images, kind), "label": pyarrow.array(labels, pyarrow.int64())})
    parquet.write_table(table, path, row_group_size=2)
    return path


def serve(monkeypatch, answer):
    """Let the hub answer with a path or an error; return the list in which its calls are noted."""
    calls = []

    def download(**options):
        calls.append(options)
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return calls


class TestBuiltin:
    def test_has_the_promised_form(self):
        source = open_source("builtin")
        assert (len(source), source.num_classes, source.image_size, source.channels) == (10_000, 10, 32, 1)
        assert source.class_names[0] == "T-shirt/top"
        assert source.class_names[9] == "Ankle boot"
        assert (source.name, source.bad_files) == ("builtin", ())
        image, label = source.load(0)
        assert image.shape == (32, 32, 1)
        assert image.dtype == np.uint8
        assert label == 9  # the set begins with an ankle boot
        border = source.images.copy()
        border[:, :, 2:30, 2:30] = 0
        assert not border.any()
        assert source.images[:, :, 2:30, 2:30].any(axis=(1, 2, 3)).all()

    def test_in_colour_it_is_the_same_grey_three_times(self):
        grey, colour = open_source("builtin"), open_source("builtin", channels=3)
        assert (len(colour), colour.num_classes, colour.image_size, colour.channels) == (10_000, 10, 32, 3)
        assert (colour.load(1)[0] == grey.load(1)[0]).all()
        assert colour.load(1)[0].shape == (32, 32, 3)
        options = {"batch_size": 4, "seed": 0, "horizontal_flip": True}
        (images, labels), (grey_images, grey_labels) = (next(batches(source, **options)) for source in (colour, grey))
        assert torch.equal(images, grey_images.expand(-1, 3, -1, -1))
        assert torch.equal(labels, grey_labels)

    def test_is_small_and_carries_its_licence(self):
        assets = files("lamamba") / "assets"
        assert len((assets / "fashion_mnist_10k.npz").read_bytes()) < 5_000_000
        text = (assets / "fashion_mnist_10k.txt").read_text()
        assert "MIT" in text
        assert "Zalando" in text

    @needs_whole_set
    def test_is_the_start_of_the_training_set(self):
        builtin, full = load_builtin(), load_fashion_mnist("train")
        assert len(full) == 60_000
        assert np.array_equal(builtin.images, full.images[:10_000])
        assert np.array_equal(builtin.labels, full.labels[:10_000])

    @pytest.mark.parametrize(
        "content", [None, b"", b"version https://git-lfs.github.com/spec/v1\n", b"PK\x03\x04broken"]
    )
    def test_names_a_damaged_file(self, monkeypatch, tmp_path, content):
        if content is not None:
            (tmp_path / "fashion_mnist_10k.npz").write_bytes(content)
        monkeypatch.setattr(fashion_mnist, "BUILTIN", tmp_path / "fashion_mnist_10k.npz")
        with pytest.raises(DataError, match=r"fashion_mnist_10k\.npz cannot be read .*: install lamamba again"):
            load_builtin()


class TestFashionMnist:
    @needs_whole_set
    def test_reads_the_test_split(self):
        source = load_fashion_mnist("test")
        assert len(source) == 10_000
        assert np.bincount(source.labels).tolist() == [1000] * 10

    @pytest.mark.parametrize("suffix", [".gz", ""])
    def test_reads_a_given_folder(self, tmp_path, suffix):
        make_idx_folder(tmp_path, suffix)
        source = open_source("fashion-mnist", folder=tmp_path, image_size=32, channels=1)
        expected = np.random.default_rng(0).integers(0, 256, (5, 28, 28))
        assert np.array_equal(source.images[:, 0, 2:30, 2:30], expected)
        assert source.labels.tolist() == [0, 1, 2, 3, 4]
        assert load_fashion_mnist("test", folder=tmp_path).labels.tolist() == [1, 2, 3, 4, 5]

    def test_does_not_fall_back_from_a_given_folder(self, monkeypatch, tmp_path):
        calls = serve(monkeypatch, OSError())
        with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz is not in ") as caught:
            open_source("fashion-mnist", folder=tmp_path / "empty")
        for words in (str(tmp_path / "empty"), "apt install dataset-fashion-mnist", "--data-folder)"):
            assert words in str(caught.value)
        assert not calls

    def test_debians_place_comes_before_the_hub(self, monkeypatch, tmp_path):
        monkeypatch.setattr(fashion_mnist, "FASHION_MNIST_FOLDER", make_idx_folder(tmp_path))
        calls = serve(monkeypatch, OSError())
        assert len(open_source("fashion-mnist")) == 5
        assert not calls

    def test_refuses_another_split(self, tmp_path):
        with pytest.raises(ConfigError, match=r"split 'valid' .*'train' or 'test'"):
            load_fashion_mnist("valid", folder=tmp_path)

    def test_names_a_truncated_file(self, tmp_path):
        path = make_idx_folder(tmp_path) / "train-images-idx3-ubyte.gz"
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz cannot be read"):
            load_fashion_mnist(folder=tmp_path)

    @pytest.mark.parametrize("content", [b"not gzip", gzip.compress(b"abc", mtime=0), b""])
    def test_names_a_file_that_is_no_idx(self, tmp_path, content):
        (make_idx_folder(tmp_path) / "train-labels-idx1-ubyte.gz").write_bytes(content)
        with pytest.raises(DataError, match=r"train-labels-idx1-ubyte\.gz cannot be read as an idx file"):
            load_fashion_mnist(folder=tmp_path)

    def test_names_exchanged_files(self, tmp_path):
        make_idx_folder(tmp_path)
        images = (tmp_path / "train-images-idx3-ubyte.gz").read_bytes()
        (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(images)
        with pytest.raises(DataError, match=r"labels-idx1-ubyte\.gz .*is not of labels, its magic is 2051"):
            load_fashion_mnist(folder=tmp_path)

    def test_a_count_that_no_file_of_this_size_holds_is_not_read(self, tmp_path):
        path = make_idx_folder(tmp_path) / "train-images-idx3-ubyte.gz"
        write_idx(path, np.zeros((2, 28, 28)), shape=(4_000_000_000, 1000, 1000))
        with pytest.raises(DataError, match="cannot reshape array of size 1568 into shape"):
            load_fashion_mnist(folder=tmp_path)

    @pytest.mark.parametrize("announced", [4, 6])
    def test_names_a_wrong_count(self, tmp_path, announced):
        path = make_idx_folder(tmp_path) / "train-labels-idx1-ubyte.gz"
        write_idx(path, np.arange(5), shape=(announced,))
        with pytest.raises(DataError, match=r"labels-idx1-ubyte\.gz .*cannot reshape array of size 5"):
            load_fashion_mnist(folder=tmp_path)

    @pytest.mark.parametrize(
        ("labels", "message"),
        [(np.array([0, 1, 2, 3, 10]), r"labels-idx1.* label 10, outside 0\.\.9"), (np.arange(4), "4 labels for the 5")],
    )
    def test_names_wrong_labels(self, tmp_path, labels, message):
        write_idx(make_idx_folder(tmp_path) / "train-labels-idx1-ubyte.gz", labels)
        with pytest.raises(DataError, match=message):
            load_fashion_mnist(folder=tmp_path)

    @pytest.mark.parametrize("shape", [(5, 32, 32), (0, 28, 28)])
    def test_names_a_wrong_shape(self, tmp_path, shape):
        write_idx(make_idx_folder(tmp_path) / "train-images-idx3-ubyte.gz", np.zeros(shape))
        with pytest.raises(DataError, match=r"images-idx3-ubyte\.gz has shape"):
            load_fashion_mnist(folder=tmp_path)


@pytest.mark.usefixtures("without_debian")
class TestFashionMnistFromTheHub:
    @pytest.mark.parametrize("split", ["train", "test"])
    def test_gives_the_images_and_labels_in_their_order(self, monkeypatch, tmp_path, split):
        pixels = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
        calls = serve(monkeypatch, write_parquet(tmp_path / "a.parquet", map(png, pixels), [9, 0, 0, 3, 5]))
        source = load_fashion_mnist(split)
        assert calls == [
            {
                "repo_id": "zalando-datasets/fashion_mnist",
                "repo_type": "dataset",
                "filename": f"fashion_mnist/{split}-00000-of-00001.parquet",
                "revision": fashion_mnist.HUB_REVISION,
            }
        ]
        assert (source.name, source.num_classes, source.images.shape) == ("fashion-mnist", 10, (5, 1, 32, 32))
        assert source.images.dtype == np.uint8
        assert source.labels.dtype == np.int64
        assert np.array_equal(source.images[:, 0, 2:30, 2:30], pixels)
        assert source.labels.tolist() == [9, 0, 0, 3, 5]

    @pytest.mark.parametrize(
        "fault",
        [
            LocalEntryNotFoundError("An error happened.\n\nPlease check your connection."),
            ConnectionError("offline mode is enabled"),
            RuntimeError("line\n" * 1000),
        ],
    )
    def test_tells_in_one_line_where_else_to_get_it(self, monkeypatch, fault):
        serve(monkeypatch, fault)
        with pytest.raises(DataError, match="hub did not give fashion_mnist/train-00000-of-00001") as caught:
            open_source("fashion-mnist")
        message = str(caught.value)
        for words in (type(fault).__name__, "apt install dataset-fashion-mnist", "--data-folder", "use 'builtin'"):
            assert words in message
        assert "\n" not in message
        assert len(message) < 1000

    def test_names_the_ways_without_pyarrow_before_downloading(self, monkeypatch):
        calls = serve(monkeypatch, OSError())
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
        with pytest.raises(DataError, match="needs pyarrow") as caught:
            open_source("fashion-mnist")
        for words in ("pip install pyarrow", "apt install dataset-fashion-mnist", "--data-folder)"):
            assert words in str(caught.value)
        assert not calls

    def test_a_damaged_file_is_named_not_the_link_to_it(self, monkeypatch, tmp_path):
        (tmp_path / "blob").write_bytes(b"PAR1 broken")
        (tmp_path / "link.parquet").symlink_to(tmp_path / "blob")
        serve(monkeypatch, tmp_path / "link.parquet")
        with pytest.raises(DataError, match=rf"{tmp_path}/blob cannot be read .*delete it, and it is downloaded again"):
            load_fashion_mnist()

    @pytest.mark.parametrize(
        ("pngs", "labels", "message"),
        [
            ([png(np.zeros((28, 28), np.uint8))[:40]], [0], "cannot be read"),
            ([None], [0], "cannot be read"),
            ([], [], "cannot be read"),
            ([png(np.zeros((32, 32), np.uint8))], [0], r"shape \(1, 32, 32\)"),
            ([png(np.zeros((28, 28, 3), np.uint8))], [0], r"shape \(1, 28, 28, 3\)"),
            ([png(np.zeros((28, 28), np.uint8))], [10], r"labels 10\.\.10"),
            ([png(np.zeros((28, 28), np.uint8))], [-1], r"labels -1\.\.-1"),
        ],
    )
    def test_names_a_file_that_does_not_fit(self, monkeypatch, tmp_path, pngs, labels, message):
        serve(monkeypatch, write_parquet(tmp_path / "a.parquet", pngs, labels))
        with pytest.raises(DataError, match=rf"a\.parquet .*{message}"):
            load_fashion_mnist()

    def test_names_a_file_with_other_columns(self, monkeypatch, tmp_path):
        parquet.write_table(pyarrow.table({"pixels": [1]}), tmp_path / "a.parquet")
        serve(monkeypatch, tmp_path / "a.parquet")
        with pytest.raises(DataError, match=r"a\.parquet cannot be read .*image"):
            load_fashion_mnist()
