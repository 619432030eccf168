"""What must be set before the tests import anything, and what several of them use."""

import gc
import os
import sys
import time

# No test needs a network, also where there is one: whatever asks another host for something fails at once.
for scheme in ("http", "https", "all"):
    os.environ[f"{scheme}_proxy"] = os.environ[f"{scheme.upper()}_PROXY"] = "http://127.0.0.1:9"
os.environ["no_proxy"] = os.environ["NO_PROXY"] = "localhost,127.0.0.1,::1"

# One thread for each test process: there are as many processes as cores, and threads that contend cost tenfold.
os.environ["OMP_NUM_THREADS"] = "1"  # for torch, imported after this, and for commands that tests start

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # the kernels run on the CPU, one operation at a time
    if find_spec("triton"):
        import faster_interpreter  # noqa: F401

from lamamba.config import NetworkConfig
from lamamba.data import fashion_mnist
from lamamba.model import Block
from lamamba.ops.residual_norm import add_gated
from lamamba.training.log import TrainingLog
from loss_curves import draw
from tiny_autoencoder import write_autoencoder

FASHION_MNIST_FOLDER = fashion_mnist.FASHION_MNIST_FOLDER
sys.path.append(str(Path(__file__).parent.parent / "experiments" / "comparison"))  # last: its names are its own


def pytest_configure(config: pytest.Config) -> None:
    """Before several processes start, compile the loops for a CPU, or each of them would compile them all."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        block = Block(NetworkConfig(embed_dim=8, num_heads=2), 8, shifted=True, project=True)
        out, residual = block(torch.randn(1, 4, 4, 8), torch.randn(1, 32))
        out, residual = block(out, torch.randn(1, 32), residual)
        add_gated(out, residual).sum().backward()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """End with the slow tests, so that a time limit skips them first."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what would begin after TESTS_BEGIN_BEFORE, in seconds since 1970: `.ci/run` has a time limit."""
    if time.time() > float(os.environ.get("TESTS_BEGIN_BEFORE", "inf")):
        pytest.skip("the time limit of .ci/run is nearly reached")


def pytest_collection_finish() -> None:
    """Search for garbage less often, and never among the million objects that the imports made."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--screenshots", metavar="FOLDER", help="write the pictures of docs/demo.md there")


@pytest.fixture(autouse=True)
def _no_fashion_mnist(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide Fashion-MNIST, so that a test that needs it without saying so fails on every machine."""
    monkeypatch.setattr(fashion_mnist, "FASHION_MNIST_FOLDER", Path(__file__).parent / "nowhere")


@pytest.fixture
def loss_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the loss curves of runs, which other tests skip."""
    monkeypatch.setattr(TrainingLog, "_plot", draw)


@pytest.fixture
def whole_fashion_mnist(_no_fashion_mnist: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that need all 70,000 images, not only the 10,000 that are shipped."""
    if not FASHION_MNIST_FOLDER.is_dir():
        pytest.skip("needs all of Fashion-MNIST: apt-get install dataset-fashion-mnist")
    monkeypatch.setattr(fashion_mnist, "FASHION_MNIST_FOLDER", FASHION_MNIST_FOLDER)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill new memory with NaN, so that a value that is never written shows up in the results."""
    for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty_like")):
        make = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *shape, make=make, **options: make(*shape, **options).fill_(torch.nan))


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
