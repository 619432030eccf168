"""Train the small feature network of `lamamba evaluate --features clothes`.

    python experiments/clothes_features/train.py          takes minutes on one CPU core

It learns the ten classes of the 60,000 Fashion-MNIST training images; the network is lamamba/evaluation/clothes.py.
It writes the weights in float16, and log.jsonl: one line per epoch, then the accuracy of the rounded weights on the
10,000 test images, and distances with their features.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from lamamba import __version__
from lamamba.data import load_fashion_mnist
from lamamba.evaluation.clothes import ClothesNetwork
from lamamba.evaluation.metrics import Gaussian, Moments, frechet_distance

HERE = Path(__file__).resolve().parent
ASSET = HERE.parents[1] / "src" / "lamamba" / "assets" / "clothes" / "features.safetensors"
EPOCHS, BATCH, LEARNING_RATE, SEED = 16, 128, 4e-3, 0


def load(split: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
    source = load_fashion_mnist(split)
    return torch.as_tensor(source.images), torch.as_tensor(source.labels)


def shift_and_mirror(images: Tensor) -> Tensor:
    """Shift a batch by up to two pixels in each direction, which the black border allows, and mirror half of it."""
    rows, columns = torch.randint(-2, 3, (2,)).tolist()
    moved = images.roll((rows, columns), dims=(2, 3))
    mirrored = torch.rand(len(images)) < 0.5
    return torch.where(mirrored[:, None, None, None], moved.flip(3), moved)


def train(images: Tensor, labels: Tensor, log: list[dict[str, Any]]) -> ClothesNetwork:
    network = ClothesNetwork().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=1e-2)
    steps = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=EPOCHS * steps)
    start = time.monotonic()
    for epoch in range(EPOCHS):
        total = 0.0
        for rows in torch.randperm(len(images))[: steps * BATCH].split(BATCH):
            _, logits = network(shift_and_mirror(images[rows]))
            loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        record(log, epoch=epoch + 1, loss=round(total / steps, 4), seconds=round(time.monotonic() - start))
    return network.eval()


@torch.no_grad()
def evaluate(network: ClothesNetwork, images: Tensor) -> tuple[Gaussian, Tensor]:
    """Return the statistics of the features, and the predicted classes."""
    moments, classes = Moments(), []
    for part in images.split(500):
        features, logits = network(part)
        moments.add(features)
        classes.append(logits.argmax(dim=1))
    return moments.gaussian(), torch.cat(classes)


def record(log: list[dict[str, Any]], **entry: Any) -> None:
    log.append(entry)
    print(json.dumps(entry), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ASSET, help="the weights")
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # such small layers gain nothing from more
    log: list[dict[str, Any]] = []
    options = {"epochs": EPOCHS, "batch": BATCH, "learning_rate": LEARNING_RATE, "seed": SEED}
    record(log, **options, lamamba=__version__, torch=torch.__version__)
    network = train(*load("train"), log)
    weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    small = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    save_file(small, arguments.out)

    network.load_state_dict(load_file(arguments.out))  # to float32 again
    images, labels = load("test")
    real, _ = evaluate(network, load("train")[0])
    test, seen = evaluate(network, images)
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    accuracy = float((seen == labels).float().mean())
    record(log, test_accuracy=round(accuracy, 4), parameters=num_parameters, bytes=arguments.out.stat().st_size)
    generator = torch.Generator().manual_seed(SEED)
    noise = torch.randn(images.shape, generator=generator)
    cases = {
        "test images": test,
        **{
            f"test images with noise of {n}": evaluate(network, (images + n * noise).clamp(0, 255))[0]
            for n in (8, 16, 32)
        },
        **{f"test images of {n} classes": evaluate(network, images[labels < n])[0] for n in (9, 7, 4)},
    }
    for name, gaussian in cases.items():
        record(log, distance_to_training_images=round(frechet_distance(gaussian, real), 3), of=name)
    (HERE / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))


if __name__ == "__main__":
    main()
