"""Keeps uploaded files in memory, within limits, and decodes drawings."""

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
"""Limit of all uploads together."""
MAX_FILES = 256
MAX_AGE_S = 600.0
MAX_LAYERS = 1
"""The page's canvas has one layer to draw on."""
MAX_PIXELS = 1 << 25
"""Limit of an image and its drawing together: 4096 x 4096 each."""
FOLDER = "/dev/null/uploads"
"""Prefix of the names of uploads. Gradio treats them as paths, and no file can exist there."""


class Uploads:
    """Files in memory, by name. The oldest are dropped beyond MAX_FILES or MAX_BYTES, and all after MAX_AGE_S."""

    def __init__(self) -> None:
        self._files: dict[str, tuple[float, bytes]] = {}  # oldest first
        self._lock = threading.Lock()

    def add(self, content: bytes) -> str:
        """Keep a file and return its name, a hash of its content, since the page often sends the same image again."""
        name = f"{FOLDER}/{hashlib.sha256(content).hexdigest()}"
        with self._lock:
            self._files.pop(name, None)
            self._files[name] = (time.monotonic(), content)
        self.drop_old()
        return name

    def drop_old(self) -> None:
        """Drop files that are too old, and the oldest beyond the limits."""
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
        """Return a file; raises ConfigError if none was uploaded by that name. The disk is never read."""
        self.drop_old()
        with self._lock:
            if name not in self._files:
                raise ConfigError("the image is not there, or no longer: upload it again")
            return self._files[name][1]


def read_drawing(background: bytes, layers: Sequence[bytes]) -> tuple[Image.Image, Image.Image]:
    """Decode the content of a canvas: the image, and a mask that is white where something is drawn over it.

    The sizes of all files are checked before any is decoded. Only PNG is read, the format of a canvas; with some other
    formats, Pillow allocates memory before their size can be checked.

    Returns:
        The image (RGB), and the mask (L) of its size.

    Raises:
        ConfigError: a file is not a PNG image or is damaged, or there are too many layers or pixels.
    """
    if len(layers) > MAX_LAYERS:
        raise ConfigError(f"the drawing has {len(layers)} layers, and the canvas has {MAX_LAYERS}: draw on that one")
    try:
        opened, *drawn = (Image.open(io.BytesIO(file), formats=("PNG",)) for file in (background, *layers))
        if sum(math.prod(one.size) for one in (opened, *drawn)) > MAX_PIXELS:
            raise Image.DecompressionBombError
        image = convert_image(opened, 3)
        mask = Image.new("L", image.size)
        for layer in drawn:
            alpha = find_alpha(layer).resize(image.size, Image.Resampling.BOX)
            mask.paste(255, mask=alpha.point(lambda level: 255 * (level > 0)))
    except Image.DecompressionBombError:  # Pillow itself raises it for much larger images
        raise ConfigError(
            f"the image and the drawing on it have more than {MAX_PIXELS:,} pixels together: upload a smaller image"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # on damaged files, Pillow's decoders raise many kinds, even SyntaxError
        raise ConfigError("the file is no PNG image, or damaged: upload another") from error
    return image, mask
