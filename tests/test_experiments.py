"""The comparison of LaMamba with DiT: its pieces run, are stopped, go on to the same records, and are shown."""

import importlib.util
import io
import json
import pickle
import shutil
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from filelock import FileLock
from PIL import Image

from forked import run_python, run_ranks

COMPARISON = Path(__file__).parent.parent / "experiments" / "comparison"
sys.path.append(str(COMPARISON))  # last: its names are its own

import cifar  # noqa: E402
import contestants  # noqa: E402
import distilling  # noqa: E402
import features  # noqa: E402
import make_findings  # noqa: E402
import make_page  # noqa: E402
import pieces  # noqa: E402
import scoring  # noqa: E402
import setting as settings  # noqa: E402
import studies  # noqa: E402
import training  # noqa: E402
import weights  # noqa: E402
from lamamba.cli import main as lamamba  # noqa: E402
from lamamba.distributed.processes import Processes  # noqa: E402
from lamamba.errors import CheckpointError, ConfigError, DataError  # noqa: E402
from lamamba.evaluation.features import open_features  # noqa: E402

TIMES = {"seconds", "images_per_s", "compile_s", "sampling_s"}


class Clock(settings.Clock):
    """Of which the time is over when it is looked at this many times."""

    def __init__(self, looks: int = 1_000_000) -> None:
        super().__init__()
        self.looks = looks

    def check(self, *_: object) -> None:
        self.looks -= 1
        if self.looks < 0:
            raise settings.OutOfTimeError


def place(folder: Path, looks: int = 1_000_000, **changed: Any) -> settings.Setting:
    scale = replace(pieces.QUICK, **changed)
    data = clothes(folder / "clothes")
    return settings.Setting(folder / "out", folder / "results", scale, torch.device("cpu"), Clock(looks), data)


def clothes(folder: Path) -> Path:
    """A hundred random squares in place of the data set, in its files."""
    if not folder.is_dir():
        folder.mkdir(parents=True)
        random = np.random.default_rng(0)
        for name in ("train", "t10k"):
            images = random.integers(0, 256, (100, 28, 28), np.uint8)
            header = b"\x00\x00\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (100, 28, 28))
            (folder / f"{name}-images-idx3-ubyte").write_bytes(header + images.tobytes())
            labels = random.integers(0, 10, 100, np.uint8).tobytes()
            (folder / f"{name}-labels-idx1-ubyte").write_bytes(b"\x00\x00\x08\x01" + (100).to_bytes(4, "big") + labels)
    return folder


def without_times(content: Any) -> Any:
    """Leave out of a record what no two runs share."""
    if isinstance(content, dict):
        return {name: without_times(value) for name, value in content.items() if name not in TIMES | {"parts"}}
    return [without_times(value) for value in content] if isinstance(content, list) else content


def read(setting: settings.Setting, name: str) -> dict[str, Any]:
    return json.loads((setting.results / f"{name}.json").read_text())


STEPS_S = replace(pieces.PIECES["steps-s"], of=pieces.PIECES["s-seed-0"])  # of seed 1, which is not trained here


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> settings.Setting:
    """What pieces leave that were never stopped."""
    setting = place(tmp_path_factory.mktemp("whole"))
    for name in ("s-seed-0", "dit-s-2-seed-0", "s-longer-seed-1", "s-flow"):
        training.train(setting, pieces.PIECES[name])
    for piece in (STEPS_S, pieces.PIECES["steps-s-flow"]):
        studies.score_steps(setting, piece)
    studies.look_for_copies(setting, pieces.PIECES["memorisation-s"])
    return setting


@pytest.mark.parametrize("name", ["dit-s-2-seed-0", "s-longer-seed-1"])  # the first has a sweep, the second more EMAs
def test_what_is_stopped_again_and_again_leaves_the_same_record(
    tmp_path: Path, whole: settings.Setting, name: str
) -> None:
    stops = 0
    while not (tmp_path / "results" / f"{name}.json").is_file():
        setting = place(tmp_path, looks=4)  # enough for any one score
        try:
            training.train(setting, pieces.PIECES[name])
        except settings.OutOfTimeError:
            stops += 1
        assert stops < 20
    assert stops > 3, "it was stopped in training, in scores and in the sweep"
    stopped, expected = read(setting, name), read(whole, name)
    assert without_times(stopped) == without_times(expected)
    assert [part["first_image"] for part in stopped["parts"]][:2] == [0, 16]
    assert len(stopped["parts"]) == stops + 1
    seconds = [row["seconds"] for row in stopped["curve"]]
    assert seconds == sorted(seconds), "time of training goes on from where it was"
    assert [row["images"] for row in stopped["evaluations"]] == [16, 32, 48, 64]


