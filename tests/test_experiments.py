"""The comparison of LaMamba with DiT: its pieces run, are stopped, go on to the same records, and are shown."""

import importlib.util
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from filelock import FileLock
from PIL import Image

import contestants
import distilling
import make_page
import pieces
import scoring
import setting as settings
import studies
import training
import weights
from comparison_setting import COMPARISON, place, read
from forked import run_ranks
from lamamba.cli import main as lamamba
from lamamba.distributed.processes import Processes
from lamamba.errors import CheckpointError, ConfigError

# All of them, so that they stay together: each process that runs some trains what they share.
pytestmark = pytest.mark.slow
TIMES = {"seconds", "images_per_s", "compile_s", "sampling_s"}


def without_times(content: Any) -> Any:
    """Leave out of a record what no two runs share."""
    if isinstance(content, dict):
        return {name: without_times(value) for name, value in content.items() if name not in TIMES | {"parts"}}
    return [without_times(value) for value in content] if isinstance(content, list) else content


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
    paths = weights.pack(run, tmp_path / "packed", most_bytes=70_000)
    assert len(paths) > 5
    assert all(path.stat().st_size < 100_000 for path in paths)
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
