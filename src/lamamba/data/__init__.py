"""Images with labels, in an order that is a pure function of (seed, position), so that training resumes to the image.

    open_source(...) -> Source -> batches(...) -> uint8 (b, c, h, w), labels (b,) -> to_float -> [-1, 1]

A source is the built-in set, Fashion-MNIST, a folder of images (flat, or with one subfolder per class), a Hugging Face
dataset, or a folder of latents that `lamamba encode` wrote.

    opening.py        a name or a path -> a source
    fashion_mnist.py  the shipped images, the idx files, the hub
    sources.py        what a source is; images in memory, files in a folder
    folders.py        finds the images in a folder, each real folder once
    latent_files.py   latents that were encoded before
    hugging_face.py   Hugging Face datasets
    imagenet.py       the official ImageNet files -> folders
    emoji.py          the Noto emoji -> folders
    preparing.py      folders that are complete once they have their name
    decoding.py       a file -> pixels of one size; uint8 <-> float
    order.py          which image is read when; batches
"""

from lamamba.data.decoding import IMAGE_SUFFIXES, crop_centre, read_image, to_float, to_uint8
from lamamba.data.fashion_mnist import FASHION_MNIST_CLASSES, FASHION_MNIST_FOLDER, load_builtin, load_fashion_mnist
from lamamba.data.hugging_face import DatasetSource
from lamamba.data.latent_files import LatentSource
from lamamba.data.opening import NAMED_SOURCES, open_source
from lamamba.data.order import batches, flip_choices, permutation, reading_order
from lamamba.data.sources import ArraySource, FolderSource, ImageSource, Source

__all__ = [
    "FASHION_MNIST_CLASSES",
    "FASHION_MNIST_FOLDER",
    "IMAGE_SUFFIXES",
    "NAMED_SOURCES",
    "ArraySource",
    "DatasetSource",
    "FolderSource",
    "ImageSource",
    "LatentSource",
    "Source",
    "batches",
    "crop_centre",
    "flip_choices",
    "load_builtin",
    "load_fashion_mnist",
    "open_source",
    "permutation",
    "read_image",
    "reading_order",
    "to_float",
    "to_uint8",
]
