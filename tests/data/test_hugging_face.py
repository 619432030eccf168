"""Datasets made here with the library itself, in each way that it keeps them on disk, as sources of images."""

import io
import re
import sys
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

import lamamba
from lamamba.cli import main
from lamamba.commands.encode import encode as encode_latents
from lamamba.config import DatasetOptions, EncodeConfig, TrainConfig
from lamamba.data import DatasetSource, FolderSource, batches, open_source
from lamamba.data.hugging_face import is_dataset
from lamamba.data.preparing import using
from lamamba.errors import ConfigError, DataError
from lamamba.training.run import resolve
from small_network import TINY_NETWORK

NAMES = ("zebra", "cat", "dog")
NUM_ROWS = 12


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """A cache of its own for each test, and no network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "pets"


def encode(kind, grey, size=8):
    file = io.BytesIO()
    Image.new("RGB", (size, size), (grey,) * 3).save(file, kind)
    return file.getvalue()


def contents(number=NUM_ROWS):
    """The bytes of each row: a grey that tells the class (60 times its number + 1), JPEG and PNG in turn."""
    return [encode("PNG" if row % 4 else "JPEG", 60 * (row % 3 + 1), size=8 + row % 5) for row in range(number)]


def dataset_of(images, labels=None, names=NAMES, **more):
    columns = {"image": [image if image is None else {"bytes": image, "path": None} for image in images]}
    features = {"image": ImageFeature()}
    if labels is not None:
        columns["label"], features["label"] = labels, ClassLabel(names=list(names))
    for name, (values, feature) in more.items():
        columns[name], features[name] = values, feature
    return Dataset.from_dict(columns, Features(features))


def labelled(number=NUM_ROWS):
    return dataset_of(contents(number), [row % 3 for row in range(number)])


def save(dataset, folder, split="train"):
    """Write a dataset as parquet, as on the hub."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    dataset.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return str(folder)


def opened(data, skip_bad_images=False, **options):
    return open_source(str(data), image_size=8, skip_bad_images=skip_bad_images, dataset=DatasetOptions(**options))


