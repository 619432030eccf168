"""The site builds with every link whole, asks no other host for anything, and shows what the package computes."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

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
