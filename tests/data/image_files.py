"""Images of one color, alone and as two classes."""

from PIL import Image


def save_image(path, colour=(10, 20, 30), size=(8, 8), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def make_class_folder(root, per_class=3):
    """Two classes whose image k has the colour (100 * label + k) in every channel."""
    for label, name in enumerate(("ant", "bee")):
        for k in range(per_class):
            save_image(root / name / f"{k:02d}.png", (100 * label + k,) * 3)
    return root
