import errno
import gzip
import io
import os
import re
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lamamba.cli import main
from lamamba.data import FolderSource, imagenet, preparing
from lamamba.data.imagenet import Expected, SplitCounts, prepare_imagenet
from lamamba.errors import ConfigError, DataError

WNIDS = ("n03000000", "n01000000", "n02000000")  # of the numbers 1, 2, 3; their order differs from the folders'
NUM_TRAIN = {"n03000000": 4, "n01000000": 3, "n02000000": 2}
TRUTH = (3, 1, 2, 2, 3, 1)
TINY = Expected(num_classes=3, num_train=9, num_validation_per_class=2)


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


def link(name):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return info


def class_entries(wnid):
    return [(f"{wnid}_{10 * k + 7}.JPEG", jpeg(wnid, k)) for k in range(NUM_TRAIN[wnid])]


def train_entries():
    return [(f"{wnid}.tar", tar_of(class_entries(wnid))) for wnid in WNIDS]


def validation_entries():
    """Not in the order of their numbers, as the official file."""
    numbers = (4, 1, 6, 2, 3, 5)
    return [(f"ILSVRC2012_val_{k:08d}.JPEG", jpeg(WNIDS[TRUTH[k - 1] - 1], k)) for k in numbers]


def meta_mat(wnids=WNIDS):
    """The struct array `synsets` as the devkit has it: classes first, then groups of them."""
    io_of_scipy = pytest.importorskip("scipy.io")
    fields = ("ILSVRC2012_ID", "WNID", "words", "num_children")
    synsets = np.empty(len(wnids) + 1, [(field, object) for field in fields])
    for number, wnid in enumerate(wnids, start=1):
        synsets[number - 1] = (number, wnid, "tench, Tinca tinca", 0)
    synsets[-1] = (len(wnids) + 1, "n00000001", "animal", len(wnids))
    file = io.BytesIO()
    io_of_scipy.savemat(file, {"synsets": synsets})
    return file.getvalue()


def write_devkit(path, truth=TRUTH, meta=None, left_out=None, more=()):
    entries = {
        "readme.txt": b"hello",
        "data/meta.mat": meta_mat() if meta is None else meta,
        "data/ILSVRC2012_validation_ground_truth.txt": "".join(f"{number}\n" for number in truth).encode(),
    }
    entries.pop(left_out, None)
    official = [(f"ILSVRC2012_devkit_t12/{name}", content) for name, content in entries.items()]
    path.write_bytes(gzip.compress(tar_of([*official, *more])))
    return path


@pytest.fixture
def train(tmp_path):
    path = tmp_path / "train.tar"
    path.write_bytes(tar_of(train_entries()))
    return path


@pytest.fixture
def validation(tmp_path):
    path = tmp_path / "val.tar"
    path.write_bytes(tar_of(validation_entries()))
    return path


@pytest.fixture
def devkit(tmp_path):
    return write_devkit(tmp_path / "devkit.tar.gz")


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
        counts = prepare_imagenet(out, train=train, validation=validation, devkit=devkit, expected=TINY)
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
        prepare_imagenet(out, train=train, validation=validation, devkit=devkit, expected=TINY)
        assert len(written) == 15
        counts = prepare_imagenet(out, train=train, validation=validation, devkit=devkit, expected=TINY)
        assert counts == {"validation": SplitCounts(3, 0, 6), "train": SplitCounts(3, 0, 9)}
        assert len(written) == 15
        assert tree(out) == TRAIN_TREE | VALIDATION_TREE

    def test_prints_nothing_without_a_terminal(self, train, validation, devkit, out, capfd):
        prepare_imagenet(out, train=train, validation=validation, devkit=devkit, expected=TINY)
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
            prepare_imagenet(out, **files, expected=TINY)
        assert not out.exists()

    def test_the_official_counts(self):
        official = imagenet.ILSVRC2012
        assert (official.num_classes, official.num_train, official.num_validation_per_class) == (1000, 1_281_167, 50)