def test_what_is_killed_goes_on_from_its_checkpoint(
    tmp_path: Path, whole: settings.Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_step = training.ComparisonTrainer.take_step

    def kill(trainer: training.ComparisonTrainer, *batch: Any) -> Any:
        if trainer.images == 40:
            raise KeyboardInterrupt
        return take_step(trainer, *batch)

    monkeypatch.setattr(training.ComparisonTrainer, "take_step", kill)
    with pytest.raises(KeyboardInterrupt):
        training.train(place(tmp_path), pieces.PIECES["s-seed-0"])
    monkeypatch.setattr(training.ComparisonTrainer, "take_step", take_step)
    # A record may be newer than the checkpoint, but is cut to it.
    path = tmp_path / "out" / "s-seed-0" / "record.json"
    content = json.loads(path.read_text())
    content["curve"].append({**content["curve"][-1], "images": 48, "loss": 1e9})
    path.write_text(json.dumps(content))
    training.train(place(tmp_path), pieces.PIECES["s-seed-0"])
    again = read(place(tmp_path), "s-seed-0")
    assert without_times(again) == without_times(read(whole, "s-seed-0"))
    assert [part["first_image"] for part in again["parts"]] == [0, 32]


def test_a_record_says_all_that_decides_its_numbers(whole: settings.Setting) -> None:
    record = read(whole, "dit-s-2-seed-0")
    assert record["settings"]["train"]["learning_rate"] == 5e-4
    assert record["settings"]["scale"]["quick"] is True
    assert (record["settings"]["sweep"], record["settings"]["scale"]["sweep"]) == (True, [1.5, 3.0])
    assert record["network"]["step"] == "compiled, kernel by kernel"
    assert {"commit", "device", "torch", "cuda", "diffusers", "started"} < record["parts"][0].keys()
    assert [row["guidance"] for row in record["sweep"]] == [1.5, 3.0]
    best = min(record["sweep"], key=lambda row: row["distance"])
    assert record["best"]["guidance"] == best["guidance"]
    assert record["best"]["num_samples"] == 16
    with Image.open(whole.results / "dit-s-2-seed-0-grid.png") as grid:
        assert grid.height > 10 * 32, "a class a row"


def test_averages_of_other_lengths_are_scored_and_the_usual_one_is_kept(whole: settings.Setting) -> None:
    piece = pieces.PIECES["s-longer-seed-1"]
    rows = read(whole, piece.name)["averages"]
    assert [row["sigma_rel"] for row in rows] == list(pieces.LENGTHS)
    assert len({row["distance"] for row in rows}) == len(rows)
    trainer = training.ComparisonTrainer(whole, piece, whole.open_training_images(piece.data))
    trainer.restore(trainer.path)
    own = {name: value.clone() for name, value in trainer.average.state_dict().items()}
    with trainer.with_average(0.1):
        name = next(name for name, value in trainer.average.named_parameters() if not value.equal(own[name]))
        assert trainer.average.state_dict()[name].equal(trainer.power_averages.state_dict()[f"0.100.{name}"])
    assert all(value.equal(own[name]) for name, value in trainer.average.state_dict().items())
    trainer.close()


def test_other_settings_are_refused_where_a_piece_was_begun(whole: settings.Setting) -> None:
    other = replace(pieces.PIECES["s-seed-0"], learning_rate=1e-3)
    with pytest.raises(ConfigError, match=r"begun with other settings .*learning_rate was 0\.0005, now 0\.001"):
        training.train(whole, other)
    assert settings.of_learning_rate(pieces.PIECES["s-seed-0"], 1e-3) == other
    assert settings.of_learning_rate(pieces.PIECES["steps-s"], 1e-3).of.learning_rate == 1e-3
    assert settings.of_learning_rate(pieces.PIECES["speed"], 1e-3) is pieces.PIECES["speed"]


def test_a_gradient_that_is_not_finite_ends_the_piece(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="not finite before image 64: lower learning_rate"):
        training.train(place(tmp_path, log_every=64), replace(pieces.PIECES["s-seed-0"], learning_rate=1e30))


def test_both_networks_see_the_same_images_timesteps_and_noise(tmp_path: Path) -> None:
    setting = place(tmp_path)
    source = setting.open_training_images("fashion-mnist")
    drawn = []
    for name in ("s-seed-0", "dit-s-2-seed-0"):
        trainer = training.ComparisonTrainer(setting, pieces.PIECES[name], source)
        batches = trainer.batches()
        drawn.append([tensor for _ in range(3) for tensor in trainer._draw(*next(batches))])
        trainer.close()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*drawn, strict=True))


