"""Images of every mode and depth are decoded to 8 bits, upright, on white, and cropped to squares."""

import struct
import zlib

import numpy as np
import pytest
from image_files import save_image
from PIL import Image

from lamamba.data import crop_centre, read_image
from lamamba.data.decoding import convert_image
from lamamba.errors import DataError


def write_png(path, width, depth, kind, row, transparent):
    """Write one row of packed pixels with a transparent value, of any depth: Pillow writes but few of these."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, 1, depth, kind, 0, 0, 0)
    parts = [(b"IHDR", header), (b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))]
    parts += [(b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))


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
