"""Data is opened by name or from a folder; what cannot be read is named, or skipped and counted."""

import os
import re

import numpy as np
import pytest
import torch
from image_files import make_class_folder, save_image
from PIL import Image

from lamamba.data import FolderSource, open_source, to_float, to_uint8
from lamamba.errors import ConfigError, DataError


class TestOpenSource:
    @pytest.mark.parametrize("name", ["builtin", "fashion-mnist"])
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"image_size": 64}, r"image_size 64 .*give image_size \(--image-size\) 32 or none"),
            ({"channels": 2}, r"channels 2 .*give channels \(--channels\) 1 or 3"),
        ],
    )
    def test_named_sources_have_one_form(self, name, options, message):
        with pytest.raises(ConfigError, match=message):
            open_source(name, **options)

    @pytest.mark.parametrize(
        ("name", "meant"),
        [
            ("bultin", "builtin"),
            ("Builtin", "builtin"),
            ("fashion_mnist", "fashion-mnist"),
            ("fashionmnist", "fashion-mnist"),
        ],
    )
    def test_suggests_the_nearest_name(self, name, meant):
        with pytest.raises(DataError, match=rf"data '{name}' is neither .* did you mean '{meant}'\?"):
            open_source(name)

    @pytest.mark.parametrize("name", ["/no/such/place", ""])
    def test_lists_the_names_when_none_is_near(self, name):
        with pytest.raises(
            DataError, match=rf"data '{name}' is neither .*give 'builtin', 'fashion-mnist', a folder or user/name"
        ):
            open_source(name, image_size=8)

    def test_refuses_a_folder_for_another_source(self, tmp_path):
        with pytest.raises(ConfigError, match=r"\(--data-folder\) is only for data 'fashion-mnist', not for 'builtin'"):
            open_source("builtin", folder=tmp_path)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, r"image_size is not set .*give image_size \(--image-size\).* for example 256"),
            ({"image_size": 0}, "image_size is 0, not positive"),
            ({"image_size": 8, "channels": 2}, r"channels 2 .*give channels \(--channels\) 1 or 3"),
        ],
    )
    def test_a_folder_needs_sound_options(self, tmp_path, options, message):
        make_class_folder(tmp_path)
        with pytest.raises(ConfigError, match=message):
            open_source(str(tmp_path), **options)


