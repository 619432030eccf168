"""What visitors upload: kept in memory within limits, and decoded only as far as a drawing needs it."""

import hashlib
import io
import math
import threading
import time
from collections.abc import Sequence

from PIL import Image

from lamamba.data.decoding import convert_image, find_alpha
from lamamba.errors import ConfigError

MAX_FILE_BYTES = 20 << 20
MAX_BYTES = 128 << 20
"""Of all uploads together."""
MAX_FILES = 256
MAX_AGE_S = 600.0
MAX_LAYERS = 1
"""The page's canvas has one layer to draw on."""
MAX_PIXELS = 1 << 25
"""Of an image and its drawing together: 4096 x 4096 each."""
FOLDER = "/dev/null/uploads"
"""Prefix of the names of uploads. Gradio takes them for paths; nothing can exist there."""


class Uploads:
    """Files by name, in memory; the oldest go first, when there are too many or too many bytes, or after MAX_AGE_S."""

    def __init__(self) -> None:
        self._files: dict[str, tuple[float, bytes]] = {}  # oldest first
        self._lock = threading.Lock()

    def add(self, content: bytes) -> str:
        """Keep a file and return its name, which only its content decides: the page sends the same images often."""
        name = f"{FOLDER}/{hashlib.sha256(content).hexdigest()}"
        with self._lock:
            self._files.pop(name, None)
            self._files[name] = (time.monotonic(), content)
        self.drop_old()
        return name

    def drop_old(self) -> None:
        """Drop what is too old or too much."""
        expired = time.monotonic() - MAX_AGE_S
        with self._lock:
            num_bytes = sum(len(content) for _, content in self._files.values())
            for name, (added, content) in list(self._files.items()):
                if added > expired and len(self._files) <= MAX_FILES and num_bytes <= MAX_BYTES:
                    return
                num_bytes -= len(content)
                del self._files[name]

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, name: str) -> bytes:
        """Find a file; raises ConfigError where none has that name, whatever is on the disk."""
        self.drop_old()
        with self._lock:
            if name not in self._files:
                raise ConfigError("the image is not there, or no longer: upload it again")
            return self._files[name][1]


def read_drawing(background: bytes, layers: Sequence[bytes]) -> tuple[Image.Image, Image.Image]:
    """Decode what a canvas holds: the image, and the mask, white where something is drawn over it.

    The sizes of all files are checked before any is decoded. Only PNG is read, which is what a canvas gives: other
    formats that Pillow knows allocate memory before their size can be checked.

    Returns:
        The image (RGB), and the mask (L) of its size.

    Raises:
        ConfigError: a file is no PNG image or damaged, or layers or pixels are too many.
    """
    if len(layers) > MAX_LAYERS:
        raise ConfigError(f"the drawing has {len(layers)} layers, and the canvas has {MAX_LAYERS}: draw on that one")
    files = [background, *layers]
    try:
        num_pixels = sum(math.prod(Image.open(io.BytesIO(file), formats=("PNG",)).size) for file in files)
        if num_pixels > MAX_PIXELS:
            raise Image.DecompressionBombError
        with Image.open(io.BytesIO(background), formats=("PNG",)) as opened:
            image = convert_image(opened, 3)
        mask = Image.new("L", image.size)
        for layer in layers:
            with Image.open(io.BytesIO(layer), formats=("PNG",)) as opened:
                alpha = find_alpha(opened)
            alpha = alpha.resize(image.size, Image.Resampling.BOX)
            mask.paste(255, mask=alpha.point(lambda level: 255 * (level > 0)))
    except Image.DecompressionBombError:  # which Pillow raises too, of much larger images
        raise ConfigError(
            f"the image and the drawing on it have more than {MAX_PIXELS:,} pixels together: upload a smaller image"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly everything on damaged files, even SyntaxError
        raise ConfigError("the file is no PNG image, or damaged: upload another") from error
    return image, mask
