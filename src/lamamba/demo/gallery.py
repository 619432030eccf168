"""Shows images as HTML, in rows, with captions and links that save them. Nothing is written to the server's disk."""

import io
import zipfile
from base64 import b64encode
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from lamamba.sampling.generate import encode_png

# Browsers refuse to save long `data:` links, but save the same bytes as a blob.
SAVE_LINKS = """
element.addEventListener("click", async (event) => {
    const link = event.target.closest("a[download]");
    if (!link || link.href.startsWith("blob:")) return;
    event.preventDefault();
    const source = link.dataset.content || link.closest("figure").querySelector("img").src;
    const saved = document.createElement("a");
    saved.href = URL.createObjectURL(await (await fetch(source)).blob());
    saved.download = link.download;
    saved.click();
    setTimeout(() => URL.revokeObjectURL(saved.href), 60000);
});
"""
STYLE = """
.pictures { display: flex; flex-wrap: wrap; gap: 16px; }
.pictures figure { margin: 0; }
.pictures img { display: block; width: 100%; border-radius: 6px; }
.pictures img.small { image-rendering: pixelated; }
.pictures figcaption { font-size: 13px; padding-top: 4px; display: flex; justify-content: space-between; gap: 8px; }
.save-all { margin: 14px 0 0; font-size: 13px; }
.pictures a, .save-all a { cursor: pointer; text-decoration: underline; }
"""


def draw_images(
    images: np.ndarray, captions: Sequence[str] = (), settings: Sequence[dict[str, Any]] | None = None
) -> str:
    """Draw images side by side; small images are enlarged, each pixel to a square.

    Args:
        images: (b, c, h, w) uint8.
        captions: for the first of them.
        settings: what each was made by, for finished images: it is in the metadata of their PNG, which a link saves.

    Returns:
        HTML in which everything is a `data:` address; links have no target of their own, `SAVE_LINKS` acts on them.
    """
    width = images.shape[-1]
    shown = width * max(1, round((320 if len(images) == 1 else 192) / width))
    files = [encode_png(image, {} if settings is None else settings[index]) for index, image in enumerate(images)]
    names = [f"lamamba-{index:02d}.png" for index in range(len(files))]
    figures = []
    for index, (file, name) in enumerate(zip(files, names, strict=True)):
        caption = escape(captions[index]) if index < len(captions) else ""
        link = "" if settings is None else f'<a download="{name}" title="with its settings in the metadata">save</a>'
        figures.append(
            f'<figure style="width:{shown}px;max-width:100%"><img alt="{caption or "not finished"}" '
            f'class="{"small" if width < shown else ""}" src="{_address("image/png", file)}">'
            f"<figcaption><span>{caption}</span>{link}</figcaption></figure>"
        )
    html = f'<div class="pictures">{"".join(figures)}</div>'
    if settings is not None and len(files) > 1:
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as archive:
            for file, name in zip(files, names, strict=True):
                archive.writestr(name, file)
        address = _address("application/zip", content.getvalue())
        html += f'<p class="save-all"><a download="lamamba.zip" data-content="{address}">save all {len(files)}</a></p>'
    return html


def png_address(image: Image.Image) -> str:
    """Encode an image as a `data:image/png;...` URL."""
    return _address("image/png", encode_png(image, {}))


def _address(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{b64encode(content).decode()}"
