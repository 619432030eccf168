"""The site builds with every link whole, asks no other host for anything, and shows what the package computes.

`python -m pytest -n 0 tests/test_docs.py -k browser --screenshots docs/browser` takes the picture of the browser page.
"""

import ast
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from graphlib import TopologicalSorter
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_dpmsolver_multistep
from PIL import Image
from torch import Tensor

import lamamba
from lamamba.checkpoints.checkpoint import load_checkpoint
from lamamba.commands.onnx_graph import build

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / "make" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build it, anchors and links checked: any warning ends the build."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


class Fetched(HTMLParser):
    """Collects what a browser fetches of a page without being asked."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.targets.append(given.get("src") or given.get("srcset") or "")
        if tag == "link" and given.get("rel") not in ("canonical", "next", "prev"):
            self.targets.append(given.get("href") or "")


def test_a_page_fetches_nothing_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        fetched = Fetched()
        fetched.feed(page.read_text())
        assert any(target.endswith(".css") for target in fetched.targets)
        assert not [target for target in fetched.targets if re.match(r"(https?:)?//", target)], page
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)[\"' ]*(https?:)?//", style.read_text()), style


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, with WebGPU in software. It reaches only 127.0.0.1."""
    selenium = pytest.importorskip("selenium", reason="needs Selenium: pip install 'lamamba[dev]'")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("needs Chromium: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars", "--window-size=1250,950",
        "--proxy-server=127.0.0.1:9",  # no proxy answers there; 127.0.0.1 itself needs none
        "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan",
    ):  # fmt: skip
        options.add_argument(flag)
    try:
        browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    except selenium.common.exceptions.WebDriverException as error:
        pytest.skip(f"Chromium does not start: {error}")
    yield browser
    browser.quit()


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder; yield its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def sample_in(
    browser: Any, address: str, network: str, steps: int, device: str
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Sample class 8 on the page with seed 7 and guidance 2.5; return the request, all noise and the image."""
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(f"{address}/browser.html")
    waiting = WebDriverWait(browser, 120, 0.1)
    ready = "return document.querySelector('#sampler.ready') !== null && sampler.network === arguments[0]"
    if network != "nano-4-steps":  # the page begins with it
        choose = """const chosen = document.querySelector("#sampler [name=network]");
            chosen.value = arguments[0];
            chosen.dispatchEvent(new Event("change"));"""
        browser.execute_script(choose, network)
    waiting.until(lambda _: browser.execute_script(ready, network))
    if device == "webgpu" and not browser.execute_script("return sampler.hasGpu"):
        pytest.skip("this Chromium has no WebGPU")
    set_up = """const form = document.querySelector("#sampler");
        for (const [name, value] of Object.entries(arguments[0])) {
            const input = form.querySelector(`[name=${name}]`);
            input.value = value;
            input.dispatchEvent(new Event("input"));
        }
        form.querySelector("[name=label][value='8']").click();"""
    browser.execute_script(set_up, {"steps": steps, "seed": 7, "guidance": 2.5, "device": device})
    done = "return !sampler.busy && sampler.request.label === 8 && sampler.step === arguments[0]"
    waiting.until(lambda _: browser.execute_script(done, steps))
    asked, noise, image = browser.execute_script(
        "return [sampler.request, Array.from(sampler.noise), Array.from(sampler.image)]"
    )
    side = math.isqrt(len(image))
    return asked, torch.tensor(noise).view(-1, 1, 1, side, side), torch.tensor(image).view(side, side)


def sample_here(network: lamamba.LaMambaDiff, noise: Tensor, steps: int) -> Tensor:
    """Sample as the page does: a student if there is noise for every step."""
    options = {"num_steps": steps, "clip_sample": True, "noise": noise[0]}
    if len(noise) == 1:
        return lamamba.sample(network, lamamba.FlowMatching(), [8], [0], **options, guidance_scale=2.5)[0, 0]
    drawn = iter([*noise[1:], torch.zeros_like(noise[0])])  # the last step adds none
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduling_dpmsolver_multistep, "randn_tensor", lambda *_, **__: next(drawn))
        image = lamamba.sample(network, lamamba.FlowMatching(), [8], [0], **options, sampler="ancestral")[0, 0]
    assert next(drawn, None) is None
    return image


@pytest.mark.parametrize("name", ["nano", "nano-4-steps"])
def test_the_browser_samples_what_pytorch_does(
    site: Path, browser: Any, name: str, request: pytest.FixtureRequest
) -> None:
    pictures = request.config.getoption("--screenshots") if name == "nano-4-steps" else None
    with served(site) as address:
        asked, noise, image = sample_in(browser, address, name, 4, "wasm")
    canvas = """const context = document.querySelector(".picture canvas").getContext("2d");
        return Array.from(context.getImageData(0, 0, 32, 32).data);"""
    shown = torch.tensor(browser.execute_script(canvas)).view(32, 32, 4)
    if pictures:
        browser.find_element("id", "sampler").screenshot(str(Path(pictures) / "page.png"))
    assert (asked["label"], asked["seed"], asked["guidance"], asked["device"]) == (8, 7, 2.5, "wasm")
    assert len(noise) == (1 if name == "nano" else 4)
    assert abs(float(noise.mean())) < 0.2
    assert 0.9 < float(noise.std()) < 1.1
    wanted = sample_here(load_checkpoint(name).network, noise, 4)
    torch.testing.assert_close(image, wanted, atol=2e-3, rtol=0)
    assert (shown[:, :, 0] - (wanted + 1) * 127.5).abs().max() < 1


def test_web_gpu_samples_what_pytorch_does(site: Path, browser: Any, tmp_path: Path) -> None:
    """Chromium computes WebGPU on the CPU here, which is slow: the network is tiny, but has all of its operations."""
    browser.get("about:blank")
    torch.manual_seed(0)
    options = {"in_channels": 1, "sample_size": 16, "num_classes": 10, "embed_dim": 16, "num_heads": 2}
    network = lamamba.LaMambaDiff(**options, depths=(1, 1, 1, 1), bottleneck_depth=0, decoder_extra_depth=0).eval()
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    model = build(network, (16, 16), guided=True, stored="float32", computed="float32", metadata={})
    (tmp_path / "browser").mkdir()
    shutil.copy(site / "browser.html", tmp_path)
    for path in (site / "browser").iterdir():
        (tmp_path / "browser" / path.name).symlink_to(path)
    properties = json.loads((site / "browser" / "nano.json").read_text()) | {"size": [16, 16]}
    for name, content in {"nano.json": json.dumps(properties).encode(), "nano.onnx": model.SerializeToString()}.items():
        (tmp_path / "browser" / name).unlink()
        (tmp_path / "browser" / name).write_bytes(content)
    with served(tmp_path) as address:
        asked, noise, image = sample_in(browser, address, "nano", 3, "webgpu")
    assert asked["device"] == "webgpu"
    torch.testing.assert_close(image, sample_here(network, noise, 3), atol=2e-3, rtol=0)


def test_links_that_leave_the_site_are_listed(site: Path) -> None:
    listed = (site / "external_links.txt").read_text().split()
    assert "https://arxiv.org/abs/2408.02615" in listed
    assert all(link.startswith(("http://", "https://")) for link in listed)


def test_pages_from_elsewhere_link_within_the_site(site: Path) -> None:
    start = (site / "index.html").read_text()
    assert 'href="training.html"' in start
    assert 'href="changes.html"' in start
    assert (site / "nano.png").read_bytes() == (DOCS / "nano.png").read_bytes()
    model = "src/lamamba/model.py"
    assert f'href="source/{model}"' in (site / "network.html").read_text()
    assert (site / "source" / model).read_text() == (ROOT / model).read_text()


def test_docstrings_are_shown(site: Path) -> None:
    page = (site / "api.html").read_text()
    for name in ("lamamba.sample", "lamamba.LaMambaDiffPipeline.interpolate", "lamamba.Diffusion.losses"):
        assert f'id="{name}"' in page
    assert "what it raises ends the sampling" in page


def test_the_map_of_the_code_names_every_module() -> None:
    page = (DOCS / "code.md").read_text()
    tree, modules = page.split("The modules of the folders:")
    package = ROOT / "src" / "lamamba"
    entries = {f"{path.name}{'/' * path.is_dir()}" for path in package.iterdir() if path.name != "__pycache__"}
    assert set(re.findall(r"^      ([a-z_.]+/?) ", tree, re.MULTILINE)) == entries
    assert len(entries) <= 20
    for folder, listed in re.findall(r"^    ([a-z]+)/\n((?:      .*\n)+)", modules, re.MULTILINE):
        named = set(re.findall(r"^      ([a-z_]+\.py|__init__\.py|[a-z_]+/) ", listed, re.MULTILINE))
        assert {path.name for path in (package / folder).glob("[a-z]*.py")} == {
            name for name in named if name.endswith(".py") and name != "__init__.py"
        }


def test_files_are_short_and_import_in_one_direction() -> None:
    package = ROOT / "src" / "lamamba"
    imports: dict[str, set[str]] = {}
    for path in package.rglob("*.py"):
        text = path.read_text()
        assert text.count("\n") < 500, path
        name = ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")
        # Imports at the top of the file: what functions and `if TYPE_CHECKING` import is read later or never.
        tops = [node for node in ast.parse(text).body if isinstance(node, ast.ImportFrom) and node.module]
        imports[name] = {
            target
            for node in tops
            for target in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
            if target.startswith("lamamba.")
        }
    graph = {name: targets & imports.keys() - {name} for name, targets in imports.items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError with the circle


def test_a_link_that_is_broken_is_left_to_mkdocs() -> None:
    pages = load("pages")
    known = {"docs/a.md": "a.md", "README.md": "index.md"}
    text = "[a](../README.md#b) [c](nowhere.md) [d](../LICENSE) [e](https://f.org) [g](#h)"
    followed, copied = pages.follow_links(text, "docs/a.md", known)
    assert followed == "[a](index.md#b) [c](nowhere.md) [d](source/LICENSE) [e](https://f.org) [g](#h)"
    assert copied == {"LICENSE"}


def test_figures_are_those_that_the_code_draws() -> None:
    for name, svg in load("draw").figures().items():
        assert (DOCS / name).read_text() == svg, f"{name}: run make figures"


@pytest.mark.slow
def test_tables_are_those_that_the_code_counts() -> None:
    draw = load("draw")
    for name, lay_out in draw.TABLES.items():
        assert (DOCS / f"{name}.md").read_text() == draw.filled(name, lay_out), f"{name}.md: run make figures"


def test_fields_are_those_of_the_shipped_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = load("draw")
    monkeypatch.setattr(draw, "DOCS", tmp_path)
    (tmp_path / draw.FIELD).parent.mkdir()
    draw.draw_fields()
    drawn, shown = (
        np.asarray(Image.open(folder / draw.FIELD).convert("RGB"), dtype=float) for folder in (tmp_path, DOCS)
    )
    assert drawn.shape == shown.shape
    assert np.abs(drawn - shown).mean() < 1, "run make figures"  # of levels; processors differ in rounding
