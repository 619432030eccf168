"""CIFAR-10 in two small files: a JPEG copy of it, packed for a machine that cannot read parquet.

    python experiments/comparison/cifar.py FOLDER_OF_PARQUET_FILES --out .cifar

The folder has the layout of Hugging Face datasets: `train-*.parquet` and `test-*.parquet`, with columns `image` and
`label`. The pictures are JPEG files with half the color resolution. So distances cannot be compared with papers.
"""

import argparse
import io
import lzma
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from lamamba.data import ArraySource
from lamamba.errors import ConfigError, DataError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def pack(parquet: Path, path: Path) -> None:
    """Write labels (uint8), sizes (uint16) and JPEG files of a parquet file after each other, compressed.

    The first four bytes are the number of images.
    """
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(parquet)
    files = [row["bytes"] for row in table.column("image").to_pylist()]
    labels = np.array(table.column("label").to_pylist(), np.uint8)
    sizes = np.array([len(file) for file in files], np.uint16)
    header = len(files).to_bytes(4, "little")
    path.write_bytes(lzma.compress(header + labels.tobytes() + sizes.tobytes() + b"".join(files)))


@lru_cache(maxsize=2)
def load_cifar(split: str, folder: Path | None) -> ArraySource:
    """Read a packed split, "train" or "test".

    Raises:
        ConfigError: no folder is given.
        DataError: its file is missing.
    """
    if folder is None:
        raise ConfigError("the folder of CIFAR-10 is not given: pack it with cifar.py and give --cifar")
    path = folder / f"cifar10-{split}.xz"
    if not path.is_file():
        raise DataError(f"{path} is missing: make it with cifar.py")
    content = lzma.decompress(path.read_bytes())
    number = int.from_bytes(content[:4], "little")
    labels = np.frombuffer(content, np.uint8, number, 4)
    sizes = np.frombuffer(content, np.uint16, number, 4 + number).astype(np.int64)
    ends = 4 + 3 * number + np.cumsum(sizes)
    files = (content[end - size : end] for end, size in zip(ends, sizes, strict=True))
    images = np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])
    return ArraySource(f"cifar-10 {split}", images.transpose(0, 3, 1, 2).copy(), labels, CLASSES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path(".cifar"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        (parquet,) = arguments.folder.glob(f"{split}-*.parquet")
        pack(parquet, arguments.out / f"cifar10-{split}.xz")


if __name__ == "__main__":
    main()
