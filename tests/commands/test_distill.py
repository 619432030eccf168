"""`lamamba distill`: continues exactly, and its students are sampled everywhere in their own steps."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import lamamba
from lamamba.checkpoints import checkpoint
from lamamba.checkpoints.checkpoint import checkpoints_in, load_checkpoint
from lamamba.cli import main
from lamamba.commands.distill import complete
from lamamba.config import DemoLimits, DistillationOptions, DistillConfig, SamplingConfig
from lamamba.demo.previews import compare_guidance
from lamamba.demo.settings import read_request
from lamamba.errors import CheckpointError, ConfigError, DataError
from lamamba.files.records import read_train_config
from lamamba.sampling.generate import ImageSampler
from lamamba.sampling.pipeline import LaMambaDiffPipeline
from refusals import refusal
from small_network import TINY_NETWORK
from tiny_runs import weights

TINY = [
    *TINY_NETWORK,
    *("--batch-size", "4", "--device", "cpu", "--sample-steps", "1", "--learning-rate", "0.01"),
]
# Eight optimizer steps; the first two of them are regression if the teacher predicts noise.
SHORT = ["--num-images", "32", "--batch-size", "4", "--device", "cpu", "--sample-every", "32"]


def train_teacher(out: Path, *options: str) -> Path:
    main(["train", "--out", str(out), *TINY, "--num-images", "16", "--sample-every", "16", *options])
    return out


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("teachers")
    return {name: train_teacher(folder / name, "--objective", name) for name in ("diffusion", "flow")}


@pytest.fixture(scope="module")
def students(teachers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("students")
    for name, teacher in teachers.items():
        every = "4" if name == "diffusion" else "16"  # the stops of `test_a_stop_changes_nothing`
        options = ["--checkpoint-every", every, "--keep-checkpoints", "0", "--guidance", "1.5"]
        main(["distill", str(teacher), "--out", str(folder / name), *SHORT, *options])
    return {name: folder / name for name in teachers}


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    return refusal(capsys, lambda: main(list(arguments)))


def sample(run: Path, out: Path, *options: str) -> np.ndarray:
    options = ("--labels", "1", "--num-per-label", "2", "--images-out", str(out), "--device", "cpu", *options)
    main(["sample", str(run), "--out", str(out / "grid.png"), *options])
    return np.stack([np.asarray(Image.open(out / f"00000{index}.png")) for index in range(2)])


# A stop in the regression, at its end, and after it.
@pytest.mark.parametrize(("name", "images"), [("flow", 16), ("diffusion", 4), ("diffusion", 8), ("diffusion", 20)])
def test_a_stop_changes_nothing(students: dict[str, Path], tmp_path: Path, name: str, images: int) -> None:
    whole, run = students[name], tmp_path / "run"
    shutil.copytree(whole, run)
    for path in checkpoints_in(run):
        if int(path.name) > images:
            shutil.rmtree(path)
    config = read_train_config(run / "config.json")
    main(["distill", str(config.start_from), "--out", str(run), "--resume", "--checkpoint-every", "32"])
    expected, found = weights(whole), weights(run)
    assert {name.split("/")[0] for name in expected} == {"network", "ema", "auxiliary", "teacher", "training"}
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_run_goes_on_without_its_teacher(students: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(students["diffusion"], run)
    shutil.rmtree(checkpoints_in(run)[-1])
    record = json.loads((run / "config.json").read_text())
    record["start_from"] = record["paths"]["start_from"] = str(tmp_path / "gone")
    (run / "config.json").write_text(json.dumps(record))
    main(["train", "--out", str(run), "--resume"])
    expected, found = weights(students["diffusion"]), weights(run)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_the_start_is_announced(teachers: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["distill", str(teachers["flow"]), "--out", str(tmp_path / "run"), *SHORT])
    shown = capsys.readouterr().out
    assert f"starts from the EMA weights of {teachers['flow']}" in shown
    assert "without guidance" not in shown
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert all(line["loss"] > line["gap"] > 0 for line in lines)
    main(["watch", str(tmp_path / "run")])
    assert f" gap            {lines[-1]['gap']:.4f} " in capsys.readouterr().out


@pytest.mark.parametrize(("name", "objective", "sampler"), [
    ("diffusion", "diffusion-v", "ancestral-cosine"), ("flow", "flow", "ancestral"),
])  # fmt: skip
def test_a_student_remembers_how_it_is_sampled(
    students: dict[str, Path], name: str, objective: str, sampler: str
) -> None:
    info = load_checkpoint(students[name]).info
    assert info.objective == objective
    assert info.distilled == checkpoint.Distilled(4, sampler, 1.5)
    config = read_train_config(students[name] / "config.json")
    assert (config.network.label_dropout, config.data) == (0.0, "builtin")
    assert config.distillation == DistillationOptions(4, 1.5, name)


@pytest.mark.parametrize("name", ["diffusion", "flow"])
def test_a_student_is_sampled_in_its_own_steps(
    students: dict[str, Path], tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run, sampler = students[name], {"diffusion": "ancestral-cosine", "flow": "ancestral"}[name]
    images = sample(run, tmp_path / "own")
    shown = capsys.readouterr().out
    assert f"this network was distilled for 4 steps of {sampler}, guidance 1.5 included" in shown
    assert f"{sampler}, 4 steps" in shown
    assert "guidance is off" not in shown
    settings = json.loads(Image.open(tmp_path / "own" / "000000.png").text["lamamba"])
    kept = ("sampler", "steps", "guidance", "guidance_included")
    assert [settings[key] for key in kept] == [sampler, 4, 1.0, 1.5]

    explicit = sample(run, tmp_path / "explicit", "--steps", "4", "--sampler", sampler, "--guidance", "1.5")
    assert np.array_equal(images, explicit)
    loaded = load_checkpoint(run)
    by_hand = lamamba.sample(
        loaded.network, lamamba.diffusion.OBJECTIVES[loaded.info.objective], [1, 1], [0, 1], sampler=sampler,
        num_steps=4, clip_sample=True,
    )  # fmt: skip
    assert np.array_equal(lamamba.to_uint8(by_hand).numpy()[:, 0], images)


def test_other_steps_are_warned_of(
    students: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = students["flow"]
    expected = "this network was distilled for 4 steps of ancestral: expect worse images from "
    sample(run, tmp_path / "more", "--steps", "8")
    assert expected + "8 steps of ancestral\n" in capsys.readouterr().out
    sample(run, tmp_path / "other", "--sampler", "unipc")
    assert expected + "4 steps of unipc\n" in capsys.readouterr().out
    message = "guidance_scale is 3, and this network was distilled for 4 steps of ancestral, guidance 1.5 included"
    assert message in refused(capsys, "sample", str(run), "--guidance", "3", "--out", str(tmp_path / "grid.png"))

    pipe = LaMambaDiffPipeline.from_checkpoint(run)
    with pytest.raises(ConfigError, match="guidance_scale is 2, and this network was distilled"):
        pipe(1, guidance_scale=2.0)
    with pytest.warns(UserWarning, match=expected + "1 step of ancestral"):
        pipe(1, 1)
    pipe.scheduler = lamamba.make_scheduler(lamamba.FlowMatching(), "unipc", 4)
    with pytest.warns(UserWarning, match=expected + "4 steps of UniPCMultistepScheduler"):
        pipe(1)


@pytest.mark.parametrize("name", ["diffusion", "flow"])
def test_pipelines_and_pushed_folders_keep_the_steps(students: dict[str, Path], tmp_path: Path, name: str) -> None:
    images = sample(students[name], tmp_path / "own")
    main(["push", str(students[name]), "--out", str(tmp_path / "pushed"), "--num-per-label", "1", "--device", "cpu"])
    sampler = {"diffusion": "ancestral-cosine", "flow": "ancestral"}[name]
    card = (tmp_path / "pushed" / "README.md").read_text()
    assert f"| sampling | distilled for 4 steps of {sampler}, guidance 1.5 included |" in card
    assert "num_inference_steps=4" in card
    assert "label_dropout" not in card
    assert np.array_equal(sample(tmp_path / "pushed", tmp_path / "again"), images)
    for pipe in (
        LaMambaDiffPipeline.from_checkpoint(students[name]),
        LaMambaDiffPipeline.from_pretrained(tmp_path / "pushed"),
        LaMambaDiffPipeline.from_checkpoint(tmp_path / "pushed"),
    ):
        pipe.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            made = pipe([1, 1], generator=generators).images
        assert np.array_equal(np.stack([np.asarray(image) for image in made]), images)


def test_a_single_step_is_enough_for_a_pipeline(teachers: dict[str, Path], tmp_path: Path) -> None:
    options = ["--steps", "1", "--num-images", "4", "--batch-size", "4", "--device", "cpu"]
    main(["distill", str(teachers["flow"]), "--out", str(tmp_path / "run"), *options])
    pipe = LaMambaDiffPipeline.from_checkpoint(tmp_path / "run")
    assert pipe(1, output_type="np").images.shape == (1, 32, 32, 1)


def test_exported_files_name_the_timesteps(students: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    onnx = pytest.importorskip("onnx")
    main(["export", str(students["diffusion"]), "--format", "onnx", "--out", str(tmp_path)])
    (entry,) = onnx.load(tmp_path / "network.onnx").metadata_props
    properties = json.loads(entry.value)
    assert (properties["sampler"], properties["timesteps"]) == ("ancestral-cosine", [999, 430, 257, 120])
    assert (properties["guidance_scale"], properties["guidance_included"]) == (1.0, 1.5)
    line = refused(capsys, "export", str(students["flow"]), "--guidance", "--out", str(tmp_path / "guided"))
    assert "this network was distilled for 4 steps of ancestral, guidance 1.5 included: leave --guidance out" in line


def test_info_says_how_a_student_is_sampled(
    students: dict[str, Path], teachers: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["info", str(students["flow"])])
    assert "This network was distilled for 4 steps of ancestral, guidance 1.5 included.\n" in capsys.readouterr().out
    main(["info", str(teachers["flow"])])
    assert "distilled" not in capsys.readouterr().out


def test_the_demo_asks_for_the_own_steps(students: dict[str, Path]) -> None:
    config = SamplingConfig(checkpoint=str(students["diffusion"]))
    model = ImageSampler(config, torch.device("cpu"))
    request = read_request({"labels": ["Coat"]}, model, DemoLimits()).config
    assert (request.sampler, request.steps, request.guidance) == ("ancestral-cosine", 4, 1.0)
    with pytest.raises(ConfigError, match=r"guidance 1\.5 included: choose another model"):
        compare_guidance(model, read_request({"labels": ["Coat"]}, model, DemoLimits()), [1.0, 2.0], DemoLimits())


def test_earlier_versions_refuse_students_alone(
    students: dict[str, Path], teachers: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = json.loads((checkpoints_in(teachers["flow"])[-1] / "checkpoint.json").read_text())
    assert record["format"] == 1
    assert "distilled" not in record
    monkeypatch.setattr(checkpoint, "DISTILLED_FORMAT", 1)
    load_checkpoint(teachers["flow"])
    with pytest.raises(CheckpointError, match="has format 2, this version reads 1: update lamamba"):
        load_checkpoint(students["flow"])


def test_a_damaged_record_is_one_line(students: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(checkpoints_in(students["flow"])[-1], tmp_path / "student")
    path = tmp_path / "student" / "checkpoint.json"
    record = json.loads(path.read_text())
    for wrong in ({"steps": 0}, {"sampler": "magic"}):
        path.write_text(json.dumps(record | {"distilled": record["distilled"] | wrong}))
        with pytest.raises(
            CheckpointError, match="it should have 1 to 1000 steps of ancestral, ancestral-cosine, ddim"
        ):
            load_checkpoint(tmp_path / "student")


def test_what_cannot_be_distilled_is_one_line(
    students: dict[str, Path], teachers: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def line(*arguments: str) -> str:
        text = refused(capsys, "distill", *arguments, "--out", str(tmp_path / "out"))
        assert not (tmp_path / "out").exists()
        return text

    assert "is a student already, distilled for 4 steps of ancestral" in line(str(students["flow"]))
    assert "--steps takes 1 or 2 or 4 or 8, not '3'" in line("nano", "--steps", "3")
    assert "no option is named --teacher-steps" in line("nano", "--teacher-steps", "64")
    assert "emoji-64 does not record the images that it was trained on: give them (--data)" in line("emoji-64")
    assert "'nanno' is neither a folder nor a preset: did you mean nano?" in line("nanno")
    assert "RUN" in line()
    assert "no option is named --objective" in line("nano", "--objective", "flow")
    assert "no option is named --optimizer" in line("nano", "--optimizer", "muon")
    for option, value in (("optimizer", "muon"), ("dropout", 0.1), ("min_snr_gamma", 5.0)):
        with pytest.raises(ConfigError, match=f"{option} is .* in a distillation"):
            DistillConfig(start_from="nano", out=tmp_path / "out", **{option: value})  # type: ignore[arg-type]
    unguided = train_teacher(tmp_path / "unguided", "--label-dropout", "0")
    assert 'it has never seen "no label", which guidance needs' in line(str(unguided), "--guidance", "2")
    message = f"{teachers['flow']} is no distillation: resume it with lamamba train"
    out = ["--out", str(teachers["flow"]), "--resume"]
    shutil.copy(teachers["flow"] / "config.json", tmp_path / "kept.json")
    record = json.loads((tmp_path / "kept.json").read_text())
    (teachers["flow"] / "config.json").write_text(json.dumps(record | {"start_from": "nano"}))
    assert message in refused(capsys, "distill", "nano", *out)
    shutil.copy(tmp_path / "kept.json", teachers["flow"] / "config.json")
    message = "started from fresh weights, not from nano: resume it with lamamba train"
    assert message in refused(capsys, "distill", "nano", *out)


def test_options_of_a_distillation_stay(students: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    run = students["flow"]
    line = refused(capsys, "train", "--out", str(run), "--resume", "--num-images", "64")
    assert "num_images was 32, now 64" in line
    teacher = read_train_config(run / "config.json").start_from
    line = refused(capsys, "distill", str(teacher), "--out", str(run), "--resume", "--guidance", "3", "--steps", "2")
    assert "steps was 4, now 2; guidance was 1.5, now 3.0" in line


def write_images(folder: Path, classes: tuple[str, ...], side: int = 16) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (4, side, side, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        path = folder / classes[index % len(classes)] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


def test_images_are_those_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = write_images(tmp_path / "images", ("bird", "fish"))
    options = ["--data", str(images), "--image-size", "16", "--horizontal-flip", "--objective", "flow"]
    teacher = train_teacher(tmp_path / "teacher", *options)
    config = complete(DistillConfig(start_from=str(teacher), out=tmp_path / "out"))
    assert (config.data, config.image_size, config.horizontal_flip) == (str(images), 16, True)
    assert (config.objective, config.network.label_dropout) == ("flow", 0.0)
    images.rename(tmp_path / "moved")
    with pytest.raises(DataError, match=r"the images that .* was trained on are gone from .*: give them \(--data\)"):
        complete(DistillConfig(start_from=str(teacher), out=tmp_path / "out"))
    arguments = ["distill", str(teacher), *SHORT, "--out", str(tmp_path / "run")]
    main([*arguments, "--data", str(tmp_path / "moved")])  # size and channels are the teacher's
    assert load_checkpoint(tmp_path / "run").info.class_names == ("bird", "fish")
    arguments[-1] = str(tmp_path / "other")
    others = write_images(tmp_path / "others", ("bird", "cat"))
    assert "has the class 'cat' where" in refused(capsys, *arguments, "--data", str(others))
    more = write_images(tmp_path / "more", ("a", "b", "c"))
    assert "has num_classes 3 and" in refused(capsys, *arguments, "--data", str(more))


def test_unconditional_networks_are_distilled_without_guidance(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(3):
        Image.fromarray(np.full((16, 16), 80 * index, np.uint8)).save(folder / f"{index}.png")
    options = ["--data", str(folder), "--image-size", "16", "--objective", "flow-x", "--channels", "1"]
    teacher = train_teacher(tmp_path / "teacher", *options)
    options = ["--num-images", "8", "--batch-size", "4", "--device", "cpu"]
    main(["distill", str(teacher), "--out", str(tmp_path / "run"), *options])
    assert load_checkpoint(tmp_path / "run").info.distilled == checkpoint.Distilled(4, "ancestral", 1.0)
    pipe = LaMambaDiffPipeline.from_checkpoint(tmp_path / "run")
    assert pipe(output_type="np").images.shape == (1, 16, 16, 1)


def test_latents_of_a_teacher_that_predicts_noise_are_noted(
    autoencoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for objective, is_noted in (("diffusion", True), ("flow", False)):
        options = ["--data", "builtin", "--vae", str(autoencoder), "--objective", objective]
        teacher = train_teacher(tmp_path / f"teacher-{objective}", *options)
        capsys.readouterr()
        options = ["--num-images", "4", "--batch-size", "4", "--device", "cpu"]
        main(["distill", str(teacher), "--out", str(tmp_path / objective), *options])
        said = " ".join(capsys.readouterr().out.split())
        assert ("it predicts noise, which has not been tested with latents" in said) == is_noted


def test_python_distills_like_the_command(students: dict[str, Path], tmp_path: Path) -> None:
    config = read_train_config(students["flow"] / "config.json")
    run = lamamba.distill(
        lamamba.DistillConfig(
            start_from=str(config.start_from), out=tmp_path / "run", num_images=32, batch_size=4, device="cpu",
            checkpoint_every=4, sample_every=32, distillation=DistillationOptions(guidance=1.5),
        )
    )  # fmt: skip
    expected, found = weights(students["flow"]), weights(run.folder)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert run.config.distillation == config.distillation
