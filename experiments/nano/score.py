"""Count how many of 1,000 samples of `nano` a small classifier assigns to the requested class.

    python experiments/nano/score.py --guidance 1 2        scores the shipped weights, writes score.json

It trains a convolutional classifier on the 60,000 Fashion-MNIST training images, tests it on the 10,000 test images,
and samples 100 images of each class at several guidance scales. This takes about a minute on an H100.
"""

import argparse
import json
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamamba import __version__, load_checkpoint, sample, to_uint8
from lamamba.data import FASHION_MNIST_CLASSES, load_fashion_mnist, to_float
from lamamba.diffusion import OBJECTIVES
from lamamba.sampling import choose_device

STEPS, PER_CLASS = 25, 100
DEVICE = choose_device("auto")
BATCH = 1000 if DEVICE.type == "cuda" else 20


def classifier() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Dropout(0.3), nn.Linear(128 * 16, 128), nn.ReLU(), nn.Linear(128, 10)),
    )


def load(split: Literal["train", "test"], folder: Path | None) -> tuple[Tensor, Tensor]:
    source = load_fashion_mnist(split, folder=folder)
    labels = torch.as_tensor(source.labels, dtype=torch.long)
    return to_float(torch.as_tensor(source.images)).to(DEVICE), labels.to(DEVICE)


def train_classifier(folder: Path | None, epochs: int = 6) -> nn.Module:
    images, labels = load("train", folder)
    model = classifier().to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    steps = epochs * (len(images) // 256)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    for epoch in range(epochs):
        for rows in torch.randperm(len(images))[: steps // epochs * 256].split(256):
            loss = F.cross_entropy(model(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"classifier epoch {epoch + 1} of {epochs}, loss {loss.item():.3f}", flush=True)
    return model.eval()


@torch.no_grad()
def classify(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(part).argmax(dim=1) for part in images.split(500)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default="nano", help="a run, a checkpoint, or the shipped weights")
    parser.add_argument("--data-folder", type=Path, help="the idx files, where Debian's package is not installed")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0, 4.0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("score.json"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = train_classifier(arguments.data_folder)
    images, labels = load("test", arguments.data_folder)
    accuracy = float((classify(model, images) == labels).float().mean())
    print(f"classifier accuracy on the 10,000 test images: {accuracy:.4f}", flush=True)

    loaded = load_checkpoint(arguments.checkpoint)
    network, objective = loaded.network.to(DEVICE), OBJECTIVES[loaded.info.objective]
    wanted = [label for label in range(10) for _ in range(PER_CLASS)]
    by_guidance = []
    for guidance in arguments.guidance:
        samples = []
        for start in range(0, len(wanted), BATCH):
            rows = range(start, start + BATCH)
            x = sample(
                network,
                objective,
                [wanted[row] for row in rows],
                list(rows),
                sampler=objective.default_sampler,
                num_steps=STEPS,
                guidance_scale=guidance,
                clip_sample=True,
            )
            samples.append(to_float(to_uint8(x)))
        agrees = classify(model, torch.cat(samples)).cpu() == torch.tensor(wanted)
        by_class = agrees.view(10, PER_CLASS).sum(dim=1).tolist()
        by_guidance.append(
            {
                "guidance": guidance,
                "assigned_to_the_requested_class": int(agrees.sum()),
                "by_class": dict(zip(FASHION_MNIST_CLASSES, by_class, strict=True)),
            }
        )
        print(json.dumps(by_guidance[-1]), flush=True)
    result = {
        "samples": len(wanted),
        "by_guidance": by_guidance,
        "classifier_test_accuracy": accuracy,
        "images_seen_in_training": loaded.info.images,
        "sampler": objective.default_sampler,
        "steps": STEPS,
        "seeds": "0 to 999, one an image",
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else DEVICE.type,
        "lamamba": __version__,
        "torch": torch.__version__,
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
