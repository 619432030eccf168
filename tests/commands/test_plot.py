"""Pictures of runs and of images."""

import json
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lamamba.cli import main
from lamamba.commands.plot import add_caption, choose_evenly, draw_curves, name_runs, read_frames
from lamamba.training.log import save_figure
from refusals import refusal
from small_network import TINY_NETWORK

TINY = [
    *TINY_NETWORK,
    *("--data", "builtin", "--batch-size", "2", "--device", "cpu", "--sample-steps", "1", "--log-every", "2"),
    *("--num-images", "6", "--sample-every", "2"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "first run"
    main(["train", "--out", str(out), *TINY])
    return out


def records(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    return refusal(capsys, lambda: main(list(arguments)))


def test_a_run_is_drawn(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "samples" / "000000000005.png").write_bytes(b"begun")  # a grid that is being written
    main(["plot", str(run), "--out", str(tmp_path), "--frames", "2"])
    (run / "samples" / "000000000005.png").unlink()
    names = ["curves.png", "samples-first-run.png", "samples-first-run.gif"]
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / name) for name in names]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    grid = Image.open(run / "samples" / "000000000002.png")
    with Image.open(tmp_path / "samples-first-run.gif") as animation:
        assert animation.n_frames == 3
        assert (animation.width, animation.height > grid.height) == (grid.width, True)
    strip = np.asarray(Image.open(tmp_path / "samples-first-run.png").convert("L"))
    assert (strip[2 : 2 + grid.height, 2:-2] == np.asarray(grid.convert("L"))).all()
    last = np.asarray(Image.open(run / "samples" / "000000000006.png").convert("L"))
    below = strip.shape[0] // 2 + 1
    assert (strip[below : below + grid.height, 2:-2] == last).all()


def test_grids_of_different_sizes_are_enlarged_to_the_largest(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    for images, size, gray in ((2, (20, 10), 0), (4, (40, 30), 100)):
        Image.new("L", size, gray).save(tmp_path / "samples" / f"{images:012d}.png")
    small, large = (np.asarray(frame.convert("L")) for frame in read_frames(tmp_path))
    assert small.shape == large.shape == (30 + 14, 40)
    assert (small[:20] == 0).all()  # twice as large, above white
    assert (small[20:30] == 255).all()
    assert (large[:30] == 100).all()


def test_the_curves_are_the_log_s(run: Path) -> None:
    log = records(run)
    losses, quarters, speed, gradient = draw_curves({"one": log, "other": log[:2]}).axes
    for axes, name in ((losses, "loss"), (speed, "images_per_s"), (gradient, "grad_norm")):
        assert [line.get_label() for line in axes.lines] == ["one", "other"]
        for line, own in zip(axes.lines, (log, log[:2]), strict=True):
            assert list(line.get_xdata()) == [record["images"] for record in own]
            assert list(line.get_ydata()) == [record[name] for record in own]
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in quarters.lines}
    with_images = [record for record in log if "loss_q2" in record]  # some intervals have none in a quarter
    wanted = [record["images"] for record in with_images], [record["loss_q2"] for record in with_images]
    assert drawn.get("250 to 500, one", ([], [])) == wanted


def test_names_of_runs_are_drawn_as_they_are(tmp_path: Path) -> None:
    log = [{"images": images, "loss": 1 / images, "loss_q1": 1.0} for images in (1, 2)]
    names = ["d$x_$", "_hidden", "$\\frac$", os.fsdecode(b"caf\xe9"), "犬\n\x1b[1m"]
    figure = draw_curves(dict.fromkeys(names, log))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of characters that the font lacks
        save_figure(figure, tmp_path / "curves.png")
    shown = ["d$x_$", "_hidden", "$\\frac$", "caf\\xe9", "犬\\n\\x1b[1m"]
    for axes, wanted in zip(figure.axes, (shown, [f"timesteps 0 to 250, {name}" for name in shown]), strict=False):
        texts = axes.get_legend().get_texts()
        assert [text.get_text() for text in texts] == wanted
        assert not any(text.get_parse_math() for text in texts)


def test_runs_whose_names_differ_in_signs_alone_have_pictures_of_their_own(run: Path, tmp_path: Path) -> None:
    for name in ("a b", "a$b"):
        shutil.copytree(run, tmp_path / name)
    main(["plot", str(tmp_path / "a b"), str(tmp_path / "a$b"), "--out", str(tmp_path / "out")])
    names = {"curves.png", *(f"samples-{name}" for name in ("a-b.png", "a-b.gif", "a-b-1.png", "a-b-1.gif"))}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


def test_an_older_log_is_drawn_without_what_it_lacks() -> None:
    figure = draw_curves({"old": [{"images": 1, "loss": 0.5}, {"images": 2, "loss": 0.4}]})
    assert [len(axes.lines) for axes in figure.axes] == [1, 0, 0, 0]
    assert [text.get_text() for text in figure.axes[1].texts] == ["not in the log"]


def test_what_is_no_run_is_said(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds no run of lamamba" in refused(capsys, "plot", str(tmp_path))
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    assert "is still empty" in refused(capsys, "plot", str(tmp_path))
    assert "frames is 1: it must be 2 or more" in refused(capsys, "plot", str(run), "--frames", "1")


def test_runs_of_one_name_are_told_apart() -> None:
    assert list(name_runs([Path("/a/x"), Path("/b/x"), Path("/b/y"), Path("/b/y")])) == ["/a/x", "/b/x", "y"]
    assert list(name_runs([Path("/")])) == ["/"]


def test_frames_are_chosen_at_even_distances() -> None:
    assert choose_evenly(range(3), 8) == [0, 1, 2]
    assert choose_evenly(range(101), 5) == [0, 25, 50, 75, 100]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(5):
        path = tmp_path / "images" / f"{index // 3}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), (40 * index, 0, 0)).save(path)
    return tmp_path / "images"


def reds(path: Path, scale: int = 1, height: int = 6) -> list[list[int]]:
    """The red in the middle of every cell; white is 255."""
    pixels = np.asarray(Image.open(path))
    rows = range(2 + height * scale // 2, pixels.shape[0], height * scale + 2)
    columns = range(2 + 4 * scale, pixels.shape[1], 8 * scale + 2)
    return [[int(pixels[row, column, 0]) for column in columns] for row in rows]


def test_images_make_a_grid(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "grid.png"
    main(["grid", str(folder), "--out", str(out)])
    assert reds(out) == [[0, 40, 80], [120, 160, 255]]
    main(["grid", str(folder), "--out", str(out), "--rows", "1"])
    assert reds(out) == [[0, 40, 80, 120, 160]]
    capsys.readouterr()
    main(["grid", str(folder), "--out", str(out), "--rows", "2", "--columns", "2", "--scale", "3"])
    assert reds(out, scale=3) == [[0, 40], [80, 120]]
    assert capsys.readouterr().out == f"{out}: 4 images, 1 left out\n"
    main(["grid", str(folder / "1" / "4.png"), str(folder / "0"), "--out", str(out), "--columns", "4"])
    assert reds(out) == [[160, 0, 40, 80]]


def test_captions_are_below(folder: Path, tmp_path: Path) -> None:
    plain, captioned = tmp_path / "plain.png", tmp_path / "captioned.png"
    for out, options in ((plain, []), (captioned, ["--captions"])):
        main(["grid", str(folder / "0"), "--out", str(out), "--scale", "4", "--rows", "1", *options])
    before, after = np.asarray(Image.open(plain)), np.asarray(Image.open(captioned))
    height = 2 + 6 * 4
    assert (after[:height] == before[:height]).all()
    assert after.shape[0] > before.shape[0]
    cells = [after[height:, 2 + place * 34 : 34 + place * 34] for place in range(3)]
    assert all((cell < 128).any() for cell in cells)
    assert not (cells[0] == cells[1]).all()
    wide = add_caption(Image.new("RGB", (8, 6)), "much longer than the image is wide")
    assert wide.width == 8
    image = Image.new("RGB", (200, 6))
    assert add_caption(image, os.fsdecode(b"caf\xe9\n")) == add_caption(image, "caf\\xe9\\n")


def test_images_that_do_not_fit_are_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    assert "is missing" in refused(capsys, "grid", str(tmp_path / "nowhere"))
    assert "has no images" in refused(capsys, "grid", str(tmp_path / "empty"))
    monkeypatch.setattr("lamamba.commands.plot.MAX_GRID_PIXELS", 100)
    assert "too large" in refused(capsys, "grid", str(folder))
    monkeypatch.undo()
    assert "must be a .png file" in refused(capsys, "grid", str(folder), "--out", "grid.jpg")
    Image.new("RGB", (9, 6)).save(folder / "0" / "9.png")
    assert "9.png is 9x6, but" in refused(capsys, "grid", str(folder), "--out", str(tmp_path / "grid.png"))
    assert not (tmp_path / "grid.png").exists()