def refused(data, **options):
    with pytest.raises(DataError) as caught:
        opened(data, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


class TestReading:
    @pytest.mark.parametrize("kind", ["parquet", "parquet file", "saved", "saved splits"])
    def test_images_and_labels_are_the_datasets(self, folder, kind):
        if kind.startswith("saved"):
            (DatasetDict(train=labelled()) if "splits" in kind else labelled()).save_to_disk(folder)
        else:
            save(labelled(), folder)
        place = folder / "data" / "train-00000-of-00001.parquet" if kind == "parquet file" else folder
        source = opened(place)
        assert isinstance(source, DatasetSource)
        assert (source.class_names, len(source), source.channels) == (NAMES, NUM_ROWS, 3)
        for row in range(NUM_ROWS):
            pixels, label = source.load(row)
            assert (pixels.shape, pixels.dtype, label) == ((8, 8, 3), np.uint8, row % 3)
            assert abs(int(pixels.mean()) - 60 * (label + 1)) < 3

    def test_what_was_saved_is_read_in_place(self, folder, tmp_path):
        labelled().save_to_disk(folder)
        opened(folder).load(0)
        assert not (tmp_path / "cache").exists()

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_the_order_goes_on_where_it_stopped(self, folder, num_workers):
        source = opened(save(labelled(), folder))
        options = {"batch_size": 5, "seed": 3, "horizontal_flip": True, "num_workers": num_workers}
        whole = list(islice(batches(source, **options), 6))
        rest = list(islice(batches(source, start=15, **options), 3))
        for (images, labels), (wanted, wanted_labels) in zip(rest, whole[3:], strict=True):
            assert images.equal(wanted)
            assert labels.equal(wanted_labels)

    def test_it_is_recognized_by_its_contents(self, folder, tmp_path):
        digest = opened(save(labelled(), folder)).identify()
        for number in (1, 3):  # of files: the digest does not depend on it
            labelled().save_to_disk(tmp_path / str(number), num_shards=number)
            assert opened(tmp_path / str(number)).identify() == digest
        assert opened(save(dataset_of(contents(), [0] * NUM_ROWS), tmp_path / "labels")).identify() != digest
        images = [encode("PNG", 1, size=30), *contents()[1:]]
        other = dataset_of(images, [row % 3 for row in range(NUM_ROWS)])
        assert opened(save(other, tmp_path / "images")).identify() != digest

    def test_without_labels_there_are_no_classes(self, folder):
        source = opened(save(dataset_of(contents(), caption=(["a pet"] * NUM_ROWS, Value("string"))), folder))
        assert (source.class_names, source.load(1)[1]) == ((), 0)

    def test_files_beside_their_metadata(self, folder):
        folder.mkdir()
        for row, content in enumerate(contents(4)):
            (folder / f"{row}.png").write_bytes(content)
        (folder / "metadata.csv").write_text("file_name,kind\n" + "".join(f"{row}.png,{row % 2}\n" for row in range(4)))
        assert isinstance(opened(folder), FolderSource)
        source = opened(folder, label_column="kind")
        assert (source.class_names, [source.load(row)[1] for row in range(4)]) == (("0", "1"), [0, 1, 0, 1])

    def test_prints_nothing_without_a_terminal(self, folder, capfd):
        path = save(labelled(), folder)
        capfd.readouterr()
        opened(path).load(0)
        assert capfd.readouterr() == ("", "")
        assert not datasets.are_progress_bars_disabled()  # as it was


class TestDamage:
    @pytest.fixture
    def damaged(self, folder):
        """Row 4 is cut off, 5 is no image, 7 is missing."""
        images = contents()
        images[4] = encode("JPEG", 120, size=64)[:-40]
        images[5] = b"<html>Not found</html>"
        images[7] = None
        return save(dataset_of(images, [row % 3 for row in range(NUM_ROWS)]), folder)

    @pytest.mark.parametrize(("row", "fault"), [(4, "truncated"), (5, "it is of no known format"), (7, "FileNotFound")])
    def test_it_is_named(self, damaged, row, fault):
        source = opened(damaged)
        with pytest.raises(DataError, match=rf"row {row} of .*pets \(train\) cannot be read .*--skip-bad-images"):
            source.load(row)

    def test_it_can_be_left_out(self, damaged):
        source = opened(damaged, skip_bad_images=True)
        assert (source.bad_files, len(source)) == (("row 4", "row 5", "row 7"), NUM_ROWS - 3)
        assert [source.load(index)[1] for index in range(9)] == [row % 3 for row in (0, 1, 2, 3, 6, 8, 9, 10, 11)]
        assert source.identify() != opened(damaged).identify()

    def test_without_any_image_there_is_nothing_to_train_on(self, folder):
        message = refused(save(dataset_of([b"no image"] * 3), folder), skip_bad_images=True)
        assert "has no readable image: give image_column" in message


class TestColumns:
    def test_several_columns_of_images_need_a_choice(self, folder):
        depth = [{"bytes": encode("PNG", 7), "path": None}] * NUM_ROWS
        path = save(dataset_of(contents(), depth=(depth, ImageFeature())), folder)
        assert "has several columns of images: give image_column (--image-column) image or depth" in refused(path)
        assert opened(path, image_column="depth").load(0)[0].max() == 7

    def test_several_columns_of_labels_need_a_choice(self, folder):
        fine = ([row % 2 for row in range(NUM_ROWS)], ClassLabel(names=["young", "old"]))
        path = save(dataset_of(contents(), [row % 3 for row in range(NUM_ROWS)], fine=fine), folder)
        words = "several columns of labels: give label_column (--label-column) label or fine, or None for no classes"
        assert words in refused(path)
        assert opened(path, label_column="fine").class_names == ("young", "old")
        assert opened(path, label_column=None).class_names == ()

    def test_bytes_need_to_be_named(self, folder):
        features = Features(jpg=Value("binary"), text=Value("string"))
        path = save(Dataset.from_dict({"jpg": contents(), "text": ["a"] * NUM_ROWS}, features), folder)
        assert "has no column of images: give image_column (--image-column) the one" in refused(path)
        assert "the column 'text' of" in refused(path, image_column="text")
        assert "has no column 'png': give image_column (--image-column) jpg or text" in refused(
            path, image_column="png"
        )
        assert opened(path, image_column="jpg").load(1)[0].mean() == 120

    def test_a_column_that_is_no_image_is_named(self, folder):
        message = refused(save(labelled(), folder), image_column="label")
        assert "the column 'label' of" in message
        assert "cannot be opened as images" in message

    def test_integers_and_strings_are_classes_in_their_order(self, folder):
        ages = ([(2, 10, 1)[row % 3] for row in range(NUM_ROWS)], Value("int64"))
        kinds = ([NAMES[row % 3] for row in range(NUM_ROWS)], Value("string"))
        path = save(dataset_of(contents(), age=ages, kind=kinds), folder)
        by_age, by_kind = opened(path, label_column="age"), opened(path, label_column="kind")
        assert (by_age.class_names, [by_age.load(row)[1] for row in range(3)]) == (("1", "2", "10"), [1, 2, 0])
        assert (by_kind.class_names, [by_kind.load(row)[1] for row in range(3)]) == (("cat", "dog", "zebra"), [2, 0, 1])

    @pytest.mark.parametrize("column", ["weight", "label"])
    def test_what_cannot_be_classes_is_named(self, folder, column):
        labels = [row % 3 if row % 5 else -1 for row in range(NUM_ROWS)]  # as in test splits without labels
        path = save(dataset_of(contents(), labels, weight=([0.5] * NUM_ROWS, Value("float32"))), folder)
        expected = {
            "weight": "the column 'weight' of .* is neither ClassLabel nor strings nor integers",
            "label": r"3 of 12 rows of .* have no class in the column 'label' \(first row 0\): .* None for no classes",
        }
        assert re.search(expected[column], refused(path, label_column=column))


class TestLatents:
    LATENTS = np.random.default_rng(0).normal(size=(6, 2, 4, 4)).astype(np.float32)

    def save(self, folder, feature=None, values=LATENTS, **more):
        feature = feature or datasets.Array3D((2, 4, 4), "float32")
        columns = {"encoded": list(values), "label": [row % 2 for row in range(6)]}
        features = {"encoded": feature, "label": ClassLabel(names=["cat", "dog"])}
        Dataset.from_dict({**columns, **more}, Features(features)).save_to_disk(folder)
        return str(folder)

    @pytest.mark.parametrize("feature", [None, datasets.List(datasets.List(datasets.List(Value("float32"))))])
    def test_they_are_found_and_scaled_by_the_autoencoder(self, folder, autoencoder, feature):
        config = TrainConfig(Path("x"), data=self.save(folder, feature), vae=autoencoder, device="cpu")
        resolved, source, space, _ = resolve(config)
        network = resolved.network
        assert (source.image_size, network.in_channels, network.sample_size, network.num_classes) == (8, 2, 4, 2)
        moments, labels = source.gather(np.array([4, 1]), np.zeros(2, dtype=bool))
        noise = torch.ones(2, 2, 4, 4)  # which has no effect: a latent has no deviation
        wanted = (torch.from_numpy(self.LATENTS[[4, 1]]) - 0.3) * 0.5
        torch.testing.assert_close(space.encode(torch.from_numpy(moments), noise), wanted)
        assert labels.tolist() == [0, 1]

    def test_they_are_trained_on(self, folder, autoencoder, tmp_path):
        options = ["--data", self.save(folder), "--vae", str(autoencoder), "--num-images", "8", "--batch-size", "4"]
        main(
            ["train", "--out", str(tmp_path / "run"), *options, "--device", "cpu", "--sample-steps", "1", *TINY_NETWORK]
        )
        assert lamamba.Run(tmp_path / "run").config.network.in_channels == 2

    def test_another_value_is_other_data(self, folder, tmp_path):
        digest = opened(self.save(folder)).identify()
        assert opened(self.save(tmp_path / "same")).identify() == digest
        assert opened(self.save(tmp_path / "other", values=self.LATENTS + 1)).identify() != digest

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"vae": None, "image_size": 8}, r"has latents: give vae \(--vae\)"),
            ({"horizontal_flip": True}, "has no mirrored images: give --no-horizontal-flip"),
        ],
    )
    def test_what_they_cannot_do_is_said(self, folder, autoencoder, options, message):
        chosen = {"data": self.save(folder), "vae": autoencoder, "device": "cpu", **options}
        with pytest.raises(ConfigError, match=message):
            resolve(TrainConfig(Path("x"), **chosen))

    def test_others_are_refused(self, folder, autoencoder, tmp_path):
        lists = datasets.List(datasets.List(datasets.List(Value("float32"))))
        ragged = [*self.LATENTS[:5].tolist(), [[[0.0]]]]
        source = opened(self.save(folder, lists, ragged))
        with pytest.raises(DataError, match=r"encoded' of .*: give image_column"):
            source.gather(np.array([0, 5]), np.zeros(2, dtype=bool))
        wide = self.save(tmp_path / "wide", datasets.Array3D((4, 4, 4), "float32"), np.zeros((6, 4, 4, 4)))
        with pytest.raises(DataError, match=r"has latents of \(4, 4, 4\), and its autoencoder makes \(2, 4, 4\)"):
            resolve(TrainConfig(Path("x"), data=wide, vae=autoencoder, device="cpu"))
        nan = self.save(tmp_path / "nan", values=np.full_like(self.LATENTS, np.nan))
        assert "latents that are not finite" in refused(nan)
        with pytest.raises(ConfigError, match="contains latents: give images"):
            encode_latents(
                EncodeConfig(self.save(tmp_path / "a"), autoencoder, tmp_path / "b", image_size=8, device="cpu")
            )


