"""Pack the EMA weights of a trained piece for transport: float16, in parts of at most 15 MiB.

python experiments/comparison/weights.py pack runs/comparison/s-seed-0 $OUT/s-seed-0       where it was trained
python experiments/comparison/weights.py unpack s-seed-0 runs/comparison/s-seed-0          for run.py's studies
python experiments/comparison/weights.py release runs/comparison/emoji-64 emoji-64       for lamamba sample
"""

import argparse
import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from contestants import LAMAMBA
from lamamba.checkpoints.checkpoint import CheckpointInfo, write_weights
from lamamba.config import NetworkConfig
from lamamba.data import FASHION_MNIST_CLASSES
from lamamba.files import atomic_write
from lamamba.model import LaMambaDiff
from training import CHECKPOINT, read_average

MOST_BYTES = 15 << 20


def pack(run: Path, out: Path, most_bytes: int = MOST_BYTES) -> list[Path]:
    """Write the EMA weights in parts, and the record beside them."""
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in read_average(run / CHECKPOINT).items():
        small = tensor.half().contiguous()
        if parts[-1] and size + small.nbytes > most_bytes:
            parts.append({})
            size = 0
        parts[-1][f"ema.{name}"] = small
        size += small.nbytes
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"part-{index:02d}-of-{len(parts):02d}.safetensors" for index in range(1, len(parts) + 1)]
    for path, part in zip(paths, parts, strict=True):
        save_file(part, path)
    shutil.copy(run / "record.json", out / "record.json")
    return paths


def unpack(folder: Path, run: Path) -> Path:
    """Join the parts into a file for studies. Training cannot continue from it."""
    paths = sorted(folder.glob("part-*.safetensors"))
    number = int(paths[0].stem.rsplit("-", 1)[1]) if paths else 1
    if len(paths) != number:
        raise SystemExit(f"{folder} has {len(paths)} of {number} parts: fetch all that weights.py pack wrote")
    weights = {name: tensor for path in paths for name, tensor in load_file(path).items()}
    run.mkdir(parents=True, exist_ok=True)
    with atomic_write(run / CHECKPOINT) as temporary:
        save_file(weights, temporary)
    shutil.copy(folder / "record.json", run / "record.json")
    return run / CHECKPOINT


def release(run: Path, folder: Path, class_names: tuple[str, ...] = FASHION_MNIST_CLASSES) -> None:
    """Write a folder for `lamamba sample` and `lamamba finetune`, in float16."""
    settings = json.loads((run / "record.json").read_text())["settings"]
    if settings["network"] not in LAMAMBA:
        raise SystemExit(f"{run} is a {settings['network']}: only networks of this package are released")
    config = settings["train"]["network"]
    network = LaMambaDiff(**vars(NetworkConfig(**{**config, "depths": tuple(config["depths"])})))
    weights = {name: tensor.float() for name, tensor in read_average(run / CHECKPOINT).items()}
    network.load_state_dict(weights)
    images, batch = settings["train"]["num_images"], settings["train"]["batch_size"]
    write_weights(
        folder, network.half(), CheckpointInfo(images, -(-images // batch), settings["objective"], class_names)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pack", "unpack", "release"))
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--emoji", type=Path, help="of a network of emoji: the folder whose subfolders are the classes")
    arguments = parser.parse_args()
    if arguments.what == "release":
        names = FASHION_MNIST_CLASSES
        if arguments.emoji:
            names = tuple(sorted(path.name for path in arguments.emoji.iterdir() if path.name[0] != "."))
        release(arguments.source, arguments.out, names)
    else:
        {"pack": pack, "unpack": unpack}[arguments.what](arguments.source, arguments.out)
    print(f"written {arguments.out}")


if __name__ == "__main__":
    main()