def test_the_networks_have_the_sizes_of_their_papers() -> None:
    def count(name: str) -> tuple[int, int]:
        found = contestants.cost(name, contestants.network_config(name, 1, 32, 10))
        return found["parameters"], found["multiply_adds"]

    # Table 1 of DiT, at 32 x 32 and a thousand classes: 33 M and 130 M parameters, 6.06 and 23.01 G multiply-adds.
    assert count("dit-s-2") == pytest.approx((33e6, 6.06e9), rel=0.02)
    assert count("dit-b-2") == pytest.approx((130e6, 23.01e9), rel=0.01)
    whole = count("s")
    assert count("unet")[0] == pytest.approx(whole[0], rel=0.03)
    for name in ("s-scan-only", "s-attention-only"):
        assert all(part < all_of_it for part, all_of_it in zip(count(name), whole, strict=True))
    assert count("s-raster") == whole
    assert count("s-window-4")[1] < whole[1] < count("s-state-16")[1]


@pytest.fixture
def dit() -> contestants.DiT:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return contestants.DiT(contestants.DiTGeometry(3, 24, 2), in_channels=1, sample_size=8, num_classes=10)


def inputs(number: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(number, 1, 8, 8, generator=generator),
        torch.randint(1000, (number,), generator=generator),
        torch.randint(10, (number,), generator=generator),
    )


def stir(network: torch.nn.Module) -> None:
    """Move parameters off 0, where what they multiply does not show."""
    generator = torch.Generator().manual_seed(2)
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def test_a_dit_drops_no_labels_itself(dit: contestants.DiT) -> None:
    stir(dit)
    x, t, y = inputs()
    trains = dit.train()(x, t, y)
    assert torch.equal(trains, dit.eval()(x, t, y)), "else one in ten would differ"
    assert bool((dit(x, t, torch.full_like(y, dit.null_label)) != trains).flatten(1).any(dim=1).all())


def test_a_dit_begins_as_the_identity_and_learns_with_every_parameter(dit: contestants.DiT) -> None:
    x, t, y = inputs()
    assert bool((dit(x, t, y) == 0).all()), "adaLN-Zero: modulation and output are 0"
    table = dit.embedding.class_embedder.embedding_table.weight
    assert table.shape == (11, 24)
    assert 0.01 < float(table.detach().std()) < 0.03
    stir(dit)
    y[0] = dit.null_label
    dit.train()(x, t, y).square().mean().backward()
    for name, parameter in dit.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()), name


def test_a_u_net_learns_with_every_parameter() -> None:
    network = contestants.build("unet", contestants.network_config("unet", 1, 8, 10, quick=True), quick=True)
    x, t, y = inputs(4)
    y[0] = network.null_label
    network.train()(x, t, y).square().mean().backward()
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in network.parameters())
    labels = torch.arange(4)
    assert bool((network(x, t, labels) != network(x, t, labels.flip(0))).flatten(1).any(dim=1).all())


def test_a_u_net_is_trained_and_scored(tmp_path: Path) -> None:
    piece = replace(pieces.PIECES["cifar-unet-seed-0"], data="fashion-mnist")
    assert piece.compile
    training.train(place(tmp_path), piece)
    record = read(place(tmp_path), "cifar-unet-seed-0")
    assert record["network"]["step"].startswith("compiled")
    assert [row["images"] for row in record["evaluations"]] == [32, 64]


@pytest.mark.parametrize("name", ["s", "dit-s-2", "unet"])
def test_autocast_rounds_the_network_but_not_what_the_sampler_gets(name: str) -> None:
    network = contestants.build(name, contestants.network_config(name, 1, 8, 10, quick=True), quick=True).eval()
    stir(network)
    x, t, y = inputs(4)
    with torch.no_grad():
        exact = network(x, t, y)
        rounded = scoring.InAutocast(network, torch.autocast("cpu", torch.bfloat16))(x, t, y)
    assert rounded.dtype == torch.float32
    error = float((rounded - exact).norm() / exact.norm())
    assert 1e-5 < error < 0.1


def test_the_nearest_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, known = (torch.randn(n, 7, generator=generator, dtype=torch.float64) for n in (1203, 50))
    every = ((queries[:, None] - known) ** 2).mean(dim=2).sqrt()
    distances, indices = studies.find_nearest(queries, known)
    assert torch.equal(indices, every.argmin(dim=1))
    torch.testing.assert_close(distances, every.amin(dim=1))
    of_others, indices = studies.find_nearest(queries, queries, is_same=True)
    assert bool((indices != torch.arange(1203)).all())
    assert float(of_others.min()) > 0


