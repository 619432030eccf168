"""Folders of images: each real folder is read once, and what is left out is counted and named."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lamamba.data import FolderSource, open_source
from lamamba.data.decoding import IMAGE_SUFFIXES
from lamamba.data.folders import list_classes, list_images_below
from lamamba.errors import DataError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes, `a` with one image and `b` with two."""
    for name in ("a/1.png", "b/1.png", "b/deep/2.png"):
        save(tmp_path / "set" / name)
    return tmp_path / "set"


def save(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4), 99).save(path)


def names(folder: Path) -> list[tuple[str, int]]:
    found = list_classes(folder)
    paths = [Path(path).relative_to(folder).as_posix() for path in found.paths]
    return list(zip(paths, found.labels, strict=True))


ONCE = [("a/1.png", 0), ("b/1.png", 1), ("b/deep/2.png", 1)]


@pytest.mark.parametrize(
    "links",
    [
        {"a/up": "..", "b/up": ".."},
        {"a/self": ".", "b/deep/self": "."},
        {"b/deep/up": "../.."},
        {"a/other": "../b", "b/other": "../a"},
        {"a/deep": "../b/deep"},
        {"a/x/y/z": "../../../b", "b/deep/round": "../../a/x"},
    ],
)
def test_links_within_a_set_add_no_image_and_change_no_label(root: Path, links: dict[str, str]) -> None:
    for name, target in links.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(target)
    assert names(root) == ONCE
    assert list_classes(root).left_out == f"{len(links)} links to folders that are read already"
    assert list_images_below(root).images == [str(root / name) for name, _ in ONCE]


def test_folders_elsewhere_are_read_once_in_each_class_that_links_to_them(root: Path) -> None:
    elsewhere = root.parent / "elsewhere"
    save(elsewhere / "3.png")
    save(elsewhere / "more" / "4.png")
    (elsewhere / "back").symlink_to(root)
    (elsewhere / "more" / "round").symlink_to(elsewhere)
    for name in ("a/one", "a/two", "b/one"):
        (root / name).symlink_to(elsewhere)
    linked = ["3.png", "more/4.png"]
    added = [(f"{name}/one/{path}", label) for label, name in enumerate("ab") for path in linked]
    assert names(root) == sorted([*ONCE, *added])
    assert len(list_images_below(root).images) == 5


def test_a_pool_of_hidden_images_is_read_through_links(root: Path) -> None:
    save(root / ".pool" / "5.png")
    (root / "a" / "pool").symlink_to("../.pool")
    (root / "a" / "6.png").symlink_to("../.pool/5.png")
    assert names(root) == [("a/1.png", 0), ("a/6.png", 0), ("a/pool/5.png", 0), *ONCE[1:]]


@pytest.mark.parametrize(("link", "target"), [("c", "a"), ("c", "."), ("0", "b")])
def test_a_class_folder_that_is_another_ones_is_refused(root: Path, link: str, target: str) -> None:
    (root / link).symlink_to(target)
    with pytest.raises(DataError, match=rf"class folder {root}/\w is the same folder as {root}.*remove one"):
        list_classes(root)


def test_a_class_folder_that_leads_nowhere_is_named(root: Path) -> None:
    (root / "c").symlink_to("gone")
    with pytest.raises(DataError, match=rf"{root}/c is a link that leads nowhere: restore"):
        list_classes(root)
    (root / "c").unlink()
    (root / "c").symlink_to("c")
    with pytest.raises(DataError, match=rf"{root}/c is a link that leads nowhere"):
        list_classes(root)


def test_all_that_is_left_out_is_counted_and_named(root: Path) -> None:
    for name in ("LICENSE", "a/x.TXT", "b/y.txt", "b/deep/z.heic", "a/.hidden", ".DS_Store"):
        (root / name).write_text("no image")
    (root / "a" / "gone").symlink_to("nowhere")
    os.mkfifo(root / "a" / "pipe.png")
    (root / "a" / "piped.png").symlink_to("pipe.png")
    expected = "2 .txt, 2 .png, 1 without suffix, 1 .heic"
    found = open_source(str(root), image_size=4)
    assert len(found) == 3
    left_out = found.left_out.split(", ")
    assert sorted(left_out[:4]) == sorted(expected.split(", "))
    assert left_out[4:] == [f"1 dangling links ({root}/a/gone)", "2 hidden"]
    (root / "c").mkdir()
    (root / "c" / "only.heic").write_text("no image")
    with pytest.raises(DataError, match=r"class folder .*/c has no images \(1 .heic\): add some"):
        list_classes(root)
    with pytest.raises(DataError, match=r"/c has no images: put files in it .*; it has 1 .heic"):
        list_classes(root / "c")


def test_names_are_counted_to_an_end(root: Path) -> None:
    for number in range(9):
        (root / "a" / f"x.{number:03d}").write_text("")
    assert list_classes(root).left_out.endswith("4 of 4 more kinds")


def test_a_name_that_is_no_text_can_be_printed(root: Path) -> None:
    Path(os.fsdecode(os.fsencode(root / "a") + b"/x.\xff")).write_text("")
    assert list_classes(root).left_out == "1 .\\udcff"
    save(Path(os.fsdecode(os.fsencode(root) + b"/c\xff/1.png")))
    assert list_classes(root).class_names == ("a", "b", "c\\xff")


@pytest.mark.parametrize("suffix", ["avif", "AVIFS", "jfif", "Jpe", "jp2", "j2k", "tga", "ppm", "ico", "apng", "qoi"])
def test_every_format_of_pillow_is_read(root: Path, suffix: str) -> None:
    if f".{suffix.lower()}" not in Image.registered_extensions():
        pytest.skip(f"this Pillow knows no .{suffix}")
    kind = Image.registered_extensions()[f".{suffix.lower()}"]
    mode = "RGB" if kind != "ICO" else "RGBA"
    Image.new(mode, (32, 32), (200, 200, 200)).save(root / "a" / f"x.{suffix}", kind)
    source = FolderSource(root, image_size=16)
    assert (len(source), source.left_out) == (4, "")
    assert np.abs(source.load(1)[0].astype(int) - 200).max() <= 3


def test_what_pillow_cannot_decode_is_no_image() -> None:
    assert {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"} <= set(IMAGE_SUFFIXES)
    assert not {".eps", ".ps", ".h5", ".mpg", ".wmf", ".pdf", ".npz"} & set(IMAGE_SUFFIXES)
