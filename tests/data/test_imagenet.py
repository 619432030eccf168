import errno
import gzip
import hashlib
import io
import os
import shutil
import sys
import tarfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lamamba.cli import main
from lamamba.data import FolderSource, imagenet, preparing
from lamamba.data.imagenet import Official, SplitCounts, prepare_imagenet
from lamamba.errors import ConfigError, DataError

WNIDS = ("n03000000", "n01000000", "n02000000")  # of the numbers 1, 2, 3; their order differs from the folders'
NUM_TRAIN = {"n03000000": 4, "n01000000": 3, "n02000000": 2}
TRUTH = (3, 1, 2, 2, 3, 1)


def jpeg(wnid, number):
    """One grey that tells the class (its second digit times 60); the size in bytes tells the image."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (60 * int(wnid[2]),) * 3).save(file, "JPEG", comment=b"x" * number)
    return file.getvalue()


def tar_of(entries):
    """The bytes of a tar with these entries: (name, content), or a ready TarInfo without content."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                tar.addfile(entry)
                continue
            info = tarfile.TarInfo(entry[0])
            info.size = len(entry[1])
            tar.addfile(info, io.BytesIO(entry[1]))
    return file.getvalue()


def class_entries(wnid):
    return [(f"{wnid}_{10 * k + 7}.JPEG", jpeg(wnid, k)) for k in range(NUM_TRAIN[wnid])]


def train_entries():
    return [(f"{wnid}.tar", tar_of(class_entries(wnid))) for wnid in WNIDS]


def validation_entries():
    """Not in the order of their numbers, as the official file."""
    numbers = (4, 1, 6, 2, 3, 5)
    return [(f"ILSVRC2012_val_{k:08d}.JPEG", jpeg(WNIDS[TRUTH[k - 1] - 1], k)) for k in numbers]


def meta_mat():
    """The struct array `synsets` as the devkit has it: classes first, then groups of them."""
    io_of_scipy = pytest.importorskip("scipy.io")
    fields = ("ILSVRC2012_ID", "WNID", "words", "num_children")
    synsets = np.empty(len(WNIDS) + 1, [(field, object) for field in fields])
    for number, wnid in enumerate(WNIDS, start=1):
        synsets[number - 1] = (number, wnid, "tench, Tinca tinca", 0)
    synsets[-1] = (len(WNIDS) + 1, "n00000001", "animal", len(WNIDS))
    file = io.BytesIO()
    io_of_scipy.savemat(file, {"synsets": synsets})
    return file.getvalue()


@cache
def content_of(name):
    """The bytes of a file, the same at each call."""
    if name == imagenet.TRAIN:
        return tar_of(train_entries())
    if name == imagenet.VALIDATION:
        return tar_of(validation_entries())
    truth = "\n".join(map(str, TRUTH)).encode()
    entries = {"readme.txt": b"hello", "data/meta.mat": meta_mat()}
    entries["data/ILSVRC2012_validation_ground_truth.txt"] = truth
    return gzip.compress(tar_of([(f"ILSVRC2012_devkit_t12/{name}", content) for name, content in entries.items()]))


def official():
    names = (imagenet.TRAIN, imagenet.VALIDATION, imagenet.DEVKIT)
    return Official({name: hashlib.md5(content_of(name)).hexdigest() for name in names}, num_train=9)


@pytest.fixture
def train(tmp_path):
    path = tmp_path / "train.tar"
    path.write_bytes(content_of(imagenet.TRAIN))
    return path


@pytest.fixture
def validation(tmp_path):
    path = tmp_path / "val.tar"
    path.write_bytes(content_of(imagenet.VALIDATION))
    return path


@pytest.fixture
def devkit(tmp_path):
    path = tmp_path / "devkit.tar.gz"
    path.write_bytes(content_of(imagenet.DEVKIT))
    return path


@pytest.fixture
def out(tmp_path):
    return tmp_path / "sets" / "imagenet"