class TestFolder:
    def test_subfolders_are_classes(self, tmp_path):
        make_class_folder(tmp_path)
        save_image(tmp_path / "ant" / "deeper" / "0.JPG", (50, 50, 50))
        save_image(tmp_path / "ant" / ".hidden.png")
        save_image(tmp_path / "ant" / ".cache" / "a.png")
        save_image(tmp_path / ".cache" / "a.png")
        (tmp_path / "ant" / "notes.txt").write_text("no image")
        (tmp_path / "LICENSE").write_text("no image")
        source = open_source(str(tmp_path), image_size=8)
        assert source.class_names == ("ant", "bee")
        assert (source.num_classes, source.channels, source.image_size) == (2, 3, 8)
        assert source.name == tmp_path.name
        loaded = [source.load(index) for index in range(len(source))]
        assert [label for _, label in loaded] == [0, 0, 0, 0, 1, 1, 1]
        assert [int(image.mean().round()) for image, _ in loaded] == [0, 1, 2, 50, 100, 101, 102]
        assert loaded[0][0].shape == (8, 8, 3)

    @pytest.mark.parametrize("suffix", ["png", "JPG", "jpeg", "webp", "bmp", "GIF", "tif", "tiff"])
    def test_flat_images_have_no_classes(self, tmp_path, suffix):
        save_image(tmp_path / f"a.{suffix}", (200, 200, 200))
        source = open_source(str(tmp_path), image_size=8, channels=1)
        assert (len(source), source.num_classes, source.class_names) == (1, 0, ())
        image, label = source.load(0)
        assert image.shape == (8, 8, 1)
        assert label == 0
        assert np.abs(image.astype(int) - 200).max() <= 2

    def test_linked_subfolders_are_followed(self, tmp_path):
        root = make_class_folder(tmp_path / "set")
        save_image(tmp_path / "elsewhere" / "x.png")
        (root / "ant" / "more").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
        (root / "cat").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
        source = open_source(str(root), image_size=8)
        assert source.class_names == ("ant", "bee", "cat")
        assert np.bincount(source.labels).tolist() == [4, 3, 1]

    def test_a_file_is_not_a_folder(self, tmp_path):
        save_image(tmp_path / "a.png")
        with pytest.raises(DataError, match=r"a\.png is a file: give an existing folder"):
            open_source(str(tmp_path / "a.png"), image_size=8)
        with pytest.raises(DataError, match="gone is missing"):
            FolderSource(tmp_path / "gone", image_size=8)

    def test_an_empty_folder_is_named(self, tmp_path):
        (tmp_path / "notes.txt").write_text("no image")
        with pytest.raises(DataError, match=rf"{tmp_path} has no images: put files in it that end in \.png"):
            open_source(str(tmp_path), image_size=8)

    def test_a_single_class_is_named(self, tmp_path):
        save_image(tmp_path / "only" / "a.png")
        with pytest.raises(DataError, match=r"single class folder, only: .*without classes, or add a second class"):
            open_source(str(tmp_path), image_size=8)

    def test_a_mixture_is_named(self, tmp_path):
        save_image(make_class_folder(tmp_path) / "stray.png")
        with pytest.raises(DataError, match=r"both images \(stray\.png\) and class folders \(ant\)"):
            open_source(str(tmp_path), image_size=8)

    def test_an_empty_class_is_named(self, tmp_path):
        (make_class_folder(tmp_path) / "cat").mkdir()
        with pytest.raises(DataError, match=r"class folder .*cat has no images"):
            open_source(str(tmp_path), image_size=8)

    def test_an_unreadable_subfolder_is_not_passed_over(self, monkeypatch, tmp_path):
        (make_class_folder(tmp_path) / "ant" / "locked").mkdir()
        scandir = os.scandir

        def refuse(path):
            if str(path).endswith("locked"):
                raise PermissionError(13, "Permission denied", str(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refuse)
        with pytest.raises(DataError, match=r"locked cannot be listed \(Permission denied\)"):
            open_source(str(tmp_path), image_size=8)


class TestBadFiles:
    @staticmethod
    def add_bad_files(root):
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        bad = []
        for suffix in ("png", "jpg", "webp", "bmp", "gif"):
            path = root / "bee" / f"truncated.{suffix}"
            Image.fromarray(noise).save(path)
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            bad.append(path)
        for name, content in (("empty.png", b""), ("text.jpg", b"hello")):
            (root / "bee" / name).write_bytes(content)
            bad.append(root / "bee" / name)
        (root / "bee" / "dangling.png").symlink_to(root / "nowhere.png")
        Image.fromarray(np.ones((8, 8), np.float32)).save(root / "bee" / "float.tif")
        return {str(path) for path in [*bad, root / "bee" / "dangling.png", root / "bee" / "float.tif"]}

    def test_each_is_named_when_touched(self, tmp_path):
        bad = self.add_bad_files(make_class_folder(tmp_path))
        source = open_source(str(tmp_path), image_size=8)
        assert source.bad_files == ()
        for index, path in enumerate(source.paths):
            if path in bad:
                with pytest.raises(DataError, match=re.escape(path)):
                    source.load(index)
            else:
                assert source.load(index)[0].shape == (8, 8, 3)

    def test_they_are_skipped_and_listed_on_demand(self, tmp_path):
        bad = self.add_bad_files(make_class_folder(tmp_path))
        source = open_source(str(tmp_path), image_size=8, skip_bad_images=True)
        assert (len(source), len(source.bad_files)) == (6, len(bad))
        assert set(source.bad_files) == bad
        assert [source.load(index)[1] for index in range(6)] == [0, 0, 0, 1, 1, 1]

    def test_a_class_is_never_lost_silently(self, tmp_path):
        make_class_folder(tmp_path)
        (tmp_path / "cat").mkdir()
        (tmp_path / "cat" / "a.png").write_bytes(b"")
        with pytest.raises(DataError, match=r"cat has no readable image \(1 bad files skipped\)"):
            open_source(str(tmp_path), image_size=8, skip_bad_images=True)

    def test_a_flat_folder_of_bad_files_is_named(self, tmp_path):
        (tmp_path / "a.png").write_bytes(b"")
        with pytest.raises(DataError, match=rf"{tmp_path} has no readable image"):
            open_source(str(tmp_path), image_size=8, skip_bad_images=True)


class TestRange:
    def test_float_and_uint8_are_inverse(self):
        every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
        floats = to_float(every)
        assert floats.dtype == torch.float32
        assert (floats.min(), floats.max()) == (-1, 1)
        assert torch.equal(to_uint8(floats), every)
        assert torch.equal(to_uint8(floats.double()), every)

    def test_to_uint8_rounds_and_clamps(self):
        step = 1 / 127.5
        values = torch.tensor([-9.0, -1 + 0.4 * step, -1 + 0.6 * step, 1 - 0.4 * step, 9.0])
        assert to_uint8(values).tolist() == [0, 0, 1, 255, 255]

    def test_wrong_dtypes_are_refused(self):
        with pytest.raises(DataError, match=r"torch\.float32, not torch\.uint8"):
            to_float(torch.zeros(2))
        with pytest.raises(DataError, match=r"torch\.uint8, not floating-point"):
            to_uint8(torch.zeros(2, dtype=torch.uint8))