class TestOpening:
    def test_what_can_be_a_dataset(self, folder, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "photos" / "cats").mkdir(parents=True)
        (tmp_path / "photos" / "cats" / "a.png").write_bytes(encode("PNG", 1))
        assert is_dataset("user/name")
        assert is_dataset(save(labelled(), folder))
        assert not any(map(is_dataset, ("photos", "photos/dogs", "bultin", "./user/name", "a/b/c", "/user/name")))

    def test_what_the_library_says_is_passed_on(self, folder):
        path = save(labelled(), folder)
        assert "Unknown split \"tset\". Should be one of ['train']): give" in refused(path, split="tset")
        assert "BuilderConfig 'large' not found" in refused(path, subset="large")
        assert re.search(r"no/such cannot be opened as a dataset \(.*[Oo]ffline.*\): give", refused("no/such"))
        (folder / "data" / "train-00000-of-00001.parquet").write_bytes(b"PAR1 no more")
        assert re.search(r"pets cannot be opened as a dataset \(.*[Pp]arquet", refused(path))

    def test_splits_that_were_saved_are_listed(self, folder):
        DatasetDict(train=labelled(), test=labelled(6)).save_to_disk(folder)
        assert len(opened(folder, split="test")) == 6
        assert "has no split 'tset': give split (--split) train or test" in refused(folder, split="tset")
        assert "without subsets: leave subset (--subset) out" in refused(folder, subset="large")

    def test_the_size_is_needed(self, folder):
        with pytest.raises(ConfigError, match="image_size is not set for"):
            open_source(save(labelled(), folder))

    def test_the_library_is_needed(self, monkeypatch, folder):
        path = save(labelled(), folder)
        monkeypatch.setitem(sys.modules, "datasets", None)
        assert re.search(r"needs datasets \(.*\): run pip install 'lamamba\[datasets\]'", refused(path))


