"""Datasets made here with the library itself, in each way that it keeps them on disk, to folders."""

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import Array3D, ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from lamamba.cli import main
from lamamba.data import FolderSource
from lamamba.data.hugging_face import RECORD, DatasetCounts, prepare_dataset
from lamamba.data.preparing import using
from lamamba.errors import ConfigError, DataError

NAMES = ("zebra", "cat", "dog")  # numbered in another order than that of the folders
NUM_ROWS = 12


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """A cache of its own for each test, and no network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "pets"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "sets" / "pets"


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


def tree(folder):
    """The files, hidden ones too, with their contents, without the record."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != RECORD
    }


def expected_tree(number=NUM_ROWS, folders=NAMES, left_out=()):
    return {
        f"train/{folders[row % 3]}/{row:08d}.{'png' if row % 4 else 'jpg'}": content
        for row, content in enumerate(contents(number))
        if row not in left_out
    }


def record(out, split="train"):
    return json.loads((out / split / RECORD).read_text())


def refused(dataset, out, **options):
    """Prepare what cannot be; return the message."""
    with pytest.raises(DataError) as caught:
        prepare_dataset(dataset, out, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


class TestWhole:
    def test_a_folder_source_reads_the_same_bytes_and_labels(self, folder, out):
        counts = prepare_dataset(save(labelled(), folder), out)
        assert counts == DatasetCounts(3, NUM_ROWS, 0, {}, renumbered=True)
        assert tree(out) == expected_tree()
        source = FolderSource(out / "train", image_size=8)
        assert source.class_names == ("cat", "dog", "zebra")
        assert source.labels == [0] * 4 + [1] * 4 + [2] * 4
        for index, label in enumerate(source.labels):
            grey = 60 * (NAMES.index(source.class_names[label]) + 1)
            assert abs(int(source.load(index)[0].mean()) - grey) < 3
        listed = [(entry["folder"], entry["label"], entry["num_images"]) for entry in record(out)["classes"]]
        assert listed == [("cat", 1, 4), ("dog", 2, 4), ("zebra", 0, 4)]

    def test_numbered_folders_keep_the_order_of_the_dataset(self, folder, out):
        names = [f"class {number}" for number in range(12, 0, -1)]
        images = [encode("PNG", number) for number in range(12)]
        path = save(dataset_of(images, list(range(12)), names), folder)
        assert prepare_dataset(path, out, number_classes=True) == DatasetCounts(12, 12, 0, {}, renumbered=False)
        source = FolderSource(out / "train", image_size=8)
        assert source.class_names[:2] == ("00_class 12", "01_class 11")
        assert [int(source.load(index)[0].max()) for index in range(12)] == source.labels == list(range(12))
        assert record(out)["classes"][1]["name"] == "class 11"

    def test_without_labels_the_folder_is_flat(self, folder, out):
        path = save(dataset_of(contents(), caption=(["a pet"] * NUM_ROWS, Value("string"))), folder)
        assert prepare_dataset(path, out) == DatasetCounts(0, NUM_ROWS, 0, {}, renumbered=False)
        source = FolderSource(out / "train", image_size=8)
        assert (source.class_names, len(source)) == ((), NUM_ROWS)
        assert [Path(path).read_bytes() for path in source.paths] == contents()  # in the order of the rows

    def test_classes_without_images_have_no_folder(self, folder, out):
        path = save(dataset_of(contents(), [2 * (row % 2) for row in range(NUM_ROWS)]), folder)
        assert prepare_dataset(path, out).num_classes == 2
        assert FolderSource(out / "train", image_size=8).class_names == ("dog", "zebra")

    @pytest.mark.parametrize("split", ["train", "test"])
    def test_what_save_to_disk_wrote(self, folder, out, split):
        DatasetDict(train=labelled(), test=labelled(6)).save_to_disk(folder / "both")
        labelled().save_to_disk(folder / "one")
        number = NUM_ROWS if split == "train" else 6
        assert prepare_dataset(str(folder / "both"), out, split=split).num_extracted == number
        assert tree(out) == {name.replace("train", split): content for name, content in expected_tree(number).items()}
        prepare_dataset(str(folder / "one"), out.with_name("other"))
        assert tree(out.with_name("other")) == expected_tree()

    def test_images_with_metadata_that_are_files_of_their_own(self, folder, out):
        folder.mkdir()
        for row, content in enumerate(contents()):
            (folder / f"{row:02}.png").write_bytes(content)
        lines = [f"{row:02}.png,{NAMES[row % 3]}" for row in range(NUM_ROWS)]
        (folder / "metadata.csv").write_text("\n".join(["file_name,kind", *lines]))
        prepare_dataset(str(folder), out, label_column="kind")
        assert sorted(tree(out).values()) == sorted(contents())
        assert FolderSource(out / "train", image_size=8).labels == [0] * 4 + [1] * 4 + [2] * 4

    @pytest.mark.parametrize("kind", ["WEBP", "BMP", "GIF", "TIFF"])
    def test_formats_that_training_reads_stay_as_they_are(self, folder, out, kind):
        prepare_dataset(save(dataset_of([encode(kind, 99)]), folder), out)
        source = FolderSource(out / "train", image_size=8)
        assert Path(source.paths[0]).read_bytes() == encode(kind, 99)
        assert abs(int(source.load(0)[0].mean()) - 99) < 3

    @pytest.mark.filterwarnings("ignore:Downcasting array")  # the library's, of the list that it keeps arrays as
    def test_other_formats_and_arrays_become_png(self, folder, out):
        pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PPM")
        arrays = ([pixels], Array3D(pixels.shape, "uint8"))
        path = save(dataset_of([file.getvalue()], array=arrays), folder)
        for column in ("image", "array"):
            prepare_dataset(path, out / column, image_column=column)
            assert np.array_equal(np.asarray(Image.open(out / column / "train" / "00000000.png")), pixels)

    def test_prints_nothing_without_a_terminal(self, folder, out, capfd):
        path = save(labelled(), folder)
        capfd.readouterr()
        prepare_dataset(path, out)
        assert [text.strip() for text in capfd.readouterr()] == ["", ""]
        assert not datasets.are_progress_bars_disabled()  # as it was


class TestGoingOn:
    def test_nothing_is_written_twice(self, folder, out):
        path = save(labelled(), folder)
        prepare_dataset(path, out)
        before = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
        assert prepare_dataset(path, out) == DatasetCounts(3, 0, NUM_ROWS, {}, renumbered=True)
        assert {file: file.stat().st_mtime_ns for file in out.rglob("*")} == before

    def test_killed_at_any_moment_it_goes_on(self, folder, out, tmp_path):
        number = 1500
        path = save(labelled(number), folder)
        arguments = ["-m", "lamamba", "prepare", "dataset", path, "--out", str(out)]
        process = subprocess.Popen(
            [sys.executable, *arguments], env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
        )
        hidden = out / ".incomplete-train"
        while len(list(hidden.glob("*/0*"))) < 50:
            assert process.poll() is None
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert os.listdir(out) == [".incomplete-train"]
        there = {file: file.stat().st_mtime_ns for file in hidden.glob("*/0*")}
        assert 50 <= len(there) < number
        whole = expected_tree(number)
        for file in there:  # what has its name is whole
            assert file.read_bytes() == whole[f"train/{file.parent.name}/{file.name}"]
        counts = prepare_dataset(path, out)
        assert (counts.num_extracted, counts.num_present) == (number - len(there), len(there))
        assert tree(out) == whole
        moved = {out / "train" / file.relative_to(hidden): when for file, when in there.items()}
        assert {file: file.stat().st_mtime_ns for file in moved} == moved

    def test_a_full_disk_is_named_and_what_was_cut_is_written_again(self, monkeypatch, folder, out):
        path = save(labelled(), folder)
        write_bytes = Path.write_bytes

        def fail(file, content):
            if file.name == ".incomplete-00000007.png":
                write_bytes(file, content[:20])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write_bytes(file, content)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_bytes", fail)
            message = refused(path, out)
        assert "00000007.png cannot be written (No space left on device): free some space" in message
        assert not (out / "train").exists()
        assert not list(out.rglob("00000007*"))
        assert prepare_dataset(path, out).num_present > 0
        assert tree(out) == expected_tree()

    def test_what_was_lost_or_added_is_named(self, folder, out):
        path = save(labelled(), folder)
        prepare_dataset(path, out)
        (out / "train" / "cat" / "notes.txt").touch()
        assert "train also holds 'notes.txt', which is not of the dataset: move it" in refused(path, out)
        (out / "train" / "cat" / "notes.txt").unlink()
        (out / "train" / "cow").mkdir()
        assert "train also holds 'cow', which is not of the dataset: move it" in refused(path, out)
        (out / "train" / "cow").rmdir()
        (out / "train" / "cat" / "00000004.jpg").unlink()
        assert re.search(r"train/cat has 3 images, not 4: delete /.*/train, and", refused(path, out))

    @pytest.mark.parametrize("whole", [True, False])
    def test_another_dataset_or_other_options_are_refused(self, folder, out, whole):
        more = {"kind": (["a", "b"] * (NUM_ROWS // 2), Value("string"))}
        images, labels = contents(), [row % 3 for row in range(NUM_ROWS)]
        path = save(dataset_of(images, labels, **more), folder)
        prepare_dataset(path, out)
        made = out / "train"
        if not whole:
            made = made.rename(out / ".incomplete-train")
        before = tree(out)

        def assert_refused(words, dataset=path, **options):
            message = refused(dataset, out, **options)
            assert words in message
            assert f"give another out (--out), or delete {made}" in message

        assert_refused("with label_column 'label', not 'kind'", label_column="kind")
        assert_refused("with label_column 'label', not None", label_column=None)
        assert_refused("with number_classes False, not True", number_classes=True)
        assert_refused("with subset None, not 'default'", subset="default")
        changed = (
            dataset_of(images, [2, *labels[1:]], **more),  # of the same row another label
            dataset_of([encode("PNG", 60, size=64), *images[1:]], labels, **more),  # another image
            dataset_of(images, labels, ("horse", "cat", "dog"), **more),  # another name
            labelled(NUM_ROWS - 1),  # a row less
        )
        for dataset in changed:
            assert_refused("of other images or labels than", save(dataset, folder))
        assert tree(out) == before

    def test_a_dataset_that_has_moved_is_the_same(self, folder, out):
        prepare_dataset(save(labelled(), folder), out)
        before = tree(out)
        moved = folder.rename(folder.with_name("moved"))
        assert prepare_dataset(str(moved), out) == DatasetCounts(3, 0, NUM_ROWS, {}, renumbered=True)
        assert tree(out) == before

    def test_a_folder_of_something_else_is_left_alone(self, folder, out):
        path = save(labelled(), folder)
        (out / "train" / "cat").mkdir(parents=True)
        (out / "train" / "cat" / "mine.png").touch()
        assert "train is there already, but is not what was made of a dataset: give another out" in refused(path, out)
        assert list(tree(out)) == ["train/cat/mine.png"]

    def test_splits_lie_beside_each_other(self, folder, out):
        save(labelled(), folder)
        path = save(labelled(6), folder, "test")
        prepare_dataset(path, out)
        prepare_dataset(path, out, split="test")
        assert tree(out) == expected_tree() | {
            name.replace("train", "test"): content for name, content in expected_tree(6).items()
        }


class TestDamage:
    @pytest.fixture
    def damaged(self, folder):
        """Row 4 is cut off, 5 is no image, 7 is missing; 4 and 7 are cats, 5 is a dog."""
        images = contents()
        images[4] = encode("JPEG", 120, size=64)[:-40]
        images[5] = b"<html>Not found</html>"
        images[7] = None
        return save(dataset_of(images, [row % 3 for row in range(NUM_ROWS)]), folder)

    def test_every_damaged_image_is_named(self, damaged, out):
        message = refused(damaged, out)
        assert "3 of 12 images of" in message
        assert "cannot be read, rows 4 (cat), 5 (dog), 7 (cat) (counted from 0; row 4: OSError: " in message
        assert "truncated" in message
        assert "(--skip-bad-images)" in message
        assert os.listdir(out) == [".incomplete-train"]

    def test_they_can_be_left_out(self, damaged, out):
        refused(damaged, out)
        counts = prepare_dataset(damaged, out, skip_bad_images=True)
        assert (counts.num_classes, counts.num_extracted, counts.num_present) == (3, 0, 9)
        assert list(counts.left_out) == [4, 5, 7]
        assert counts.left_out[5] == "it is of no known format"
        assert counts.left_out[7] == "it is missing"
        assert tree(out) == expected_tree(left_out=(4, 5, 7))
        assert record(out)["left_out"] == {str(row): reason for row, reason in counts.left_out.items()}
        assert FolderSource(out / "train", image_size=8, skip_bad_images=True).bad_files == ()
        assert prepare_dataset(damaged, out).left_out == counts.left_out  # as it is whole now

    def test_a_class_that_loses_all_images_has_no_folder(self, folder, out):
        images = [b"no image" if row % 3 == 0 else content for row, content in enumerate(contents())]
        path = save(dataset_of(images, [row % 3 for row in range(NUM_ROWS)]), folder)
        counts = prepare_dataset(path, out, skip_bad_images=True)
        assert (counts.num_classes, len(counts.left_out)) == (2, 4)
        assert FolderSource(out / "train", image_size=8).class_names == ("cat", "dog")

    def test_without_any_image_there_is_nothing_to_leave_out(self, folder, out):
        path = save(dataset_of([b"no image"] * 30), folder)
        message = refused(path, out, skip_bad_images=True)
        assert "30 of 30 images of" in message
        assert (
            "18, 19 and 10 more (counted from 0; row 0: it is of no known format): name the column of images with"
            in message
        )

    def test_pixels_that_training_refuses_are_refused(self, folder, out):
        file = io.BytesIO()
        Image.new("F", (8, 8)).save(file, "TIFF")
        message = refused(save(dataset_of([*contents(), file.getvalue()]), folder), out)
        assert "rows 12 (counted from 0; row 12: 32-bit pixels (mode F) of unknown range)" in message


class TestColumns:
    def test_several_columns_of_images_need_a_choice(self, folder, out):
        depth = [{"bytes": encode("PNG", 7), "path": None}] * NUM_ROWS
        path = save(dataset_of(contents(), depth=(depth, ImageFeature())), folder)
        words = "has several columns of images: give image_column (--image-column) image or depth"
        assert words in refused(path, out)
        prepare_dataset(path, out, image_column="depth")
        assert set(tree(out).values()) == {encode("PNG", 7)}

    def test_several_columns_of_labels_need_a_choice(self, folder, out):
        fine = ([row % 2 for row in range(NUM_ROWS)], ClassLabel(names=["young", "old"]))
        path = save(dataset_of(contents(), [row % 3 for row in range(NUM_ROWS)], fine=fine), folder)
        words = "several columns of labels: give label_column (--label-column) label, fine or None for no classes"
        assert words in refused(path, out)
        prepare_dataset(path, out, label_column="fine")
        assert FolderSource(out / "train", image_size=8).class_names == ("old", "young")
        prepare_dataset(path, out / "flat", label_column=None)
        assert FolderSource(out / "flat" / "train", image_size=8).class_names == ()

    def test_bytes_need_to_be_named(self, folder, out):
        features = Features(jpg=Value("binary"), text=Value("string"))
        path = save(Dataset.from_dict({"jpg": contents(), "text": ["a"] * NUM_ROWS}, features), folder)
        assert "has no column of images: give image_column (--image-column) the one" in refused(path, out)
        assert "the column 'text' of" in refused(path, out, image_column="text")
        assert "has no column 'png': give image_column (--image-column) jpg or text" in refused(
            path, out, image_column="png"
        )
        prepare_dataset(path, out, image_column="jpg")
        assert sorted(tree(out).values()) == sorted(contents())

    def test_a_column_that_is_no_image_is_named(self, folder, out):
        message = refused(save(labelled(), folder), out, image_column="label")
        assert "the column 'label' of" in message
        assert "cannot be opened as images" in message

    def test_integers_are_classes_in_their_order(self, folder, out):
        ages = [(2, 10, 1)[row % 3] for row in range(NUM_ROWS)]
        path = save(dataset_of(contents(), age=(ages, Value("int64"))), folder)
        counts = prepare_dataset(path, out, label_column="age")
        assert counts.num_classes == 3
        assert tree(out) == expected_tree(folders=("02", "10", "01"))

    def test_strings_are_classes(self, folder, out):
        kinds = [NAMES[row % 3] for row in range(NUM_ROWS)]
        path = save(dataset_of(contents(), kind=(kinds, Value("string"))), folder)
        assert prepare_dataset(path, out, label_column="kind") == DatasetCounts(3, NUM_ROWS, 0, {}, renumbered=False)
        assert tree(out) == expected_tree()

    @pytest.mark.parametrize("column", ["weight", "label"])
    def test_what_cannot_be_classes_is_named(self, folder, out, column):
        labels = [row % 3 if row % 5 else -1 for row in range(NUM_ROWS)]  # as in test splits without labels
        path = save(dataset_of(contents(), labels, weight=([0.5] * NUM_ROWS, Value("float32"))), folder)
        expected = {
            "weight": "the column 'weight' of .* is neither ClassLabel nor strings nor integers",
            "label": r"3 of 12 rows of .* have no class in the column 'label' \(first row 0\): .* None for no classes",
        }
        assert re.search(expected[column], refused(path, out, label_column=column))
        assert not out.exists()


class TestNames:
    @pytest.mark.parametrize(
        ("name", "mended"),
        [
            ("T-shirt/top", "T-shirt-top"),
            ("..", ".."),
            (".hidden", ".hidden"),
            ("a\\b\n", "a-b-"),
            ("x" * 300, "x" * 200),
            ("é" * 150, "é" * 100),
            ("€" * 100, "€" * 66),
        ],
        ids=range(7),
    )
    def test_a_name_that_no_folder_can_have_is_refused(self, folder, out, name, mended):
        path = save(dataset_of(contents(), [row % 3 for row in range(NUM_ROWS)], ("zebra", name, "dog")), folder)
        message = refused(path, out)
        assert "cannot be a folder's name: give number_classes (--number-classes)" in message
        assert not out.exists()
        prepare_dataset(path, out, number_classes=True)
        assert tree(out) == expected_tree(folders=("0_zebra", f"1_{mended}", "2_dog"))
        assert record(out)["classes"][1]["name"] == name

    @pytest.mark.parametrize(("one", "other"), [("Cat", "cat"), ("caf\u00e9", "cafe\u0301"), ("STRASSE", "straße")])
    def test_names_that_are_one_folder_on_some_disks_are_refused(self, folder, out, one, other):
        path = save(dataset_of(contents(), [row % 3 for row in range(NUM_ROWS)], (one, "dog", other)), folder)
        assert f"the classes {one!r} and {other!r} of" in refused(path, out)
        assert not out.exists()
        prepare_dataset(path, out, number_classes=True)
        assert tree(out) == expected_tree(folders=(f"0_{one}", "1_dog", f"2_{other}"))

    def test_names_that_are_numbers_are_not_numbered_twice(self, folder, out):
        path = save(dataset_of(contents(), [row % 3 for row in range(NUM_ROWS)], "019"), folder)
        prepare_dataset(path, out, number_classes=True)
        assert tree(out) == expected_tree(folders=("0", "1", "2_9"))

    def test_a_class_without_images_may_have_any_name(self, folder, out):
        labels = [row % 3 for row in range(NUM_ROWS)]
        prepare_dataset(save(dataset_of(contents(), labels, (*NAMES, "CAT", "..")), folder), out)
        assert tree(out) == expected_tree()


class TestOpening:
    @pytest.mark.parametrize("layout", ["flat", "classes", "splits"])
    def test_a_folder_of_images_is_used_as_it_is(self, folder, out, layout):
        inside = {"flat": [""], "classes": NAMES, "splits": [f"train/{name}" for name in NAMES]}[layout]
        for number, name in enumerate(inside):
            (folder / name).mkdir(parents=True)
            (folder / name / "a.PNG").write_bytes(encode("PNG", number))
        (folder / "README.md").touch()
        message = refused(str(folder), out)
        assert f"{folder} is a folder of images, which needs no preparing" in message
        advised = Path(re.search(r"lamamba train --data (\S+)\)", message)[1])
        assert len(FolderSource(advised, image_size=8)) == len(inside)

    def test_what_was_prepared_is_such_a_folder(self, folder, out):
        prepare_dataset(save(labelled(), folder), out)
        assert f"(lamamba train --data {out / 'train'})" in refused(str(out), out.with_name("again"))

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("./nowhere", "./nowhere is missing: give an existing folder, or the name of a dataset of the hub"),
            ("a/b/c", "a/b/c is missing"),
            ("FOLDER/data/train-00000-of-00001.parquet", "is a file: give the folder that it is in"),
        ],
    )
    def test_what_is_no_dataset_is_named(self, folder, out, name, message):
        path = save(labelled(), folder)
        assert message in refused(name.replace("FOLDER", path), out)

    def test_what_the_library_says_is_passed_on(self, folder, out):
        path = save(labelled(), folder)
        assert "Unknown split \"tset\". Should be one of ['train']): give" in refused(path, out, split="tset")
        assert "BuilderConfig 'large' not found" in refused(path, out, subset="large")
        (folder / "data" / "train-00000-of-00001.parquet").write_bytes(b"PAR1 no more")
        message = refused(path, out)
        assert re.search(r"pets cannot be opened as a dataset \(.*[Pp]arquet", message)
        assert not out.exists()

    def test_a_hub_that_cannot_be_reached_is_named(self, out):
        assert re.search(r"no/such cannot be opened as a dataset \(.*[Oo]ffline.*\): give", refused("no/such", out))

    def test_splits_that_were_saved_are_listed(self, folder, out):
        DatasetDict(train=labelled(), test=labelled()).save_to_disk(folder)
        assert "has no split 'tset': give split (--split) train or test" in refused(str(folder), out, split="tset")
        assert "without subsets: leave subset (--subset) out" in refused(str(folder), out, subset="large")

    def test_a_split_is_a_name(self, folder, out):
        for split in ("train[:10]", "../train", ""):
            with pytest.raises(ConfigError, match="cannot be a folder's name: give split"):
                prepare_dataset(save(labelled(), folder), out, split=split)

    @pytest.mark.parametrize("inside", ["", "more"])
    def test_the_result_is_never_taken_for_the_dataset(self, monkeypatch, tmp_path, folder, inside):
        path = save(labelled(), folder)
        with pytest.raises(ConfigError, match=r"would be taken for files of .*: give out"):
            prepare_dataset(path, folder / inside)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ConfigError, match="would be taken for files of mnist: give out"):
            prepare_dataset("mnist", Path("mnist", inside))  # the next time a folder of that name would be there

    def test_an_empty_split_is_named(self, folder, out):
        message = refused(save(labelled().select([]), folder), out)
        assert 'pets cannot be opened as a dataset (Instruction "train" corresponds to no data!): give' in message

    def test_the_library_is_needed(self, monkeypatch, folder, out):
        path = save(labelled(), folder)
        monkeypatch.setitem(sys.modules, "datasets", None)
        assert re.search(r"needs datasets \(.*\): run pip install 'lamamba\[datasets\]'", refused(path, out))


class TestCommand:
    def test_says_what_it_did(self, folder, out, capsys):
        images = contents()
        images[5] = b"no image"
        path = save(dataset_of(images, [row % 3 for row in range(NUM_ROWS)]), folder)
        arguments = ["prepare", "dataset", path, "--out", str(out)]
        capsys.readouterr()
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert "lamamba: error: 1 of 12 images of" in capsys.readouterr().err
        main([*arguments, "--skip-bad-images"])
        first, second = capsys.readouterr().out.strip().splitlines()
        assert first == (
            f"{out / 'train'}: 3 classes, 0 images extracted, 11 were there, 1 left out (dataset.json says why)"
        )
        assert second.startswith("training numbers classes in the order of their folders, unlike the dataset")

    def test_every_option_arrives(self, folder, out, capsys):
        kinds = ([NAMES[row % 3] for row in range(NUM_ROWS)], Value("string"))
        photo = ([{"bytes": image, "path": None} for image in contents()], ImageFeature())
        save(dataset_of([b""] * NUM_ROWS, [0] * NUM_ROWS, photo=photo, kind=kinds), folder, "test")
        arguments = ["--split", "test", "--subset", "default", "--image-column", "photo", "--label-column", "kind"]
        main(["prepare", "dataset", str(folder), "--out", str(out), *arguments, "--number-classes"])
        assert tree(out) == {
            name.replace("train", "test"): content
            for name, content in expected_tree(folders=("2_zebra", "0_cat", "1_dog")).items()
        }
        main(["prepare", "dataset", str(folder), "--out", str(out / "flat"), *arguments[:-1], "None"])
        assert capsys.readouterr().out.endswith(f"{out / 'flat' / 'test'}: no classes, 12 images extracted\n")


def test_a_name_that_the_locale_cannot_write_is_said() -> None:
    said = "é cannot be made: names of files are in ascii here.*PYTHONUTF8=1"
    with pytest.raises(DataError, match=said), using(Path("é"), "made"):
        "é".encode("ascii")