@pytest.fixture
def written(monkeypatch):
    """The names of all files that were written."""
    names = []
    write_bytes = Path.write_bytes

    def note(path, content):
        names.append(path.name)
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", note)
    return names


def tree(folder):
    """The files, hidden ones too, with their contents."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


TRAIN_TREE = {f"train/{wnid}/{name}": content for wnid in WNIDS for name, content in class_entries(wnid)}
VALIDATION_TREE = {
    f"validation/{WNIDS[TRUTH[int(name[15:23]) - 1] - 1]}/{name}": content for name, content in validation_entries()
}


def assert_message(caught, *words):
    message = str(caught.value)
    for word in words:
        assert word in message
    assert "\n" not in message


class TestBoth:
    def test_a_folder_source_reads_them(self, train, validation, devkit, out):
        counts = prepare_imagenet(out, train=train, validation=validation, devkit=devkit, official=official())
        assert counts == {"validation": SplitCounts(3, 6, 0), "train": SplitCounts(3, 9, 0)}
        assert tree(out) == TRAIN_TREE | VALIDATION_TREE
        for split, lengths in (("train", [3, 2, 4]), ("validation", [2, 2, 2])):
            source = FolderSource(out / split, image_size=8)
            assert source.class_names == ("n01000000", "n02000000", "n03000000")
            assert np.bincount(source.labels).tolist() == lengths
            for index in range(len(source)):
                image, label = source.load(index)
                assert abs(int(image.mean()) - 60 * (label + 1)) < 3

    def test_nothing_is_extracted_twice(self, train, validation, devkit, out, written):
        prepare_imagenet(out, train=train, validation=validation, devkit=devkit, official=official())
        assert len(written) == 15
        counts = prepare_imagenet(out, train=train, validation=validation, devkit=devkit, official=official())
        assert counts == {"validation": SplitCounts(3, 0, 6), "train": SplitCounts(3, 0, 9)}
        assert len(written) == 15
        assert tree(out) == TRAIN_TREE | VALIDATION_TREE

    def test_prints_nothing_without_a_terminal(self, train, validation, devkit, out, capfd):
        prepare_imagenet(out, train=train, validation=validation, devkit=devkit, official=official())
        printed = capfd.readouterr()
        assert (printed.out.strip(), printed.err) == ("", "")

    def test_needs_something_to_do(self, devkit, out):
        with pytest.raises(ConfigError, match="no ImageNet file is given: give train") as caught:
            prepare_imagenet(out, devkit=devkit)
        assert_message(caught, "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")

    @pytest.mark.parametrize("missing", ["train", "validation", "devkit"])
    def test_a_missing_file_is_named_before_the_work(self, train, validation, devkit, out, missing, tmp_path):
        files = {"train": train, "validation": validation, "devkit": devkit, missing: tmp_path / "nowhere.tar"}
        with pytest.raises(DataError, match=r"nowhere\.tar is missing .*give the path of ILSVRC2012_\w+\.tar"):
            prepare_imagenet(out, **files, official=official())
        assert not out.exists()

    def test_the_official_checksums(self):
        assert imagenet.ILSVRC2012.md5 == {
            "ILSVRC2012_img_train.tar": "1d675b47d978889d74fa0da5fadfb00e",
            "ILSVRC2012_img_val.tar": "29b22e2961454d5413ddabcf34fc5622",
            "ILSVRC2012_devkit_t12.tar.gz": "fa75699e90414af021442c21a62c3abf",
        }
        assert imagenet.ILSVRC2012.num_train == 1_281_167

    @pytest.mark.parametrize("name", ["train", "validation", "devkit"])
    @pytest.mark.parametrize("damage", ["cut off", "changed", "another file", "empty"])
    def test_a_damaged_file_is_named_before_the_work(self, train, validation, devkit, out, name, damage):
        path = {"train": train, "validation": validation, "devkit": devkit}[name]
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        half = bytes(content[: len(content) // 2])
        others = {"cut off": half, "changed": content, "another file": b"<html>Log in</html>", "empty": b""}
        path.write_bytes(others[damage])
        with pytest.raises(DataError, match=rf"{path.name} is damaged, cut off, or another file: download") as caught:
            prepare_imagenet(out, train=train, validation=validation, devkit=devkit, official=official())
        assert_message(caught, "again from image-net.org (its MD5 is")
        assert not out.exists()


class TestTrain:
    def test_needs_neither_devkit_nor_scipy(self, monkeypatch, train, out):
        monkeypatch.setitem(sys.modules, "scipy.io", None)
        assert prepare_imagenet(out, train=train, official=official()) == {"train": SplitCounts(3, 9, 0)}
        assert tree(out) == TRAIN_TREE

    def test_goes_on_after_an_interruption(self, monkeypatch, train, out, written):
        write = preparing._write

        def stop(path, file):
            if len(written) == 6:
                raise KeyboardInterrupt
            return write(path, file)

        monkeypatch.setattr(preparing, "_write", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare_imagenet(out, train=train, official=official())
        assert sorted(os.listdir(out / "train")) == [".incomplete-n01000000", "n03000000"]
        cut = out / "train" / ".incomplete-n01000000" / "n01000000_17.JPEG"
        os.truncate(cut, 100)  # as if it was stopped while writing
        first = list(written)
        monkeypatch.setattr(preparing, "_write", write)
        counts = prepare_imagenet(out, train=train, official=official())
        assert counts == {"train": SplitCounts(3, 4, 5)}
        assert sorted(written[6:]) == [
            "n01000000_17.JPEG",
            "n01000000_27.JPEG",
            "n02000000_17.JPEG",
            "n02000000_7.JPEG",
        ]
        assert len(first) == 6
        assert tree(out) == TRAIN_TREE

    def test_a_class_folder_that_lost_a_file_is_named(self, train, out):
        prepare_imagenet(out, train=train, official=official())
        (out / "train" / "n01000000" / "n01000000_7.JPEG").unlink()
        with pytest.raises(DataError, match=r"train/n01000000 has 2 files, not 3: delete /.*/train/n01000000, and"):
            prepare_imagenet(out, train=train, official=official())
        shutil.rmtree(out / "train" / "n01000000")
        assert prepare_imagenet(out, train=train, official=official()) == {"train": SplitCounts(3, 3, 6)}
        assert tree(out) == TRAIN_TREE

    def test_other_files_in_the_way_are_named(self, train, out):
        (out / "train" / "n09999999").mkdir(parents=True)
        with pytest.raises(DataError, match=r"train also holds 'n09999999', which is not in the tar: move it"):
            prepare_imagenet(out, train=train, official=official())
        (out / "train" / "n09999999").rmdir()
        (out / "train" / ".incomplete-n01000000").mkdir()
        (out / "train" / ".incomplete-n01000000" / "n01000000_99.JPEG").touch()
        with pytest.raises(
            DataError, match=r"\.incomplete-n01000000 has 4 files, not 3: delete /.*/\.incomplete-n01000000, and"
        ):
            prepare_imagenet(out, train=train, official=official())


class TestValidation:
    def test_needs_the_devkit(self, validation, out):
        with pytest.raises(ConfigError, match=r"without devkit, .*give devkit \(ILSVRC2012_devkit_t12\.tar\.gz\)"):
            prepare_imagenet(out, validation=validation, official=official())

    def test_needs_scipy(self, monkeypatch, validation, devkit, out):
        monkeypatch.setitem(sys.modules, "scipy.io", None)
        with pytest.raises(DataError, match=r"devkit\.tar\.gz needs scipy .*run 'pip install scipy'"):
            prepare_imagenet(out, validation=validation, devkit=devkit, official=official())

    def test_goes_on_after_an_interruption(self, monkeypatch, validation, devkit, out, written):
        write = preparing._write

        def stop(path, file):
            if len(written) == 4:
                raise KeyboardInterrupt
            return write(path, file)

        written.clear()
        monkeypatch.setattr(preparing, "_write", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare_imagenet(out, validation=validation, devkit=devkit, official=official())
        monkeypatch.setattr(preparing, "_write", write)
        os.truncate(next((out / ".incomplete-validation").rglob("*_00000001.JPEG")), 100)
        counts = prepare_imagenet(out, validation=validation, devkit=devkit, official=official())
        assert counts == {"validation": SplitCounts(3, 3, 3)}
        assert tree(out) == VALIDATION_TREE

    def test_a_folder_that_lost_a_file_is_named(self, validation, devkit, out):
        prepare_imagenet(out, validation=validation, devkit=devkit, official=official())
        next((out / "validation" / "n02000000").iterdir()).unlink()
        with pytest.raises(DataError, match=r"validation/n02000000 has 1 files, not 2: delete /.*/validation, and"):
            prepare_imagenet(out, validation=validation, devkit=devkit, official=official())
        shutil.rmtree(out / "validation" / "n02000000")
        with pytest.raises(DataError, match=r"validation/n02000000 has 0 files, not 2: delete /.*/validation, and"):
            prepare_imagenet(out, validation=validation, devkit=devkit, official=official())
        shutil.rmtree(out / "validation")
        counts = prepare_imagenet(out, validation=validation, devkit=devkit, official=official())
        assert counts == {"validation": SplitCounts(3, 6, 0)}
        assert tree(out) == VALIDATION_TREE

    def test_other_files_in_the_way_are_named(self, validation, devkit, out):
        other = out / ".incomplete-validation" / "n02000000" / "other.JPEG"
        other.parent.mkdir(parents=True)
        other.touch()
        with pytest.raises(DataError, match=r"n02000000 has 3 files, not 2: delete /.*/\.incomplete-validation, and"):
            prepare_imagenet(out, validation=validation, devkit=devkit, official=official())
        assert not (out / "validation").exists()


class TestDisk:
    @pytest.mark.parametrize(
        ("number", "advice"),
        [(errno.ENOSPC, "free some space"), (errno.EACCES, "make its folder readable and writable")],
    )
    def test_an_image_that_cannot_be_written_is_named(self, monkeypatch, train, out, number, advice):
        write_bytes = Path.write_bytes

        def fail(path, content):
            if path.name == "n01000000_17.JPEG":
                write_bytes(path, content[:50])
                raise OSError(number, os.strerror(number))
            return write_bytes(path, content)

        monkeypatch.setattr(Path, "write_bytes", fail)
        with pytest.raises(DataError, match=rf"n01000000_17\.JPEG cannot be written .*{advice}") as caught:
            prepare_imagenet(out, train=train, official=official())
        assert_message(caught, os.strerror(number), "run the command again")
        monkeypatch.undo()
        assert prepare_imagenet(out, train=train, official=official()) == {"train": SplitCounts(3, 4, 5)}
        assert tree(out) == TRAIN_TREE

    def test_an_image_that_arrives_in_part_is_named(self, monkeypatch, train, out):
        write_bytes = Path.write_bytes
        monkeypatch.setattr(Path, "write_bytes", lambda path, content: write_bytes(path, content[:-1]))
        with pytest.raises(DataError, match=r"n03000000_7\.JPEG cannot be written \(.*\d+ bytes arrived of \d+\)"):
            prepare_imagenet(out, train=train, official=official())

    def test_a_folder_that_cannot_be_made_is_named(self, train, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(DataError, match=r"file/train.* cannot be made \(.*Not a directory.*make its folder"):
            prepare_imagenet(tmp_path / "file", train=train, official=official())


def test_the_command_says_what_it_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["prepare", "imagenet", "--out", str(tmp_path)])
    assert "no ImageNet file is given" in capsys.readouterr().err
    monkeypatch.setattr(imagenet, "prepare_imagenet", lambda out, **files: {"train": SplitCounts(1000, 900, 100)})
    main(["prepare", "imagenet", "--out", str(tmp_path)])
    assert capsys.readouterr().out == f"{tmp_path / 'train'}: 1,000 classes, 900 images extracted, 100 were there\n"
