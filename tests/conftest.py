"""What must be set before the tests import anything, and what several of them use."""

import os

# One thread for each test process: there are as many processes as cores, and threads that contend cost tenfold.
os.environ["OMP_NUM_THREADS"] = "1"  # for torch, imported after this, and for commands that tests start

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # the kernels run on the CPU, one operation at a time

from tiny_autoencoder import write_autoencoder


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--screenshots", metavar="FOLDER", help="write the pictures of docs/demo.md there")


@pytest.fixture(scope="session")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_autoencoder(tmp_path_factory.mktemp("autoencoder"))


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of three 16 x 16 images."""
    folder = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        path = folder / ("bird", "fish")[index % 2] / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
    return folder
