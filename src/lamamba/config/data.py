"""What makes images ready to be trained on: `lamamba prepare` and `lamamba encode`."""

from dataclasses import dataclass
from pathlib import Path

from lamamba.config.checks import MAX_SIDE, check_range


@dataclass(frozen=True)
class PrepareImagenetConfig:
    """Extract the official ImageNet files to folders for training; run the command again to continue."""

    out: Path
    """Folder for train/ and validation/, each with one folder per class."""
    train: Path | None = None
    """ILSVRC2012_img_train.tar; by default no training images are extracted."""
    validation: Path | None = None
    """ILSVRC2012_img_val.tar; by default no validation images are extracted."""
    devkit: Path | None = None
    """ILSVRC2012_devkit_t12.tar.gz, with the classes of the validation images; needed only with --validation,
    by default not read."""


@dataclass(frozen=True)
class DatasetOptions:
    """Which part of a Hugging Face dataset is read."""

    split: str = "train"
    """Split of the dataset."""
    subset: str | None = None
    """Subset (configuration) of a dataset that has several; the default is the only one."""
    image_column: str | None = None
    """Column with the images, or with latents: arrays (c, h, w) as the encoder of --vae makes them, before scaling. The
    default is the only column of type Image, or else the only one with such arrays."""
    label_column: str | None = "auto"
    """Column with the classes: ClassLabel, strings or integers. auto is the only ClassLabel column, if there is one;
    None trains without classes."""


WHOLE_DATASET = DatasetOptions()


@dataclass(frozen=True)
class PrepareEmojiConfig:
    """Write the Noto emoji, 64x64 pixels on white, to folders for training; run the command again to continue."""

    out: Path
    """Folder for the images, with one folder per category."""
    source: Path | None = None
    """Tarball of the npm package emoji-datasource-google; the default downloads it (74 MB)."""


@dataclass(frozen=True)
class EncodeConfig:
    """Encode images to latents once, to train on the latents."""

    data: str
    """A folder of images, flat or with one subfolder per class; a Hugging Face dataset, as a folder of save_to_disk,
    parquet files, or its name on the hub; builtin or fashion-mnist."""
    vae: Path
    """AutoencoderKL folder, as diffusers saves it."""
    out: Path
    """Folder for the latents: shards and an index. Run the command again to write missing shards."""
    data_folder: Path | None = None
    """Folder with the files of fashion-mnist; by default Debian's package, or a download from the Hugging Face hub."""
    image_size: int | None = None
    """Crop the images of a folder to this many pixels square; the built-in images are 32 by default."""
    mirrored: bool = True
    """Also encode each image mirrored, for --horizontal-flip in training; this doubles the time and the files."""
    skip_bad_images: bool = False
    """Leave out images that cannot be read, instead of stopping at the first."""
    images_per_shard: int = 2048
    """Images in a file."""
    batch_size: int = 32
    """Images encoded at once."""
    dataset: DatasetOptions = WHOLE_DATASET
    """Options for a Hugging Face dataset."""
    num_workers: int = 4
    """Threads that read and decode images."""
    device: str = "auto"
    """cpu, cuda, cuda:1 or mps; auto uses the fastest one available."""

    def __post_init__(self) -> None:
        check_range(self, 1, 1_000_000, "images_per_shard")
        check_range(self, 1, 100_000, "batch_size")
        check_range(self, 0, 1024, "num_workers")
        check_range(self, 1, MAX_SIDE, "image_size")