def test_memorised_images_are_seen(tmp_path: Path, whole: settings.Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = read(whole, "memorisation-s")["distances"]
    assert honest.keys() == {"pixels", "features"}
    assert honest["pixels"]["samples at guidance 1"]["share_nearer_than_percentile_1"] == 0
    source = whole.open_training_images("fashion-mnist")
    monkeypatch.setattr(
        scoring.Denoiser, "draw", lambda self, setting, number, *_: torch.from_numpy(source.images[:number].copy())
    )
    copying = replace(whole, results=tmp_path)
    studies.look_for_copies(copying, replace(pieces.PIECES["memorisation-s"], name="copies"))
    for rows in read(copying, "copies")["distances"].values():
        assert rows["samples at guidance 2"]["share_nearer_than_percentile_1"] == 1
        assert rows["samples at guidance 2"]["least"] < 1e-5
        assert rows["test images"]["least"] > 0


def test_points_of_steps_are_not_computed_twice(
    tmp_path: Path, whole: settings.Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = read(whole, "steps-s-flow")
    assert [(p["sampler"], p["steps"], p["evaluations"]) for p in expected["points"]] == [
        ("unipc", 2, 2), ("euler", 2, 2), ("heun", 2, 3), ("ancestral", 2, 2),
        ("unipc", 4, 4), ("euler", 4, 4), ("heun", 4, 7), ("ancestral", 4, 4),
    ]  # fmt: skip
    setting = place(tmp_path, looks=6)  # of which an Euler step takes one and a Heun step two
    (setting.out / "s-flow").mkdir(parents=True)
    (setting.out / "s-flow" / training.CHECKPOINT).symlink_to(whole.out / "s-flow" / training.CHECKPOINT)
    with pytest.raises(settings.OutOfTimeError):
        studies.score_steps(setting, pieces.PIECES["steps-s-flow"])
    setting = place(tmp_path)
    studies.score_steps(setting, pieces.PIECES["steps-s-flow"])
    assert without_times(read(setting, "steps-s-flow")) == without_times(expected)
    whole_study = sum(point["evaluations"] for point in expected["points"])
    assert 0 < 1_000_000 - setting.clock.looks < whole_study, "not all of it again"


def test_ways_to_launch_a_step_are_timed_and_failures_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(network: contestants.DiT) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(contestants.DiT, "compile_blocks", fail)
    studies.time_steps(place(tmp_path), pieces.Speed(networks=("s", "dit-s-2")))
    cases = read(place(tmp_path), "speed")["cases"]
    timed = [(case["network"], case["compile"], case["cuda_graph"]) for case in cases if "images_per_s" in case]
    assert timed == [("s", False, True), ("s", False, False), ("dit-s-2", False, True)]
    assert [case["failed"] for case in cases if "failed" in case] == ["RuntimeError: no compiler"] * 2


def test_emoji_are_trained_on_without_scores(tmp_path: Path, images: Path) -> None:
    setting = replace(place(tmp_path, num_images=16), emoji=images)
    training.train(setting, pieces.PIECES["emoji-nano"])
    record = read(setting, "emoji-nano")
    assert (record["network"]["num_training_images"], record["evaluations"]) == (6, [])
    assert "sweep" not in record
    weights.release(setting.out / "emoji-nano", tmp_path / "released", ("bird", "fish"))
    out = tmp_path / "grid.png"
    lamamba(["sample", str(tmp_path / "released"), "--labels", "bird", "--steps", "1", "--out", str(out)])
    assert out.is_file()
    with pytest.raises(ConfigError, match="emoji is not given: make the folder with 'lamamba prepare emoji'"):
        training.train(replace(setting, emoji=None), pieces.PIECES["emoji-s"])


def test_weights_travel_in_parts(tmp_path: Path, whole: settings.Setting) -> None:
    run = whole.out / "s-seed-0"
    paths = weights.pack(run, tmp_path / "packed", most_bytes=100_000)
    assert len(paths) > 5
    assert all(path.stat().st_size < 150_000 for path in paths)
    setting = place(tmp_path)
    weights.unpack(tmp_path / "packed", setting.out / "s-seed-0")
    before, after = (training.read_average(folder / training.CHECKPOINT) for folder in (run, setting.out / "s-seed-0"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].half(), after[name]) for name in before)
    studies.score_steps(setting, STEPS_S)
    pairs = zip(read(setting, "steps-s")["points"], read(whole, "steps-s")["points"], strict=True)
    assert all(ours["distance"] == pytest.approx(theirs["distance"], rel=1e-2) for ours, theirs in pairs)
    (setting.out / "s-seed-0" / "record.json").unlink()
    with pytest.raises(CheckpointError, match="holds averaged weights alone: delete it"):
        training.train(setting, pieces.PIECES["s-seed-0"])
    paths[2].unlink()
    with pytest.raises(SystemExit, match=rf"has {len(paths) - 1} of {len(paths)} parts"):
        weights.unpack(tmp_path / "packed", setting.out / "again")
    with pytest.raises(SystemExit, match="is a dit-s-2: only networks of this package are released"):
        weights.release(whole.out / "dit-s-2-seed-0", tmp_path / "released")


def test_students_are_scored_beside_their_teacher(tmp_path: Path, whole: settings.Setting) -> None:
    piece, stops = pieces.Distilling("distilled", pieces.PIECES["s-flow"], guidance=1.5), 0
    for looks in (1, 6, 1_000_000):  # it is stopped in training, and in scores
        setting = place(tmp_path, looks, num_images=48)
        (setting.out / "s-flow").mkdir(parents=True, exist_ok=True)
        for name in (training.CHECKPOINT, "record.json"):
            shutil.copy(whole.out / "s-flow" / name, setting.out / "s-flow" / name)
        try:
            distilling.distill(setting, piece)
        except settings.OutOfTimeError:
            stops += 1
    assert stops == 2
    record = read(setting, "distilled")
    assert record["finished"]
    assert [row["images"] for row in record["curve"]] == [16, 32, 48]
    assert all(row["loss"] > row["gap"] > 0 for row in record["curve"])
    assert [(p["who"], p["sampler"], p["steps"], p["guidance"]) for p in record["points"]] == [
        ("teacher", "unipc", 1, 1.5), ("teacher", "unipc", 3, 1.5),
        ("teacher", "ancestral", 1, 1.5), ("teacher", "ancestral", 3, 1.5),
        ("4", "ancestral", 4, 1.0), ("4", "ancestral", 1, 1.0), ("4", "ancestral", 3, 1.0),
    ]  # fmt: skip
    assert all(point["precision"] >= 0 and point["distance"] > 0 for point in record["points"])
    assert (setting.results / "distilled-grid.png").is_file()
    student = setting.out / "distilled" / "student-4"
    lamamba(["sample", str(student), "--labels", "bag", "--num-per-label", "1", "--out", str(tmp_path / "grid.png")])
    with Image.open(tmp_path / "grid.png") as grid:
        assert json.loads(grid.text["lamamba"])["steps"] == 4


def test_studies_say_what_they_miss(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint.safetensors is missing: run s-seed-0 first"):
        studies.score_steps(place(tmp_path), STEPS_S)


def test_the_page_is_made_of_records_and_names_what_is_missing(tmp_path: Path, whole: settings.Setting) -> None:
    page = tmp_path / "docs" / "results.md"
    records = make_page.read_records(whole.results, quick=True)
    assert make_page.read_records(whole.results) == {}, "a quick look is no result"
    make_page.write_page(records, whole.results, page)
    text = page.read_text()
    assert "**Records of a quick look, whose numbers mean nothing.**" in text
    record = records["dit-s-2-seed-0"]
    assert f"| {make_page.number(record['evaluations'][-1]['distance'])} |" in text
    several = "dit-s-2-seed-1, s-seed-2, dit-s-2-seed-2, s-longer, dit-s-2-longer, dit-s-2-longer-seed-1, b, dit-b-2"
    assert f"Not measured yet: s-seed-1, {several}, " in text
    assert "### LaMamba-S, 64 images, flow matching" in text
    assert "| distance at | 0.02 | 0.05 | 0.1 | 0.2 |" in text
    assert "Not measured yet: memorisation-dit-s-2, memorisation-nano, memorisation-emoji-64." in text
    assert "Not measured yet: speed." in text
    shown = {part.split(")")[0] for part in text.split("](results/")[1:]}
    assert {"seed-0-curves.png", "steps-s.png", "memorisation-s-nearest.png"} < shown
    for name in shown:
        with Image.open(page.parent / "results" / name) as image:
            image.verify()


def test_without_records_no_page_is_written(tmp_path: Path) -> None:
    page = str(tmp_path / "results.md")
    done = run_python(str(COMPARISON / "make_page.py"), "--results", str(tmp_path), "--page", page)
    assert done.returncode == 1
    assert "nothing is measured yet, and nothing was written" in done.stderr
    assert not list(tmp_path.iterdir())


def test_equal_time_reads_between_scores() -> None:
    rows = [{"seconds": 10.0, "distance": 8.0}, {"seconds": 20.0, "distance": 4.0}, {"seconds": 40.0, "distance": 3.0}]
    read_at: Callable[[float], float | None] = lambda s: make_page.at_seconds({"evaluations": rows}, s)  # noqa: E731
    assert [read_at(seconds) for seconds in (5, 10, 15, 30, 50)] == [None, 8.0, 6.0, 3.5, 3.0]


@pytest.fixture
def run() -> ModuleType:
    spec = importlib.util.spec_from_file_location("comparison_run", COMPARISON / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_command_skips_what_is_done_and_stops_in_time(
    tmp_path: Path, whole: settings.Setting, run: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def call(*arguments: str) -> tuple[int, str]:
        folders = ["--out", str(whole.out), "--results", str(tmp_path), "--data-folder", str(whole.data_folder)]
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments, *folders, "--quick", "--device", "cpu"])
        return run.main(), "".join(capsys.readouterr())

    code, said = call("s-seed-0", "steps-s", "--seconds", "1000")
    assert (code, said.split("\n")[:2]) == (0, ["s-seed-0: done before", "steps-s: done before"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s-seed-0-grid.png", "s-seed-0.json", "steps-s.json"]
    code, said = call("s-seed-0", "dit-s-2-seed-1", "--seconds", "80")  # too few to begin with
    assert code == 3
    assert "dit-s-2-seed-1: the time is over, the same command goes on from here" in said
    code, said = call("emoji", "emoji-nano", "s-seed-0")
    assert code == 1
    assert said.count("error: emoji is not given") == 3, "a fault of one does not keep others from running"
    code, said = call()
    assert "s-seed-0                done" in said
    with pytest.raises(SystemExit, match="nothing is named 's-seed': did you mean s-seed-0 or s-seed-1 or s-seed-2"):
        call("s-seed")


def test_processes_share_the_pieces(tmp_path: Path, run: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process trains s-seed-0: what needs it waits for it, what does not is done meanwhile."""
    setting = place(tmp_path)
    trained, memorisation, nano = (pieces.PIECES[name] for name in ("s-seed-0", "memorisation-s", "nano"))
    other = FileLock(setting.out / ".s-seed-0.lock")
    setting.out.mkdir()
    other.acquire()
    begun = []

    def finish(piece: pieces.Piece) -> None:
        settings.Record(setting, piece, {}).finish()

    def work(setting: settings.Setting, piece: pieces.Piece) -> None:
        begun.append(piece.name)
        finish(piece)
        if piece is nano:  # and in the end the other is done, too
            finish(trained)
            other.release()

    monkeypatch.setattr(run, "FUNCTIONS", dict.fromkeys((pieces.Training, pieces.Memorisation), work))
    assert run.run(setting, [trained, memorisation, nano]) == 0
    assert begun == ["nano", "memorisation-s"]
    with FileLock(setting.out / ".b.lock"):
        assert run.run(replace(setting, clock=settings.Clock(0.5)), [pieces.PIECES["b"]]) == 3, "it would wait for ever"
    assert begun == ["nano", "memorisation-s"]


def test_processes_of_torchrun_share_a_training_that_one_ends(tmp_path: Path, whole: settings.Setting) -> None:
    program = tmp_path / "program.py"  # whose time is over after the last line of the curve
    program.write_text(
        f"""
import sys
sys.path.append({str(COMPARISON)!r})
import run, setting
looks = 3
def check(clock, *_):
    global looks
    looks -= 1
    if looks < 0:
        raise setting.OutOfTimeError
setting.Clock.check = check
sys.exit(run.main())
"""
    )
    folders = ["--out", "out", "--results", "results", "--data-folder", str(whole.data_folder)]
    done = run_ranks(2, str(program), "s-raster", "--quick", "--device", "cpu", *folders, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "s-raster: the time is over, the same command goes on from here" in done.stdout
    training.train(place(tmp_path), pieces.PIECES["s-raster"])
    alone = place(tmp_path / "alone")
    training.train(alone, pieces.PIECES["s-raster"])
    shared, expected = read(place(tmp_path), "s-raster"), read(alone, "s-raster")
    assert [(part["processes"], part["first_image"]) for part in shared["parts"]] == [(2, 0), (1, 64)]
    assert [row["images"] for row in shared["curve"]] == [16, 32, 48, 64]
    for ours, theirs in zip(shared["curve"], expected["curve"], strict=True):
        assert [ours[name] for name in ("loss", "grad_norm")] == pytest.approx(
            [theirs[name] for name in ("loss", "grad_norm")], rel=1e-4
        )
    assert shared["evaluations"][-1]["distance"] == pytest.approx(expected["evaluations"][-1]["distance"], rel=1e-3)


def test_processes_that_share_trainings_do_nothing_else(tmp_path: Path, run: ModuleType) -> None:
    with pytest.raises(SystemExit, match="memorisation-s: several processes share trainings alone"):
        run.run_together(place(tmp_path), [pieces.PIECES["s-seed-0"], pieces.PIECES["memorisation-s"]])
    setting = place(tmp_path)
    with FileLock(setting.out / ".b.lock"), pytest.raises(SystemExit, match="b: error: another process runs it"):
        run.run_together(setting, [pieces.PIECES["b"]])
    with pytest.raises(SystemExit, match="emoji-s: error: emoji is not given"):
        run.run_together(setting, [pieces.PIECES["emoji-s"]])
    with pytest.raises(settings.OutOfTimeError):  # enough to go on, not to begin
        run.run_together(replace(setting, clock=settings.Clock(80.0)), [pieces.PIECES["b"]])


def test_the_time_is_over_for_all_when_it_is_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = place(tmp_path)
    setting.check_time()
    monkeypatch.setattr(Processes, "all_reduce_max", lambda processes, number: 1)  # another's
    with pytest.raises(settings.OutOfTimeError):
        setting.check_time()


def test_speed_is_that_of_a_gpu(whole: settings.Setting) -> None:
    record = read(whole, "s-flow")
    curve = [{"images": images, "images_per_s": speed, "loss": 0.1} for images, speed in ((16, 10.0), (32, 40.0))]
    parts = [{"first_image": 0}, {"first_image": 16, "processes": 4}, {"first_image": 32, "processes": 1}]
    shared = {**record, "curve": curve, "parts": parts}
    assert make_page.speed(shared) == 10.0
    lines = make_page.ablations({"s-flow": shared}, lambda name, draw: "")
    assert any(line.startswith("| s-flow, on 1 and 4 GPUs | 1 | 10 |") for line in lines)
    with pytest.raises(SystemExit, match="trained by several GPUs, and not to be compared by time"):
        make_page.comparison({"s-seed-0": shared}, lambda name, draw: "")


def test_a_real_list_has_names_of_its_own_and_even_quarters() -> None:
    every = [piece for several in pieces.LISTS.values() for piece in several]
    assert len({piece.name for piece in every}) == len(every)
    for piece in every:
        if isinstance(piece, pieces.Training):
            assert piece.network in contestants.NAMES
            assert piece.num_images % (4 * pieces.FULL.batch_size) == 0
            assert piece.num_images % pieces.FULL.log_every == 0
    assert pieces.FULL.num_samples <= 60_000, "there are not more images to compare as many samples with"


@pytest.mark.parametrize(("name", "text"), make_findings.PAGES.items())
def test_the_findings_are_those_of_the_records(name: str, text: str) -> None:
    made = make_findings.page(make_page.read_records(COMPARISON / "results"), (COMPARISON / text).read_text())
    assert made == (make_findings.DOCS / name).read_text()
    assert "{" not in made


@pytest.mark.parametrize(("name", "folder"), make_findings.GRIDS.items())
def test_the_pictures_are_those_of_the_records(name: str, folder: str) -> None:
    made = COMPARISON / "results" / f"{name}-grid.png"
    assert made.read_bytes() == (make_findings.DOCS / folder / f"{name}.png").read_bytes()


def test_students_are_compared_with_the_most_steps_of_their_teacher() -> None:
    """Each number of the tables comes from its own row of the record; records that are not there yet are left out."""
    ways = [
        ("teacher", "unipc", 4),
        ("teacher", "unipc", 25),
        ("teacher", "ancestral", 4),
        ("teacher", "ancestral", 25),
    ]
    ways += [("4", "ancestral", 4), ("4", "ancestral", 25)]
    points = [
        {"who": who, "sampler": sampler, "steps": steps, "distance": place + 1.0, "precision": 0.5, "recall": 0.25,
         "squeezenet": {"distance": 10.0 * (place + 1), "precision": 0.75, "recall": 0.125},
         "vgg16": {"distance": 100.0, "precision": 1.0, "recall": 0.0}, "sampling_s": 1.0}
        for place, (who, sampler, steps) in enumerate(ways)
    ]  # fmt: skip
    curve = [{"seconds": 1.0, "compile_s": 2.0}, {"seconds": 7.0}]
    record = {"points": points, "curve": curve, "settings": {"scale": {"few_steps": [4, 25]}}}
    records = {"distill-nano": record}
    assert make_findings.students_table(records, "distill-nano")[2:6] == [
        "| teacher | `unipc` | 25 | 2 | 0.5 | 0.25 | 20 | 0.75 | 0.125 | 100 | 1 | 0 |",
        "| teacher | `unipc` | 4 | 1 | 0.5 | 0.25 | 10 | 0.75 | 0.125 | 100 | 1 | 0 |",
        "| student | `ancestral` | 25 | 6 | 0.5 | 0.25 | 60 | 0.75 | 0.125 | 100 | 1 | 0 |",
        "| student | `ancestral` | 4 | 5 | 0.5 | 0.25 | 50 | 0.75 | 0.125 | 100 | 1 | 0 |",
    ]
    ratios = make_findings.ratios_table(records)
    assert ratios[0] == "|  | teacher, 4 | student, 4 |"
    assert ratios[2] == "| noise prediction, clothes | 0.50 | 2.50 |"
    assert make_findings.times_table(records)[2] == "| noise prediction | 2 | 7 | 6 |"
    text = "\n".join(make_findings.distillation(records))
    assert "Noise prediction ([record]" in text
    assert "distillation/distill-nano.png" in text
    assert "low matching" not in text
    assert make_findings.distillation({}) == []


def test_packed_cifar_holds_the_same_pictures(tmp_path: Path) -> None:
    files, colors = [], ((200, 30, 30), (30, 30, 200), (30, 200, 30))
    for color in colors:
        file = io.BytesIO()
        Image.new("RGB", (32, 32), color).save(file, "JPEG", quality=95)
        files.append({"bytes": file.getvalue(), "path": None})
    pyarrow.parquet.write_table(pyarrow.table({"image": files, "label": [3, 0, 9]}), tmp_path / "test-0.parquet")
    cifar.pack(tmp_path / "test-0.parquet", tmp_path / "cifar10-test.xz")
    source = cifar.load_cifar("test", tmp_path)
    assert source.labels.tolist() == [3, 0, 9]
    assert np.abs(source.images.mean((2, 3)) - np.array(colors)).max() < 3
    with pytest.raises(DataError, match="train"):
        cifar.load_cifar("train", tmp_path)


@pytest.mark.parametrize("name", ["vgg16", "squeezenet"])
def test_feature_networks_take_images_of_both_kinds(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a package to packed weights, to a network."""
    random = np.random.default_rng(0)

    def weights(side: int, inputs: int, outputs: int) -> list[np.ndarray]:
        scale = (2 / (side * side * inputs)) ** 0.5
        weight = random.standard_normal((side, side, inputs, outputs), np.float32) * scale
        return [weight, np.zeros(outputs, np.float32)]

    if name == "vgg16":
        widths = (3, 64, 64, 128, 128, 256, 256, 256, *[512] * 6)
        layers = [dict(zip(("kernel", "bias"), weights(3, *pair), strict=True)) for pair in pairwise(widths)]
        arrays = {"VGG16_0": {f"Conv_{i}": layer for i, layer in enumerate(layers)}, "unused": np.ones(3)}
        file = "vgg16.ckpt"
    else:
        arrays, inputs = {"conv1": weights(3, 3, 64)}, 64
        for fire, narrow in zip(range(2, 10), (16, 16, 32, 32, 48, 48, 64, 64), strict=True):
            arrays[f"fire{fire}/squeeze1x1"] = weights(1, inputs, narrow)
            arrays[f"fire{fire}/expand1x1"] = weights(1, narrow, 4 * narrow)
            arrays[f"fire{fire}/expand3x3"] = weights(3, narrow, 4 * narrow)
            inputs = 8 * narrow
        file = "squeezenet_weights.pkl"
    (tmp_path / file).write_bytes(pickle.dumps(arrays))
    with tarfile.open(tmp_path / "package.tar.gz", "w:gz", compresslevel=1) as archive:
        archive.add(tmp_path / file, f"package-0.1/weights/{file}")
    for given in (["package.tar.gz", "--pack"], [f"{name}.npz"]):
        monkeypatch.setattr(sys, "argv", ["features.py", str(tmp_path / given[0]), *given[1:], "--out", str(tmp_path)])
        features.main()
    assert "unused" not in np.load(tmp_path / f"{name}.npz")

    extract = open_features(str(tmp_path / f"{name}.pt"), torch.device("cpu"))
    gray = torch.from_numpy(random.integers(0, 256, (2, 1, 32, 32), np.uint8))
    found = extract(gray.expand(-1, 3, -1, -1)).features
    assert found.shape == (2, 512)
    assert found.std() > 0
    network = features.NETWORKS[name](features.unflatten(dict(features.flatten(arrays))))
    torch.testing.assert_close(network(gray), found)


def test_arrays_are_read_without_running_code() -> None:
    with pytest.raises(pickle.UnpicklingError, match="is not an array"):
        features.read_arrays(io.BytesIO(pickle.dumps(print)))
