"""Draw the pictures of docs/sampling.md with the shipped weights.

python experiments/nano/pictures.py
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lamamba import LaMambaDiffPipeline
from lamamba.checkpoints.checkpoint import load_checkpoint
from lamamba.data.fashion_mnist import load_builtin
from lamamba.diffusion import OBJECTIVES
from lamamba.sampling import make_grid, sample

DOCS = Path(__file__).resolve().parents[2] / "docs" / "sampling"
LABELS = ["trouser", "pullover", "dress", "coat", "sandal", "sneaker", "bag", "ankle boot"]


def save(name: str, rows: list[np.ndarray]) -> None:
    """Write rows of (b, 32, 32, 1) images from 0 to 1."""
    images = (np.concatenate(rows) * 255).round().astype(np.uint8).transpose(0, 3, 1, 2)
    make_grid(images, columns=len(rows[0])).save(DOCS / f"{name}.png", optimize=True)


def seeds(number: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(number)]


def main() -> None:
    DOCS.mkdir(exist_ok=True)
    pipe = LaMambaDiffPipeline.from_checkpoint("nano")
    pipe.set_progress_bar_config(disable=True)

    def draw(labels: object = LABELS, **options: object) -> np.ndarray:
        number = len(labels) if isinstance(labels, list) else 1
        options = {"generator": seeds(number), "output_type": "np", **options}
        return pipe(labels, **options).images

    save("guidance", [draw(guidance_scale=scale) for scale in (1.0, 2.0, 4.0, 8.0)])

    numbers = [pipe.labels[name.capitalize()] for name in LABELS]
    objective = OBJECTIVES[load_checkpoint("nano").info.objective]
    rows = []
    for sampler in ("euler", "heun", "unipc"):
        for num_steps in (5, 25):
            x = sample(
                pipe.network, objective, numbers, range(len(numbers)),
                sampler=sampler, num_steps=num_steps, guidance_scale=2.0, clip_sample=True,
            )  # fmt: skip
            rows.append((x.numpy().transpose(0, 2, 3, 1) / 2 + 0.5).clip(0, 1))
    save("samplers", rows)

    ways = (("ankle boot", "bag", (1, 2)), ("trouser", "dress", (3, 4)), ("coat", "coat", (5, 6)))
    save("interpolation", [pipe.interpolate(way[:2], way[2], 8, output_type="np").images for way in ways])

    mixed = [{"pullover": 1 - part / 7, "dress": part / 7} for part in range(8)]
    save("mixing", [draw(mixed, generator=[torch.Generator().manual_seed(seed) for _ in mixed]) for seed in (0, 3)])

    source = load_builtin()
    start = Image.fromarray(source.images[np.flatnonzero(source.labels == 9)[2], 0])
    shown = (np.asarray(start, dtype=np.float64) / 255)[None, :, :, None]
    strengths = [draw("sneaker", image=start, strength=part / 10) for part in (2, 4, 5, 6, 7, 8, 9)]
    save("image_to_image", [np.concatenate([shown, *strengths])])

    mask = Image.new("L", start.size)
    mask.paste(255, (0, 0, 32, 17))
    painted = pipe(
        ["ankle boot"] * 7, image=start, mask_image=mask, strength=1.0, generator=seeds(7), output_type="np"
    ).images
    without = np.where(np.asarray(mask)[None, :, :, None], 0.5, shown)
    save("inpainting", [np.concatenate([without, painted])])


if __name__ == "__main__":
    main()
