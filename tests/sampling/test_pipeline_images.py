"""Images to start from, and masks, of every kind that users have."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipeline import build, latents_of

from lamamba.data import read_image
from lamamba.errors import LamambaError
from lamamba.sampling.pipeline import LaMambaDiffPipeline
from tiny_autoencoder import write_autoencoder


@pytest.mark.parametrize("objective", ["diffusion", "flow"])
def test_an_image_to_start_from_is_kept_the_more_the_less_it_is_noised(objective: str) -> None:
    pipe = build(objective)
    start = Image.fromarray(np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8))
    pixels = torch.from_numpy(np.array(start)).float()[None, None] / 127.5 - 1
    away = [
        float((latents_of(pipe, "Coat", 50, guidance_scale=1.0, image=start, strength=strength) - pixels).norm())
        for strength in (0.02, 0.3, 1.0)
    ]
    assert away[0] < away[1] < away[2]
    assert away[0] < 0.2 * float(pixels.norm())


@pytest.mark.parametrize("objective", ["diffusion", "flow"])
def test_outside_of_a_mask_the_image_stays(objective: str) -> None:
    pipe = build(objective)
    start = Image.fromarray(np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8))
    mask = Image.fromarray(np.repeat(np.array([[255] * 4 + [0] * 4], dtype=np.uint8), 8, axis=0))
    pixels = torch.from_numpy(np.array(start)).float()[None, None] / 127.5 - 1
    out = latents_of(pipe, ["Coat", "Bag"], 8, image=start, mask_image=mask, strength=1.0)
    assert torch.allclose(out[..., 4:], pixels[..., 4:].expand(2, -1, -1, -1), atol=1e-5)
    assert not torch.allclose(out[..., :4], pixels[..., :4].expand(2, -1, -1, -1), atol=0.1)
    assert not torch.allclose(out[0, ..., :4], out[1, ..., :4], atol=1e-3)


def images_of_all_modes() -> dict[str, Image.Image]:
    """Pictures of 8x8 in modes that a plain conversion to RGB gets wrong, by the suffix to save them with."""
    ramp = np.arange(0, 65536, 1024).astype(np.uint16).reshape(8, 8)
    eights = (ramp // 257).astype(np.uint8)
    transparent = Image.fromarray(np.stack([eights, eights.T, eights[::-1], eights], axis=-1))
    turned = Image.fromarray(np.stack([eights, eights // 2, eights // 3], axis=-1))
    turned.getexif()[0x0112] = 6
    return {
        "rgba.png": transparent, "la.png": transparent.convert("LA"), "p.png": transparent.quantize(16),
        "16-bit.png": Image.fromarray(ramp), "16-bit.tif": Image.fromarray(ramp), "turned.png": turned,
        "cmyk.tif": turned.convert("CMYK"), "bilevel.png": Image.fromarray(eights > 99),
    }  # fmt: skip


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", images_of_all_modes())
def test_an_image_is_decoded_as_in_training(tmp_path: Path, name: str, channels: int) -> None:
    path = tmp_path / name
    image = images_of_all_modes()[name]
    image.save(path, exif=image.getexif())
    pipe = build(in_channels=channels)
    read = np.asarray(read_image(path, channels)).reshape(8, 8, channels)
    wanted = torch.from_numpy(read.astype(np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    assert wanted.std() > 0.1
    for given in (Image.open(path), read, torch.from_numpy(read.copy()).permute(2, 0, 1), read / 255):
        torch.testing.assert_close(pipe._encode(given, (8, 8), 1), wanted, atol=1e-6, rtol=0)


def test_16_bits_and_transparency_of_arrays_are_decoded_too() -> None:
    pipe = build(in_channels=3)
    grey = np.full((8, 8), 128 * 257, np.uint16)
    half = np.zeros((2, 8, 8, 4), np.uint8)
    half[1, ..., 3] = 255
    assert pipe._encode(grey, (8, 8), 1).unique().tolist() == pytest.approx([128 / 127.5 - 1], abs=1e-6)
    on_white = pipe._encode(half, (8, 8), 2)
    assert [part.unique().tolist() for part in on_white] == [[1.0], [-1.0]]
    out = latents_of(pipe, ["Coat", "Bag"], 50, image=half, strength=0.02, guidance_scale=1.0)
    assert out[0].mean() > 0.5 > -0.5 > out[1].mean()


def test_a_transparent_color_of_16_bits_is_found_in_an_image_that_is_loaded() -> None:
    """Pillow scales the pixels to 8 bits when it loads them, but not the transparent color."""
    image = Image.new("RGB", (8, 8), (128, 128, 128))
    image.info["transparency"] = (0x8000, 0x8000, 0x8000)
    assert build(in_channels=3)._encode(image, (8, 8), 1).unique().tolist() == [1.0]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (
            Image.new("F", (8, 8)),
            "image cannot be decoded .*32-bit pixels .mode F. of unknown range, and not 8 or 16 bits",
        ),
        ("a.png", "image holds a str: give PIL images"),
        ([], "image is an empty list"),
        (np.full((8, 8, 3), 200.0), "image has values outside of 0 to 1"),
        (np.full((8, 8, 3), np.nan), "image has values outside of 0 to 1"),
        (torch.zeros(4, 8, 8), "image has 4 channels: give 3"),
        (np.zeros((8, 8, 3), np.int64), "image is a int64 array"),
        (np.zeros((0, 8), np.uint8), r"image is a uint8 array of shape \(0, 8\)"),
        ([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8, 3))], "image mixes"),
    ],
)
def test_images_that_cannot_be_decoded_are_one_line(image: Any, message: str) -> None:
    with pytest.raises(LamambaError, match=message):
        build(in_channels=3)("Coat", 4, image=image)


def test_masks_of_any_kind_are_white_where_they_say_so() -> None:
    pipe, half = build(), np.repeat([[True] * 4 + [False] * 4], 8, axis=0)
    strokes = np.zeros((8, 8, 4), np.uint8)
    strokes[half] = 255
    deep = np.where(half, 65535, 900).astype(np.uint16)  # 900 of 65535 is dark
    masks = [half, half * 1.0, half.astype(np.uint8), torch.from_numpy(half), deep * half, Image.fromarray(deep)]
    clear_white = Image.new("LA", (8, 8), (255, 0))
    clear_white.paste((255, 255), (0, 0, 4, 8))
    for mask in [*masks, Image.fromarray(half), Image.fromarray(strokes), clear_white]:
        assert torch.equal(pipe._encode_mask(mask, (8, 8), 1)[0, 0], torch.from_numpy(half).float())


def test_latents_are_decoded_and_images_encoded(tmp_path: Path) -> None:
    vae = diffusers.AutoencoderKL.from_pretrained(write_autoencoder(tmp_path), low_cpu_mem_usage=False)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    pipe = build(vae=vae, in_channels=vae.config.latent_channels)
    side = 8 * factor
    images = pipe("Coat", 2, generator=torch.Generator().manual_seed(0)).images
    assert (images[0].mode, images[0].size) == ("RGB", (side, side))
    start = Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))
    kept = pipe("Coat", 50, 1.0, image=start, strength=0.02, output_type="latent").images
    wanted = vae.encode(torch.from_numpy(np.array(start)).permute(2, 0, 1)[None] / 127.5 - 1).latent_dist.mode()
    wanted = (wanted - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
    assert (kept - wanted).norm() < 0.4 * wanted.norm()
    pipe.save_pretrained(tmp_path / "pipe")
    again = LaMambaDiffPipeline.from_pretrained(tmp_path / "pipe", local_files_only=True)
    assert again.vae.config.scaling_factor == vae.config.scaling_factor
