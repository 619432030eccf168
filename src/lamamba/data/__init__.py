"""Images with labels, in an order that is a pure function of (seed, position), so that training resumes to the image.

    open_source(...) -> Source -> batches(...) -> uint8 (b, c, h, w), labels (b,) -> to_float -> [-1, 1]

A source is the built-in set, Fashion-MNIST, a folder of images (flat, or with one subfolder per class), a Hugging Face
dataset, or a folder of latents that `lamamba encode` wrote.
"""

from lamamba.data.decoding import IMAGE_SUFFIXES, crop_centre, read_image, to_float, to_uint8
from lamamba.data.fashion_mnist import FASHION_MNIST_CLASSES, FASHION_MNIST_FOLDER, load_builtin, load_fashion_mnist
from lamamba.data.hugging_face import DatasetSource
from lamamba.data.latent_files import LatentSource
from lamamba.data.opening import NAMED_SOURCES, open_source
from lamamba.data.order import batches, flip_choices, permutation, reading_order
from lamamba.data.sources import ArraySource, FolderSource, ImageSource, Source