class TestTrain:
    def test_needs_neither_devkit_nor_scipy(self, monkeypatch, train, out):
        monkeypatch.setitem(sys.modules, "scipy.io", None)
        assert prepare_imagenet(out, train=train, expected=TINY) == {"train": SplitCounts(3, 9, 0)}
        assert tree(out) == TRAIN_TREE

    def test_reads_one_image_at_a_time(self, monkeypatch, train, out):
        sizes = []
        read_entry = imagenet._read_entry
        monkeypatch.setattr(
            imagenet, "_read_entry", lambda tar, member: sizes.append(member.size) or read_entry(tar, member)
        )
        prepare_imagenet(out, train=train, expected=TINY)
        assert sorted(sizes) == sorted(map(len, TRAIN_TREE.values()))

    def test_goes_on_after_an_interruption(self, monkeypatch, train, out, written):
        write = preparing._write

        def stop(path, file):
            if len(written) == 6:
                raise KeyboardInterrupt
            return write(path, file)

        monkeypatch.setattr(preparing, "_write", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare_imagenet(out, train=train, expected=TINY)
        assert sorted(os.listdir(out / "train")) == [".incomplete-n01000000", "n03000000"]
        cut = out / "train" / ".incomplete-n01000000" / "n01000000_17.JPEG"
        os.truncate(cut, 100)  # as if it was stopped while writing
        first = list(written)
        monkeypatch.setattr(preparing, "_write", write)
        counts = prepare_imagenet(out, train=train, expected=TINY)
        assert counts == {"train": SplitCounts(3, 4, 5)}
        assert sorted(written[6:]) == [
            "n01000000_17.JPEG",
            "n01000000_27.JPEG",
            "n02000000_17.JPEG",
            "n02000000_7.JPEG",
        ]
        assert len(first) == 6
        assert tree(out) == TRAIN_TREE

    def test_goes_on_after_a_damaged_copy(self, train, tmp_path, out, written):
        """The damage lies in the header of the second class's second image."""
        content = bytearray(train.read_bytes())
        at = content.index(b"n01000000_17.JPEG")
        content[at + 100 : at + 108] = b"damaged!"
        damaged = tmp_path / "damaged.tar"
        damaged.write_bytes(content)
        written.clear()
        with pytest.raises(DataError, match=r"damaged\.tar: n01000000\.tar is damaged or cut off") as caught:
            prepare_imagenet(out, train=damaged, expected=TINY)
        assert_message(caught, "download ILSVRC2012_img_train.tar again", "1d675b47d978889d74fa0da5fadfb00e")
        assert sorted(os.listdir(out / "train")) == [".incomplete-n01000000", "n03000000"]
        before = {path: path.stat().st_mtime_ns for path in (out / "train" / "n03000000").iterdir()}
        assert prepare_imagenet(out, train=train, expected=TINY) == {"train": SplitCounts(3, 4, 5)}
        assert {path: path.stat().st_mtime_ns for path in before} == before
        assert len(written) == len(set(written)) == 9
        assert tree(out) == TRAIN_TREE

    @pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
    def test_a_cut_tar_is_named_before_the_work(self, train, out, share):
        content = train.read_bytes().rstrip(b"\0")
        train.write_bytes(content[: int(share * len(content))])
        with pytest.raises(DataError, match=r"train\.tar is damaged or cut off") as caught:
            prepare_imagenet(out, train=train, expected=TINY)
        assert_message(caught, "download ILSVRC2012_img_train.tar again", "1d675b47d978889d74fa0da5fadfb00e")
        assert not out.exists()

    @pytest.mark.parametrize("content", [b"", b"<html>Log in</html>" * 100, b"\x1f\x8b" + b"x" * 2000])
    def test_no_tar_is_named(self, train, out, content):
        train.write_bytes(content)
        with pytest.raises(DataError, match=r"train\.tar is damaged or cut off") as caught:
            prepare_imagenet(out, train=train, expected=TINY)
        assert_message(caught)

    def test_an_inner_file_that_is_no_tar_is_named(self, train, out):
        train.write_bytes(tar_of([*train_entries()[:2], ("n02000000.tar", b"no tar" * 200)]))
        with pytest.raises(DataError, match=r"train\.tar: n02000000\.tar is damaged or cut off"):
            prepare_imagenet(out, train=train, expected=TINY)
        assert "n02000000" not in os.listdir(out / "train")

    def test_a_wrong_number_of_classes_is_named_before_the_work(self, train, out):
        train.write_bytes(tar_of(train_entries()[:2]))
        with pytest.raises(DataError, match=r"train\.tar has 2 classes, not 3: download ILSVRC2012_img_train\.tar"):
            prepare_imagenet(out, train=train, expected=TINY)
        assert not out.exists()

    def test_a_wrong_number_of_images_is_named(self, train, out):
        with pytest.raises(DataError, match=r"train\.tar has 9 images, not 1,010: download"):
            prepare_imagenet(out, train=train, expected=Expected(3, 1010, 2))

    def test_a_class_that_the_devkit_does_not_know_is_named(self, train, tmp_path, out):
        devkit = write_devkit(tmp_path / "devkit.tar.gz", meta=meta_mat(("n03000000", "n01000000", "n04000000")))
        with pytest.raises(DataError, match=r"n02000000 is in only one of .*train\.tar and the devkit"):
            prepare_imagenet(out, train=train, devkit=devkit, expected=TINY)
        assert not out.exists()

    @pytest.mark.parametrize(
        "name", ["../evil.JPEG", "/tmp/evil.JPEG", "n01000000_7.JPEG/evil", "n02000000_7.JPEG", "a\nb"]
    )
    def test_an_unexpected_image_is_refused(self, train, out, name):
        inner = tar_of([*class_entries("n01000000")[:2], (name, b"evil")])
        train.write_bytes(tar_of([("n01000000.tar", inner), *train_entries()[::2]]))
        with pytest.raises(DataError, match=re.escape(f"n01000000.tar has the entry {name!r}")) as caught:
            prepare_imagenet(out, train=train, expected=TINY)
        assert_message(caught, "n01000000_18.JPEG", "download")
        assert not list(out.parent.rglob("*evil*"))
        assert "n01000000" not in os.listdir(out / "train")

    @pytest.mark.parametrize("name", ["../n01000000.tar", "n01000000", "n1.tar", "ILSVRC2012_val_00000001.JPEG"])
    def test_an_unexpected_class_is_refused(self, train, out, name):
        train.write_bytes(tar_of([*train_entries()[:2], (name, train_entries()[2][1])]))
        with pytest.raises(
            DataError, match=re.escape(f"train.tar has the entry {name!r}, which is not a name such as")
        ):
            prepare_imagenet(out, train=train, expected=TINY)
        assert not out.exists()

    def test_links_are_refused(self, train, out):
        inner = tar_of([*class_entries("n01000000")[:2], link("n01000000_99.JPEG")])
        train.write_bytes(tar_of([("n01000000.tar", inner), *train_entries()[::2]]))
        with pytest.raises(DataError, match=r"'n01000000_99\.JPEG', which is not a regular file"):
            prepare_imagenet(out, train=train, expected=TINY)
        train.write_bytes(tar_of([*train_entries()[:2], link("n02000000.tar")]))
        with pytest.raises(DataError, match=r"'n02000000\.tar', which is not a regular file"):
            prepare_imagenet(out, train=train, expected=TINY)

    def test_doubles_are_refused(self, train, out):
        train.write_bytes(tar_of([*train_entries()[:2], train_entries()[0]]))
        with pytest.raises(DataError, match=r"has the entry 'n03000000\.tar' twice"):
            prepare_imagenet(out, train=train, expected=TINY)
        inner = tar_of([*class_entries("n01000000"), class_entries("n01000000")[0]])
        train.write_bytes(tar_of([("n01000000.tar", inner), *train_entries()[::2]]))
        with pytest.raises(DataError, match=r"n01000000\.tar has the entry 'n01000000_7\.JPEG' twice"):
            prepare_imagenet(out, train=train, expected=TINY)

    def test_a_class_folder_that_lost_a_file_is_named(self, train, out):
        prepare_imagenet(out, train=train, expected=TINY)
        (out / "train" / "n01000000" / "n01000000_7.JPEG").unlink()
        with pytest.raises(DataError, match=r"train/n01000000 has 2 files, not 3: delete /.*/train/n01000000, and"):
            prepare_imagenet(out, train=train, expected=TINY)
        shutil.rmtree(out / "train" / "n01000000")
        assert prepare_imagenet(out, train=train, expected=TINY) == {"train": SplitCounts(3, 3, 6)}
        assert tree(out) == TRAIN_TREE

    def test_other_files_in_the_way_are_named(self, train, out):
        (out / "train" / "n09999999").mkdir(parents=True)
        with pytest.raises(DataError, match=r"train also holds 'n09999999', which is not in the tar: move it"):
            prepare_imagenet(out, train=train, expected=TINY)
        (out / "train" / "n09999999").rmdir()
        (out / "train" / ".incomplete-n01000000").mkdir()
        (out / "train" / ".incomplete-n01000000" / "n01000000_99.JPEG").touch()
        with pytest.raises(
            DataError, match=r"\.incomplete-n01000000 has 4 files, not 3: delete /.*/\.incomplete-n01000000, and"
        ):
            prepare_imagenet(out, train=train, expected=TINY)


class TestValidation:
    def test_needs_the_devkit(self, validation, out):
        with pytest.raises(ConfigError, match=r"without devkit, .*give devkit \(ILSVRC2012_devkit_t12\.tar\.gz\)"):
            prepare_imagenet(out, validation=validation, expected=TINY)

    def test_needs_scipy(self, monkeypatch, validation, devkit, out):
        monkeypatch.setitem(sys.modules, "scipy.io", None)
        with pytest.raises(DataError, match=r"devkit\.tar\.gz needs scipy .*run 'pip install scipy'"):
            prepare_imagenet(out, validation=validation, devkit=devkit, expected=TINY)

    @pytest.mark.parametrize("num_bytes", [100, 700], ids=["in a header", "in an image"])
    def test_goes_on_after_a_cut_copy(self, validation, devkit, tmp_path, out, written, num_bytes):
        content = validation.read_bytes()
        cut = tmp_path / "cut.tar"
        cut.write_bytes(content[: content.index(b"ILSVRC2012_val_00000003.JPEG") + num_bytes])  # the fifth in the tar
        written.clear()
        with pytest.raises(DataError, match=r"cut\.tar is damaged or cut off") as caught:
            prepare_imagenet(out, validation=cut, devkit=devkit, expected=TINY)
        assert_message(caught, "download ILSVRC2012_img_val.tar again", "29b22e2961454d5413ddabcf34fc5622")
        assert os.listdir(out) == [".incomplete-validation"]
        assert len(written) == 4
        counts = prepare_imagenet(out, validation=validation, devkit=devkit, expected=TINY)
        assert counts == {"validation": SplitCounts(3, 2, 4)}
        assert sorted(written) == sorted(name for name, _ in validation_entries())  # each once
        assert tree(out) == VALIDATION_TREE

    def test_goes_on_after_an_interruption(self, monkeypatch, validation, devkit, out, written):
        write = preparing._write

        def stop(path, file):
            if len(written) == 4:
                raise KeyboardInterrupt
            return write(path, file)

        written.clear()
        monkeypatch.setattr(preparing, "_write", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare_imagenet(out, validation=validation, devkit=devkit, expected=TINY)
        monkeypatch.setattr(preparing, "_write", write)
        os.truncate(next((out / ".incomplete-validation").rglob("*_00000001.JPEG")), 100)
        counts = prepare_imagenet(out, validation=validation, devkit=devkit, expected=TINY)
        assert counts == {"validation": SplitCounts(3, 3, 3)}
        assert tree(out) == VALIDATION_TREE

    def test_a_tar_cut_between_two_images_is_named(self, validation, devkit, out):
        with tarfile.open(validation) as tar:
            third = tar.getmembers()[2]
        validation.write_bytes(validation.read_bytes()[: third.offset])
        with pytest.raises(DataError, match=r"val\.tar has 2 images, not 6: download ILSVRC2012_img_val\.tar again"):
            prepare_imagenet(out, validation=validation, devkit=devkit, expected=TINY)
        assert not (out / "validation").exists()

    @pytest.mark.parametrize(
        "name",
        [
            "../evil.JPEG",
            "ILSVRC2012_val_00000000.JPEG",
            "ILSVRC2012_val_00000007.JPEG",
            "ILSVRC2012_val_1.JPEG",
            "n01000000.tar",
        ],
    )
    def test_an_unexpected_entry_is_refused(self, validation, devkit, out, name):
        validation.write_bytes(tar_of([*validation_entries()[:5], (name, b"evil")]))
        with pytest.raises(DataError, match=re.escape(f"val.tar has the entry {name!r}, which is not ILSVRC2012_val")):
            prepare_imagenet(out, validation=validation, devkit=devkit, expected=TINY)
        assert not list(out.parent.rglob("*evil*"))
        assert not (out / "validation").exists()

    def test_links_and_doubles_are_refused(self, validation, devkit, out):
        validation.write_bytes(tar_of([*validation_entries()[:5], link("ILSVRC2012_val_00000005.JPEG")]))
        with pytest.raises(DataError, match="which is not a regular file"):
            prepare_imagenet(out, validation=validation, devkit=devkit, expected=TINY)
        validation.write_bytes(tar_of([*validation_entries()[:5], validation_entries()[0]]))
        with pytest.raises(DataError, match=r"'ILSVRC2012_val_00000004\.JPEG' twice"):
            prepare_imagenet(out, validation=validation, devkit=devkit, expected=TINY)

    def test_a_folder_that_lost_a_file_is_named(self, validation, devkit, out):
        prepare_imagenet(out, validation=validation, devkit=devkit, expected=TINY)
        next((out / "validation" / "n02000000").iterdir()).unlink()
        with pytest.raises(DataError, match=r"validation/n02000000 has 1 files, not 2: delete /.*/validation, and"):
            prepare_imagenet(out, validation=validation, devkit=devkit, expected=TINY)
        shutil.rmtree(out / "validation" / "n02000000")
        with pytest.raises(DataError, match=r"validation/n02000000 has 0 files, not 2: delete /.*/validation, and"):
            prepare_imagenet(out, validation=validation, devkit=devkit, expected=TINY)
        shutil.rmtree(out / "validation")
        counts = prepare_imagenet(out, validation=validation, devkit=devkit, expected=TINY)
        assert counts == {"validation": SplitCounts(3, 6, 0)}
        assert tree(out) == VALIDATION_TREE

    def test_other_files_in_the_way_are_named(self, validation, devkit, out):
        other = out / ".incomplete-validation" / "n02000000" / "other.JPEG"
        other.parent.mkdir(parents=True)
        other.touch()
        with pytest.raises(DataError, match=r"n02000000 has 3 files, not 2: delete /.*/\.incomplete-validation, and"):
            prepare_imagenet(out, validation=validation, devkit=devkit, expected=TINY)
        assert not (out / "validation").exists()


class TestDevkit:
    @pytest.mark.parametrize(
        ("truth", "message"),
        [
            ((3, 1, 2, 2, 3, 3), " has 3 validation images of n02000000, not 2"),
            ((3, 1, 2, 2, 3), " has 1 validation images of n03000000, not 2"),
            ((*TRUTH, 2), " has 3 validation images of n01000000, not 2"),
            ((3, 1, 2, 2, 3, 4), r": .*ground_truth\.txt has a line with the number of no class \(4\)"),  # 4 is a group
            ((3, 1, 2, 2, 3, "one"), r": .*ground_truth\.txt has a line with the number of no class \(.*one"),
        ],
    )
    def test_wrong_classes_of_images_are_named(self, validation, tmp_path, out, truth, message):
        devkit = write_devkit(tmp_path / "devkit.tar.gz", truth=truth)
        with pytest.raises(DataError, match=rf"devkit\.tar\.gz{message}") as caught:
            prepare_imagenet(out, validation=validation, devkit=devkit, expected=TINY)
        assert_message(caught, "download ILSVRC2012_devkit_t12.tar.gz again", "fa75699e90414af021442c21a62c3abf")
        assert not out.exists()

    @pytest.mark.parametrize(
        ("wnids", "message"),
        [
            (WNIDS[:2], "has 2 classes, not 3"),
            ((*WNIDS[:2], WNIDS[0]), "has 2 classes, not 3"),
            ((*WNIDS[:2], "../evil"), r"names a class '\.\./evil', unlike n01440764"),
        ],
    )
    def test_wrong_classes_are_named(self, validation, tmp_path, out, wnids, message):
        devkit = write_devkit(tmp_path / "devkit.tar.gz", meta=meta_mat(wnids))
        with pytest.raises(DataError, match=rf"devkit\.tar\.gz {message}: download"):
            prepare_imagenet(out, validation=validation, devkit=devkit, expected=TINY)

    @pytest.mark.parametrize("name", ["data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"])
    def test_a_missing_entry_is_named(self, validation, tmp_path, out, name):
        for more in ([], [link(f"ILSVRC2012_devkit_t12/{name}")]):
            devkit = write_devkit(tmp_path / "devkit.tar.gz", left_out=name, more=more)
            with pytest.raises(DataError, match=rf"devkit\.tar\.gz has no file ILSVRC2012_devkit_t12/{name}: download"):
                prepare_imagenet(out, validation=validation, devkit=devkit, expected=TINY)

    @pytest.mark.parametrize("meta", [b"", b"MATLAB 5.0 MAT-file" + b"\0" * 300, b"\n\n" * 500])
    def test_a_damaged_meta_is_named(self, validation, tmp_path, out, meta):
        devkit = write_devkit(tmp_path / "devkit.tar.gz", meta=meta)
        with pytest.raises(DataError, match=r"devkit\.tar\.gz: .*meta\.mat cannot be read") as caught:
            prepare_imagenet(out, validation=validation, devkit=devkit, expected=TINY)
        assert_message(caught, "download")

    def test_a_short_read_is_named(self, monkeypatch, validation, devkit, out):
        monkeypatch.setattr(tarfile.TarFile, "extractfile", lambda tar, member: io.BytesIO(b"short"))
        with pytest.raises(DataError, match=r"devkit\.tar\.gz is damaged or cut off \(5 of \d+ bytes of .*meta\.mat\)"):
            prepare_imagenet(out, validation=validation, devkit=devkit, expected=TINY)

    @pytest.mark.parametrize("length", [0, 5, 100, -30])
    def test_a_cut_file_is_named(self, validation, devkit, out, length):
        devkit.write_bytes(devkit.read_bytes()[:length])
        with pytest.raises(DataError, match=r"devkit\.tar\.gz is damaged or cut off") as caught:
            prepare_imagenet(out, validation=validation, devkit=devkit, expected=TINY)
        assert_message(caught, "fa75699e90414af021442c21a62c3abf")


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
        with pytest.raises(DataError, match=rf"n01000000_17\.JPEG cannot be written .*: {advice}") as caught:
            prepare_imagenet(out, train=train, expected=TINY)
        assert_message(caught, os.strerror(number), "run the command again")
        monkeypatch.undo()
        assert prepare_imagenet(out, train=train, expected=TINY) == {"train": SplitCounts(3, 4, 5)}
        assert tree(out) == TRAIN_TREE

    def test_an_image_that_arrives_in_part_is_named(self, monkeypatch, train, out):
        write_bytes = Path.write_bytes
        monkeypatch.setattr(Path, "write_bytes", lambda path, content: write_bytes(path, content[:-1]))
        with pytest.raises(DataError, match=r"n03000000_7\.JPEG cannot be written \(\d+ bytes arrived of \d+\)"):
            prepare_imagenet(out, train=train, expected=TINY)

    def test_a_folder_that_cannot_be_made_is_named(self, train, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(DataError, match=r"file/train.* cannot be made \(Not a directory\): make its folder"):
            prepare_imagenet(tmp_path / "file", train=train, expected=TINY)

    def test_a_tar_that_cannot_be_opened_is_named(self, monkeypatch, train, out):
        def fail(path, mode):
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(tarfile, "bltn_open", fail)
        with pytest.raises(DataError, match=r"train\.tar cannot be read \(Permission denied\): make it readable"):
            prepare_imagenet(out, train=train, expected=TINY)


def test_the_command_says_what_it_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["prepare", "imagenet", "--out", str(tmp_path)])
    assert "no ImageNet file is given" in capsys.readouterr().err
    monkeypatch.setattr(imagenet, "prepare_imagenet", lambda out, **files: {"train": SplitCounts(1000, 900, 100)})
    main(["prepare", "imagenet", "--out", str(tmp_path)])
    assert capsys.readouterr().out == f"{tmp_path / 'train'}: 1,000 classes, 900 images extracted, 100 were there\n"
