"""What makes images ready to be trained on: `lamamba prepare` and `lamamba encode`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lamamba.config.checks import MAX_SIDE, check_range


@dataclass(frozen=True)
class PrepareImagenetConfig:
    """Extract the official ImageNet files to folders that can be trained on; run again, it goes on."""

    out: Path
    """Folder for train/ and validation/, with a folder for each class."""
    train: Path | None = None
    """ILSVRC2012_img_train.tar."""
    validation: Path | None = None
    """ILSVRC2012_img_val.tar."""
    devkit: Path | None = None
    """ILSVRC2012_devkit_t12.tar.gz, which knows the classes of the validation images."""


@dataclass(frozen=True)
class PrepareDatasetConfig:
    """Write a Hugging Face dataset's images to folders that can be trained on; run again, it goes on."""

    dataset: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME|FOLDER")]
    """A dataset of the hub, or a folder that datasets opens: parquet files, what save_to_disk wrote. A folder of images
    needs no preparing."""
    out: Path
    """Folder for the split, such as train/, with a folder for each class; without classes, images."""
    split: str = "train"
    """The split."""
    subset: str | None = None
    """The subset (configuration), of a dataset that has several."""
    image_column: str | None = None
    """Column with the images; the default is the only one of the type Image."""
    label_column: str | None = "auto"
    """Column with the classes: ClassLabel, strings or integers. auto is the only ClassLabel, if there is any, None is
    no classes."""
    number_classes: bool = False
    """Begin the names of class folders with the dataset's numbers, as 007_cat, which keeps their order."""
    skip_bad_images: bool = False
    """Leave out images that cannot be read, instead of failing once all others are written."""


@dataclass(frozen=True)
class PrepareEmojiConfig:
    """Write the Noto emoji, 64 x 64 pixels on white, to folders that can be trained on; run again, it goes on."""

    out: Path
    """Folder for the categories, a folder each."""
    source: Path | None = None
    """The tarball of the npm package emoji-datasource-google, or the folder it unpacks to; the default is to fetch it,
    74 MB."""


@dataclass(frozen=True)
class EncodeConfig:
    """Encode images to latents once, to train on them many times."""

    data: str
    """A folder of images, one subfolder a class or flat; or builtin, fashion-mnist."""
    vae: Path
    """AutoencoderKL folder, as diffusers saves it."""
    out: Path
    """Folder for the latents: shards and an index. Run again, what is missing in it is done."""
    image_size: int | None = None
    """Crop a folder's images to this many pixels square."""
    mirrored: bool = True
    """Encode every image mirrored too, for --horizontal-flip in training, in twice as many files and as much time;
    --no-mirrored leaves that out."""
    skip_bad_images: bool = False
    """Leave images out that cannot be read, instead of stopping at the first."""
    images_per_shard: int = 2048
    """Images in a file."""
    batch_size: int = 32
    """Images encoded at once."""
    num_workers: int = 4
    """Threads that read and decode images."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes the best there is."""

    def __post_init__(self) -> None:
        check_range("images_per_shard", self.images_per_shard, 1, 1_000_000)
        check_range("batch_size", self.batch_size, 1, 100_000)
        check_range("num_workers", self.num_workers, 0, 1024)
        check_range("image_size", self.image_size, 1, MAX_SIDE)
