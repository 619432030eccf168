"""How many of 1,000 samples of the shipped `nano` show the class that was asked for, as a small classifier sees it.

    python experiments/nano/score.py

Trains a convolutional classifier on the 60,000 Fashion-MNIST training images (about 3 minutes on 2 CPU cores), tests it
on the 10,000 test images, samples 100 images of each class and writes classifier accuracy and agreement to score.json.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamamba import __version__, load_checkpoint, sample, to_uint8
from lamamba.data import FASHION_MNIST_CLASSES, load_fashion_mnist, to_float
from lamamba.diffusion import OBJECTIVES

SAMPLER, STEPS, GUIDANCE, PER_CLASS, BATCH = "dpm++", 25, 2.0, 100, 20


def classifier() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Dropout(0.3), nn.Linear(128 * 16, 128), nn.ReLU(), nn.Linear(128, 10)),
    )


def load(split: str) -> tuple[Tensor, Tensor]:
    source = load_fashion_mnist(split)  # type: ignore[arg-type]
    return to_float(torch.as_tensor(source.images)), torch.as_tensor(source.labels, dtype=torch.long)


def train_classifier(epochs: int = 6) -> nn.Module:
    images, labels = load("train")
    model = classifier()
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
    torch.manual_seed(0)
    model = train_classifier()
    images, labels = load("test")
    accuracy = float((classify(model, images) == labels).float().mean())
    print(f"classifier accuracy on the 10,000 test images: {accuracy:.4f}", flush=True)

    loaded = load_checkpoint("nano")
    wanted = [label for label in range(10) for _ in range(PER_CLASS)]
    samples = []
    for start in range(0, len(wanted), BATCH):
        rows = range(start, start + BATCH)
        x = sample(
            loaded.network,
            OBJECTIVES[loaded.info.objective],
            [wanted[row] for row in rows],
            list(rows),
            sampler=SAMPLER,
            num_steps=STEPS,
            guidance_scale=GUIDANCE,
        )
        samples.append(to_float(to_uint8(x)))
        print(f"{start + BATCH} of {len(wanted)} samples", flush=True)
    agrees = classify(model, torch.cat(samples)) == torch.tensor(wanted)
    result = {
        "samples": len(wanted),
        "assigned_to_the_requested_class": int(agrees.sum()),
        "by_class": dict(zip(FASHION_MNIST_CLASSES, agrees.view(10, PER_CLASS).sum(dim=1).tolist(), strict=True)),
        "classifier_test_accuracy": accuracy,
        "images_seen_in_training": loaded.info.images,
        "sampler": SAMPLER,
        "steps": STEPS,
        "guidance": GUIDANCE,
        "seeds": "0 to 999, one an image",
        "lamamba": __version__,
        "torch": torch.__version__,
    }
    Path(__file__).with_name("score.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
