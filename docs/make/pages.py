"""Add pages from outside docs/ to the site, and the files that pages link to.

Documents link to each other and to code with relative paths, which work on GitHub. The site keeps these links: files
that are not pages are copied to source/. `external_links.txt` in the built site lists the links that leave it.
"""

import json
import lzma
import posixpath
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
ELSEWHERE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changes.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "src/lamamba/ops/README.md": "kernels/block.md",
    **{
        path.relative_to(ROOT).as_posix(): f"kernels/{path.parent.name}.md"
        for path in sorted(ROOT.glob("src/lamamba/ops/*/README.md"))
    },
    **{
        path.relative_to(ROOT).as_posix(): f"notebooks/{path.stem}.md"
        for path in sorted(ROOT.glob("examples/notebooks/*.ipynb"))
    },
}
NETWORKS = ("nano-4-steps", "nano")
"""Shipped weights that the page browser.md samples."""
_LINK = re.compile(r"\]\((?![a-z]+:|#)([^)\s#]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add pages from outside docs/, and adapt the links of every page to the layout of the site."""
    pages = {f"docs/{file.src_uri}": file.src_uri for file in files.documentation_pages()} | ELSEWHERE
    for path, uri in pages.items():
        text = (ROOT / path).read_text()
        if path.endswith(".ipynb"):
            text = as_markdown(text, posixpath.relpath(path, posixpath.dirname(path)))
        text, copied = follow_links(text, path, pages)
        if uri in files.src_uris:
            files.remove(files.src_uris[uri])
        files.append(File.generated(config, uri, content=text))
        for target in sorted(copied):
            if f"source/{target}" not in files.src_uris:
                files.append(File.generated(config, f"source/{target}", abs_src_path=str(ROOT / target)))
    for uri, content in browser_files().items():
        files.append(File.generated(config, uri, content=content))
    return files


def browser_files() -> dict[str, str | bytes]:
    """Make what the page browser.md loads: the runtime, unpacked, and networks as ONNX with their metadata."""
    from lamamba.checkpoints.checkpoint import load_checkpoint
    from lamamba.commands.export import describe
    from lamamba.commands.onnx_graph import build
    from lamamba.config import ExportConfig

    packed = sorted((ROOT / "docs" / "browser" / "ort").glob("*.xz"))
    files: dict[str, str | bytes] = {f"browser/ort/{path.stem}": lzma.decompress(path.read_bytes()) for path in packed}
    for name in NETWORKS:
        loaded = load_checkpoint(name)
        guided, size = loaded.info.distilled is None, (loaded.network.config.sample_size,) * 2
        config = ExportConfig(name, Path(), "onnx", guidance=guided, precision="float16-weights")
        network = build(loaded.network, size, guided=guided, stored="float16", computed="float32", metadata={})
        files[f"browser/{name}.onnx"] = network.SerializeToString()
        files[f"browser/{name}.json"] = json.dumps(describe(loaded, config, size))
    return files


def follow_links(text: str, path: str, pages: dict[str, str]) -> tuple[str, set[str]]:
    """Turn links between files of the repository into links between pages of the site.

    Args:
        text: Markdown.
        path: path of its file, from the repository's root.
        pages: files of the repository that are pages, and their places in the site.

    Returns:
        The Markdown, and the other files that it links to.
    """
    copied = set()

    def replace(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link[1]))
        if target not in pages and not (ROOT / target).is_file():
            return link[0]  # mkdocs reports what is wrong with it
        if target in pages:
            uri = pages[target]
        elif target.startswith("docs/") and not target.startswith("docs/make/"):
            uri = target.removeprefix("docs/")
        else:
            copied.add(target)
            uri = f"source/{target}"
        return f"]({posixpath.relpath(uri, posixpath.dirname(pages[path]) or '.')}"

    return _LINK.sub(replace, text), copied


def as_markdown(notebook: str, link: str) -> str:
    """Turn a notebook into a page: text, fenced code, and a link to the notebook after the title."""
    cells = json.loads(notebook)["cells"]
    parts = ["".join(cell["source"]) for cell in cells]
    shown = [
        f"```python\n{part}\n```" if cell["cell_type"] == "code" else part
        for cell, part in zip(cells, parts, strict=True)
    ]
    title, _, rest = shown[0].partition("\n")
    return "\n\n".join([title, f"*This page is [a notebook]({link}).*", rest.strip(), *shown[1:]]) + "\n"


class _Links(HTMLParser):
    """Collects the targets of a page's links."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        target = dict(attributes).get("href") or ""
        if tag == "a" and target.startswith(("http:", "https:")):
            self.targets.add(target)


def on_post_build(config: MkDocsConfig, **_: Any) -> None:
    """List the links that leave the site."""
    links = _Links()
    for page in sorted(Path(config.site_dir).rglob("*.html")):
        links.feed(page.read_text())
    lines = "".join(f"{target}\n" for target in sorted(links.targets))
    (Path(config.site_dir) / "external_links.txt").write_text(lines)
