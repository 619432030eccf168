"""A tiny autoencoder that halves images, and options of a tiny run on its latents."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL

from small_network import TINY_NETWORK

CPU = torch.device("cpu")
TINY = [
    *TINY_NETWORK,
    *("--batch-size", "2", "--num-images", "4", "--device", "cpu", "--sample-steps", "1", "--sample-every", "4"),
]


def write_autoencoder(folder: Path, scaling_factor: float = 0.5, shift_factor: float | None = 0.3) -> Path:
    """Save a tiny autoencoder that halves images, the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        autoencoder = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(4, 4), layers_per_block=1, norm_num_groups=2, latent_channels=2, sample_size=16,
            scaling_factor=scaling_factor, shift_factor=shift_factor,
        )  # fmt: skip
    autoencoder.save_pretrained(folder)
    return folder
