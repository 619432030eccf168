"""Images as HTML hold the very files that are saved, and nothing of a label is taken for markup."""

import io
import json
import re
import zipfile
from base64 import b64decode

import numpy as np
import pytest
from PIL import Image

from lamamba.demo.gallery import draw_images
from lamamba.sampling.generate import encode_png

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8), dtype=np.uint8)


def test_what_is_shown_is_what_is_saved() -> None:
    settings = [{"seed": 3}, {"seed": 4}]
    html = draw_images(IMAGES, ["a", "b"], settings)
    shown = [b64decode(content) for content in re.findall(r'src="data:image/png;base64,([^"]+)"', html)]
    assert shown == [encode_png(image, own) for image, own in zip(IMAGES, settings, strict=True)]
    assert re.findall(r'download="([^"]+)"', html) == ["lamamba-00.png", "lamamba-01.png", "lamamba.zip"]
    archive = re.search(r'data-content="data:application/zip;base64,([^"]+)"', html)
    assert archive is not None
    with zipfile.ZipFile(io.BytesIO(b64decode(archive[1]))) as files:
        assert [files.read(name) for name in files.namelist()] == shown
    with Image.open(io.BytesIO(shown[1])) as picture:
        assert json.loads(picture.info["lamamba"]) == {"seed": 4}


def test_what_is_not_finished_cannot_be_saved() -> None:
    html = draw_images(IMAGES)
    assert html.count("<img") == 2
    assert "download" not in html


@pytest.mark.parametrize(("side", "width", "small"), [(8, 192, True), (80, 160, True), (256, 256, False)])
def test_a_pixel_is_drawn_as_a_square(side: int, width: int, small: bool) -> None:
    html = draw_images(np.zeros((2, 1, side, side), dtype=np.uint8))
    assert f"width:{width}px" in html
    assert width % side == 0
    assert ('class="small"' in html) == small


def test_labels_are_text() -> None:
    html = draw_images(IMAGES[:1], ['<img src=x onerror="alert(1)">'])
    assert html.count("<img") == 1
    assert 'onerror="' not in html