def test_training_stopped_and_resumed_is_bitwise_the_same(folder, tmp_path):
    path = save(labelled(), folder)
    options = ["--data", path, "--image-size", "8", "--batch-size", "4", "--device", "cpu", "--sample-steps", "1"]
    for name, images in (("whole", "16"), ("parts", "8")):
        main(["train", "--out", str(tmp_path / name), "--num-images", images, *options, *TINY_NETWORK])
    main(["train", "--out", str(tmp_path / "parts"), "--resume", "--num-images", "16"])
    whole, parts = (lamamba.load_checkpoint(tmp_path / name).network.state_dict() for name in ("whole", "parts"))
    assert all(value.equal(parts[name]) for name, value in whole.items())
    config = lamamba.Run(tmp_path / "whole").config
    assert (config.dataset, config.network.num_classes) == (DatasetOptions(), 3)


def test_the_exporter_says_where_to_go(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["prepare", "dataset", "ylecun/mnist", "--out", "mnist"])
    assert "lamamba train --data NAME reads it as it is" in capsys.readouterr().err


def test_a_name_that_the_locale_cannot_write_is_said() -> None:
    said = "é cannot be made .*ascii.*PYTHONUTF8=1"
    with pytest.raises(DataError, match=said), using(Path("é"), "made"):
        "é".encode("ascii")
