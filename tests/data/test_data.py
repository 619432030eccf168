import os
import re
import signal
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from lamamba.data import (
    ArraySource,
    FolderSource,
    batches,
    crop_centre,
    flip_choices,
    open_source,
    permutation,
    read_image,
    reading_order,
    to_float,
    to_uint8,
)
from lamamba.data.decoding import convert_image
from lamamba.data.order import _mix_bits
from lamamba.errors import ConfigError, DataError


def save_image(path, colour=(10, 20, 30), size=(8, 8), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def write_png(path, width, depth, kind, row, transparent):
    """Write one row of packed pixels with a transparent value, of any depth: Pillow writes but few of these."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, 1, depth, kind, 0, 0, 0)
    parts = [(b"IHDR", header), (b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))]
    parts += [(b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))


def make_class_folder(root, per_class=3):
    """Two classes whose image k has the colour (100 * label + k) in every channel."""
    for label, name in enumerate(("ant", "bee")):
        for k in range(per_class):
            save_image(root / name / f"{k:02d}.png", (100 * label + k,) * 3)
    return root


def counting_source(length=10):
    """Image k is k in its left column and 0 elsewhere; its label is k."""
    images = np.zeros((length, 1, 2, 4), np.uint8)
    images[:, :, :, 0] = np.arange(length)[:, None, None]
    return ArraySource("counting", images, np.arange(length), ())


def take(iterator, num_batches):
    return [next(iterator) for _ in range(num_batches)]


def joined(pairs):
    return torch.cat([images for images, _ in pairs]), torch.cat([labels for _, labels in pairs])


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
        assert source.skipped == 0
        for index, path in enumerate(source.paths):
            if path in bad:
                with pytest.raises(DataError, match=re.escape(path)):
                    source.load(index)
            else:
                assert source.load(index)[0].shape == (8, 8, 3)

    def test_they_are_skipped_and_listed_on_demand(self, tmp_path):
        bad = self.add_bad_files(make_class_folder(tmp_path))
        source = open_source(str(tmp_path), image_size=8, skip_bad_images=True)
        assert (len(source), source.skipped) == (6, len(bad))
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


class TestReadImage:
    @pytest.mark.parametrize(
        ("mode", "colour"), [("RGBA", (255, 0, 0, 0)), ("LA", (0, 0)), ("RGBA", (255, 255, 255, 255))]
    )
    def test_transparency_lies_on_white(self, tmp_path, mode, colour):
        save_image(tmp_path / "a.png", colour, mode=mode)
        assert np.asarray(read_image(tmp_path / "a.png", 3)).min() == 255
        assert np.asarray(read_image(tmp_path / "a.png", 1)).min() == 255

    def test_half_transparency_is_mixed(self, tmp_path):
        save_image(tmp_path / "a.png", (0, 100, 200, 128), mode="RGBA")
        assert read_image(tmp_path / "a.png", 3).getpixel((0, 0)) == pytest.approx((127, 177, 227), abs=1)

    def test_a_transparent_palette_entry_is_white(self, tmp_path):
        image = Image.new("P", (8, 8), 1)
        image.putpalette([0, 0, 0, 10, 20, 30])
        image.putpixel((0, 0), 0)
        image.save(tmp_path / "a.png", transparency=0)
        image.save(tmp_path / "b.png")
        assert read_image(tmp_path / "a.png", 3).getpixel((0, 0)) == (255, 255, 255)
        assert read_image(tmp_path / "a.png", 3).getpixel((1, 0)) == (10, 20, 30)
        assert read_image(tmp_path / "b.png", 3).getpixel((0, 0)) == (0, 0, 0)

    def test_colour_becomes_luma_and_grey_becomes_three_equal_channels(self, tmp_path):
        save_image(tmp_path / "colour.png", (0, 255, 0))
        save_image(tmp_path / "grey.png", 77, mode="L")
        assert read_image(tmp_path / "colour.png", 1).getpixel((0, 0)) == 150  # 0.587 * 255
        assert read_image(tmp_path / "grey.png", 3).getpixel((0, 0)) == (77, 77, 77)
        assert read_image(tmp_path / "grey.png", 1).getpixel((0, 0)) == 77

    @pytest.mark.parametrize("suffix", ["png", "tif"])
    def test_16_bits_are_scaled_to_8(self, tmp_path, suffix):
        values = np.array([[0, 257, 128 * 257, 65535], [100, 200, 40000, 65000]], np.uint16)
        Image.fromarray(values).save(tmp_path / f"a.{suffix}")
        expected = np.round(values / 257)
        assert np.array_equal(np.asarray(read_image(tmp_path / f"a.{suffix}", 1)), expected)
        assert np.array_equal(np.asarray(read_image(tmp_path / f"a.{suffix}", 3))[..., 2], expected)

    @pytest.mark.parametrize(
        ("depth", "row", "transparent", "expected"),
        [
            # (bit depth, packed pixels of one row, the tRNS chunk, the grey that is read)
            (1, b"\x40", (1,), [0, 255]),
            (1, b"\x40", (0,), [255, 255]),
            (2, b"\x10", (1,), [0, 255]),
            (2, b"\x90", (1,), [170, 255]),
            (4, b"\x3f", (3,), [255, 255]),
            (4, b"\x2f", (3,), [34, 255]),
            (8, b"\x03\x80", (3,), [255, 128]),
            (16, b"\x80\x03\x80\x80", (0x8003,), [255, 128]),
            (16, b"\x01\x01\x80\x80", (0x8080,), [1, 255]),
        ],
    )
    def test_a_transparent_grey_is_white_at_every_depth(self, tmp_path, depth, row, transparent, expected):
        write_png(tmp_path / "a.png", 2, depth, 0, row, transparent)
        assert np.asarray(read_image(tmp_path / "a.png", 1)).tolist() == [expected]
        assert np.asarray(read_image(tmp_path / "a.png", 3))[..., 1].tolist() == [expected]

    @pytest.mark.parametrize(("depth", "kind"), [(8, "6B"), (16, ">6H")])
    def test_a_transparent_color_is_white(self, tmp_path, depth, kind):
        row = struct.pack(kind, *(part * (1 if depth == 8 else 257) for part in (1, 2, 3, 4, 5, 6)))
        write_png(tmp_path / "a.png", 2, depth, 2, row, np.array([1, 2, 3]) * (1 if depth == 8 else 257))
        assert np.asarray(read_image(tmp_path / "a.png", 3)).tolist() == [[[255, 255, 255], [4, 5, 6]]]

    @pytest.mark.parametrize("mode", ["La", "RGBa"])
    def test_premultiplied_alpha_lies_on_white(self, mode):
        image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
        image.putpixel((1, 0), (90, 90, 90, 255))
        straight = image.convert({"La": "LA", "RGBa": "RGBA"}[mode])
        assert np.asarray(convert_image(straight.convert(mode), 1)).tolist() == [[255, 90]]

    def test_a_palette_with_alpha_lies_on_white(self):
        image = Image.new("RGBA", (4, 4), (0, 0, 0, 0)).quantize(4)
        assert np.asarray(convert_image(image, 3)).min() == 255

    def test_cmyk_and_bilevel_are_converted(self, tmp_path):
        save_image(tmp_path / "a.tif", (255, 0, 0, 0), mode="CMYK")
        save_image(tmp_path / "b.png", 1, mode="1")
        assert read_image(tmp_path / "a.tif", 3).getpixel((0, 0)) == (0, 255, 255)
        assert read_image(tmp_path / "b.png", 3).getpixel((0, 0)) == (255, 255, 255)

    @pytest.mark.parametrize("mode", ["F", "I"])
    def test_32_bits_are_refused(self, tmp_path, mode):
        save_image(tmp_path / "a.tif", 3, mode=mode)
        with pytest.raises(
            DataError, match=rf"a\.tif cannot be read .*it has 32-bit pixels \(mode {mode}\).*8 or 16 bits"
        ):
            read_image(tmp_path / "a.tif", 1)

    def test_exif_orientation_is_applied(self, tmp_path):
        image = Image.new("RGB", (8, 4), "black")
        image.putpixel((0, 0), (255, 255, 255))
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned a quarter clockwise: top left goes to top right
        image.save(tmp_path / "a.png", exif=exif)
        upright = read_image(tmp_path / "a.png", 3)
        assert upright.size == (4, 8)
        assert upright.getpixel((3, 0)) == (255, 255, 255)

    def test_the_first_frame_of_an_animation_is_read(self, tmp_path):
        frames = [Image.new("L", (8, 8), value) for value in (40, 200)]
        frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
        assert read_image(tmp_path / "a.gif", 1).getpixel((4, 4)) == 40


class TestCrop:
    @pytest.mark.parametrize("size", [(40, 16), (16, 40), (37, 16), (16, 16)])
    def test_the_centre_is_kept_unscaled(self, size):
        pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0]), dtype=np.uint8)
        left, top = (size[0] - 16) // 2, (size[1] - 16) // 2
        cropped = np.asarray(crop_centre(Image.fromarray(pixels), 16))
        assert np.array_equal(cropped, pixels[top : top + 16, left : left + 16])

    def test_landmarks_of_a_wide_image(self):
        # the central square is columns 120 to 239: its left half is 60, its right half 180, all around is white
        pixels = np.full((120, 360), 255, np.uint8)
        pixels[:, 120:180], pixels[:, 180:240] = 60, 180
        for tall in (False, True):
            cropped = np.asarray(crop_centre(Image.fromarray(pixels.T if tall else pixels), 20)).astype(int)
            cropped = cropped.T if tall else cropped
            assert cropped.shape == (20, 20)
            # two pixels beside each edge bicubic interpolation rings
            assert (np.abs(cropped[:, 2:8] - 60) <= 1).all()
            assert (np.abs(cropped[:, 12:18] - 180) <= 1).all()
            assert (np.abs(cropped[:, [0, 9]] - 60) < 30).all()
            assert (np.abs(cropped[:, [10, 19]] - 180) < 30).all()

    def test_halving_is_a_box_mean(self):
        pixels = np.random.default_rng(0).integers(0, 256, (32, 48), dtype=np.uint8)
        means = pixels.reshape(16, 2, 24, 2).mean(axis=(1, 3))
        cropped = np.asarray(crop_centre(Image.fromarray(pixels), 16)).astype(float)
        assert np.abs(cropped - means[:, 4:20]).max() <= 1  # Pillow rounds after each direction

    def test_halving_is_repeated_before_bicubic(self):
        pixels = np.random.default_rng(0).integers(0, 256, (70, 90), dtype=np.uint8)
        image = Image.fromarray(pixels)
        box = image.resize((45, 35), Image.Resampling.BOX).resize((22, 17), Image.Resampling.BOX)
        bicubic = box.resize((21, 16), Image.Resampling.BICUBIC).crop((2, 0, 18, 16))
        assert np.array_equal(np.asarray(crop_centre(image, 16)), np.asarray(bicubic))

    @pytest.mark.parametrize("size", [(5, 9), (1, 3), (33, 31), (257, 100)])
    def test_any_size_gives_the_square(self, size):
        assert crop_centre(Image.new("RGB", size, (7, 8, 9)), 16).size == (16, 16)
        assert np.asarray(crop_centre(Image.new("RGB", size, (7, 8, 9)), 16))[..., 1].max() == 8


class TestOrder:
    def test_each_epoch_is_another_permutation(self):
        orders = [permutation(seed, epoch, 50).tolist() for seed in (0, 1) for epoch in (0, 1)]
        assert all(sorted(order) == list(range(50)) for order in orders)
        assert len({tuple(order) for order in orders}) == 4

    def test_order_never_changes_between_versions(self):
        assert permutation(0, 0, 8).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
        assert flip_choices(np.arange(10), seed=0).tolist() == [bool(bit) for bit in (1, 1, 1, 0, 0, 1, 0, 0, 1, 1)]
        # the first two outputs of the published SplitMix64 from state 0
        states = np.array([0, 0x9E3779B97F4A7C15], np.uint64)
        assert _mix_bits(states).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]

    def test_reading_order_crosses_epochs(self):
        positions = np.arange(25)
        expected = np.concatenate([permutation(3, epoch, 7) for epoch in range(4)])[:25]
        assert np.array_equal(reading_order(positions, length=7, seed=3), expected)

    def test_flips_are_fair_and_independent(self):
        flips = flip_choices(np.arange(100_000), seed=0)
        others = flip_choices(np.arange(100_000), seed=1)
        for rate in (flips.mean(), (flips == others).mean(), *((flips[k:] == flips[:-k]).mean() for k in (1, 2, 1000))):
            assert abs(rate - 0.5) < 0.01  # six standard deviations

    @pytest.mark.parametrize("horizontal_flip", [False, True])
    @pytest.mark.parametrize("start", [0, 1, 9, 10, 23])
    def test_resuming_gives_the_very_images(self, start, horizontal_flip):
        options = {"seed": 5, "horizontal_flip": horizontal_flip}
        whole = joined(take(batches(counting_source(), batch_size=1, **options), start + 24))
        rest = joined(take(batches(counting_source(), batch_size=8, start=start, **options), 3))
        assert torch.equal(rest[0], whole[0][start:])
        assert torch.equal(rest[1], whole[1][start:])

    def test_seed_and_flip_change_what_is_read(self):
        def read(**options):
            return joined(take(batches(counting_source(), batch_size=10, **options), 2))

        assert not torch.equal(read(seed=0)[1], read(seed=1)[1])
        plain, flipped = read(seed=0)[0], read(seed=0, horizontal_flip=True)[0]
        chosen = torch.from_numpy(flip_choices(np.arange(20), seed=0))
        assert 0 < chosen.sum() < 20
        assert torch.equal(flipped[chosen], plain[chosen].flip(-1))
        assert torch.equal(flipped[~chosen], plain[~chosen])

    def test_a_batch_may_be_larger_than_the_set(self):
        images, labels = next(batches(counting_source(3), batch_size=7, seed=0))
        assert images.shape == (7, 1, 2, 4)
        assert images.dtype == torch.uint8
        assert labels.dtype == torch.int64
        assert sorted(labels[:3].tolist()) == sorted(labels[3:6].tolist()) == [0, 1, 2]
        assert torch.equal(images[:, 0, 0, 0].long(), labels)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"batch_size": 0}, "batch_size 0"),
            ({"start": -1}, "start -1"),
            ({"num_workers": -2}, "num_workers -2"),
            ({"seed": -1}, "seed is -1"),
            ({"seed": 2**64}, "seed is 18446744073709551616"),
        ],
    )
    def test_wrong_numbers_are_refused_at_once(self, options, message):
        with pytest.raises(ConfigError, match=message):
            batches(counting_source(), **{"batch_size": 2, "seed": 0, **options})

    def test_an_empty_source_is_refused(self):
        with pytest.raises(DataError, match="counting has no images"):
            batches(counting_source(0), batch_size=2, seed=0)


class TestFolderBatches:
    def test_workers_do_not_change_what_is_read(self, tmp_path):
        source = open_source(str(make_class_folder(tmp_path, per_class=5)), image_size=8)
        options = {"batch_size": 3, "seed": 2, "start": 4, "horizontal_flip": True}
        images, labels = joined(take(batches(source, **options), 6))
        assert images.shape == (18, 3, 8, 8)
        assert set(labels.tolist()) == {0, 1}
        assert torch.equal(images[:, 0, 0, 0] >= 100, labels == 1)
        for num_workers in (1, 2):
            others = joined(take(batches(source, num_workers=num_workers, **options), 6))
            assert torch.equal(others[0], images)
            assert torch.equal(others[1], labels)

    @pytest.mark.parametrize("num_workers", [0, 1])
    def test_the_global_generator_is_left_alone(self, tmp_path, num_workers):
        source = open_source(str(make_class_folder(tmp_path)), image_size=8)
        state = torch.get_rng_state()
        take(batches(source, batch_size=2, seed=0, num_workers=num_workers), 2)
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_a_bad_file_is_named_in_one_line(self, tmp_path, num_workers):
        bad = make_class_folder(tmp_path) / "bee" / "bad.png"
        bad.write_bytes(b"")
        source = open_source(str(tmp_path), image_size=8)
        with pytest.raises(DataError) as caught:
            take(batches(source, batch_size=2, seed=0, num_workers=num_workers), 4)
        assert str(caught.value).startswith(f"{bad} cannot be read as an image")
        assert str(caught.value).endswith("replace or delete it, or skip it with skip_bad_images (--skip-bad-images)")
        assert "\n" not in str(caught.value)

    @pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
    def test_a_dead_worker_is_reported(self, tmp_path):
        source = DeadlySource(make_class_folder(tmp_path), image_size=8)
        with pytest.raises(DataError, match=r"worker that reads .* died .*use fewer num_workers \(--num-workers\)"):
            take(batches(source, batch_size=2, seed=0, num_workers=1), 1)


class DeadlySource(FolderSource):
    def load(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


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
