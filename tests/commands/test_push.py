"""`lamamba push`: what is in the folder and its card, what arrives on a hub, and what comes back from there."""

import ast
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import diffusers
import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from PIL import Image
from safetensors.torch import load_file

from hub_server import TOKEN, Hub, Repository, running_hub
from lamamba import files
from lamamba.checkpoints.checkpoint import CheckpointInfo, load_checkpoint, write_weights
from lamamba.cli import main
from lamamba.commands.push import _code, _escaped
from lamamba.model import LaMambaDiff
from lamamba.sampling.pipeline import LaMambaDiffPipeline
from refusals import refusal

CLASSES = ("bird, large", "fish|flat", "newt")


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, autoencoder: Path) -> Path:
    """A run on latents, of built-in images as far as its configuration says, with a single checkpoint."""
    run = tmp_path_factory.mktemp("run of somebody")
    network = tiny_network(in_channels=2)
    info = CheckpointInfo(12345, 100, "flow", CLASSES, str(autoencoder))
    write_weights(run / "checkpoints" / "12345", network, info)
    files.write_json(run / "config.json", {"data": "fashion-mnist"})
    return run


def tiny_network(**options: int) -> LaMambaDiff:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tiny = {
            "in_channels": 1, "sample_size": 8, "num_classes": 3, "embed_dim": 8, "num_heads": 2,
            "depths": (1, 1, 1, 1), "bottleneck_depth": 1,
        }  # fmt: skip
        network = LaMambaDiff(**{**tiny, **options}).eval()
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return network


def images_of(pipe: LaMambaDiffPipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    images: torch.Tensor = pipe([0, 2], 3, generator=generator, output_type="pt").images
    return images


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    return refusal(capsys, lambda: main(["push", *arguments])).removeprefix("lamamba: error: ")


def card_of(folder: Path) -> tuple[dict[str, object], str]:
    _, header, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(header), text


@pytest.fixture(scope="module")
def written(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("written") / "below" / "tiny"
    main(["push", str(run), "--out", str(out), "--num-per-label", "2", "--license", "mit", "--device", "cpu"])
    return out


def test_what_is_written_gives_the_images_of_the_checkpoint(run: Path, written: Path) -> None:
    names = {path.relative_to(written).as_posix() for path in written.rglob("*") if path.is_file()}
    weights = "diffusion_pytorch_model.safetensors"
    assert names == {
        "README.md", "samples.png", "model_index.json", "scheduler/scheduler_config.json",
        "network/config.json", f"network/{weights}", "vae/config.json", f"vae/{weights}",
    }  # fmt: skip
    again = LaMambaDiffPipeline.from_pretrained(written, local_files_only=True)
    assert torch.equal(images_of(again), images_of(LaMambaDiffPipeline.from_checkpoint(run)))
    assert images_of(again).std() > 0.01
    assert again.config.images_seen == 12345
    assert not list(written.parent.glob(".*"))
    for path in written.rglob("*.json"):
        assert "/" not in path.read_text(), "no path of this machine is told"


def test_the_card_says_what_is_known_and_its_commands_work(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header, text = card_of(written)
    assert header == {
        "license": "mit", "library_name": "lamamba", "pipeline_tag": "unconditional-image-generation",
        "tags": ["diffusers", "diffusion", "mamba", "class-conditional"],
        "datasets": ["zalando-datasets/fashion_mnist"],
    }  # fmt: skip
    number = sum(parameter.numel() for parameter in tiny_network(in_channels=2).parameters())
    for said in (
        f"{number:,} parameters", "| weights | float32 |", "16x16, color; the network works on latents",
        "2 times smaller",
        "flow matching", "12,345 images seen", "| classes | bird, large, fish\\|flat, newt |",
    ):  # fmt: skip
        assert said in text
    assert "Scores" not in text, "nothing was measured"
    monkeypatch.chdir(written.parent)
    code = text.split("```python\n")[1].split("```")[0]
    found: dict[str, object] = {}
    exec(code, found)
    assert len(found["images"]) == 1  # type: ignore[arg-type]
    command = next(line for line in text.splitlines() if line.startswith("*Rows")).split("`")[1]
    main([*command.split()[1:-1], str(tmp_path / "again.png"), "--device", "cpu"])
    assert np.array_equal(Image.open(tmp_path / "again.png"), Image.open(written / "samples.png"))


def test_half_precision_is_half_as_large_and_hardly_another_image(run: Path, written: Path, tmp_path: Path) -> None:
    main(["push", str(run), "--out", str(tmp_path / "half"), "--half", "--num-per-label", "0"])
    for part in ("network", "vae"):
        state = load_file(tmp_path / "half" / part / "diffusion_pytorch_model.safetensors")
        assert {value.dtype for value in state.values()} == {torch.float16}
    _, text = card_of(tmp_path / "half")
    assert "| weights | float16 |" in text
    assert "samples.png" not in text
    half = LaMambaDiffPipeline.from_pretrained(tmp_path / "half", local_files_only=True)
    assert half.network.dtype == torch.float32
    wanted = images_of(LaMambaDiffPipeline.from_pretrained(written, local_files_only=True))
    assert 0 < (images_of(half) - wanted).norm() < 0.01 * wanted.norm()


def test_weights_beyond_float16_are_not_halved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = tiny_network()
    network.patch_norm.weight.data[0] = 1e5
    write_weights(tmp_path / "large", network, CheckpointInfo())
    said = fails(capsys, str(tmp_path / "large"), "--out", str(tmp_path / "out"), "--half")
    assert "weights of the network exceed the range of float16: leave half out" in said
    assert not (tmp_path / "out").exists()


def test_scores_are_told_with_what_makes_them_comparable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_weights(tmp_path / "pixels", tiny_network(), CheckpointInfo(images=500))
    result = {
        "scores": {"fd": 12.3456789, "precision": 0.75}, "warnings": ["only 100 images"], "lamamba": "0.1.0",
        "features": {"name": "clothes", "sha256": "0123456789abcdef"},
        "generated": {"images": 100}, "reference": {"name": "/home/somebody/birds", "images": 2000},
        "generation": {"sampler": "ddim", "steps": 20, "guidance": 3.0, "guidance_rescale": 0.0, "images_seen": 500},
    }  # fmt: skip
    scores = tmp_path / "scores.json"
    scores.write_text(json.dumps(result))
    arguments = [str(tmp_path / "pixels"), "--scores", str(scores), "--dataset", "somebody/birds"]
    main(["push", *arguments, "--num-per-label", "0", "--out", str(tmp_path / "out")])
    header, text = card_of(tmp_path / "out")
    assert header["datasets"] == ["somebody/birds"]
    for said in (
        "100 generated images (sampler ddim, steps 20, guidance 3.0) with 2,000 images of birds, using the features "
        "clothes (sha256 0123456789ab)", "| fd | 12.346 |", "| precision | 0.75 |", "* only 100 images",
        "8x8, gray", "| classes | 0, 1, 2 |",
    ):  # fmt: skip
        assert said in text
    assert "/home" not in text
    scores.write_text(json.dumps({**result, "generation": {"images_seen": 400}}))
    said = fails(capsys, *arguments, "--out", str(tmp_path / "other"))
    assert "of weights that had seen 400 images, but these have seen 500" in said
    scores.write_text("{}")
    assert "scores.json: scores is missing" in fails(capsys, *arguments, "--out", str(tmp_path / "other"))


MARKDOWN = (
    "<script>", "a|b", "`c`", "*d*", "$e$", "&lt;", "![f](g)", ":smile:", "-h", "1.i", "j\nk", "~~l~~", "@m", "#1",
    "\\n", "+o", "=p",
)  # fmt: skip


@pytest.mark.parametrize("name", [*MARKDOWN, "- q", "1. r", "# s", " ".join(MARKDOWN)])
def test_names_are_no_markdown(name: str) -> None:
    shown = name.replace("\n", "\\n")
    document = (
        f"| classes | {_escaped(name)} |\n| --- | --- |\n\n{_escaped(name)}\n\n# {_escaped(name)}\n\n{_code(shown)}\n"
    )
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(document)
    parts = [[(part.type, part.content) for part in token.children] for token in tokens if token.type == "inline"]
    texts = [["".join(content for _, content in part)] for part in parts]
    assert texts == [["classes"], [shown], [shown], [shown], [shown]]
    kinds = {kind for part in parts[:-1] for kind, _ in part}
    assert kinds <= {"text", "text_special"}
    assert [kind for kind, _ in parts[-1]] == ["code_inline"]


def test_a_card_of_names_that_mean_something_elsewhere(tmp_path: Path) -> None:
    names = ("it's <b>", "b|c", os.fsdecode(b"\xff"))
    write_weights(tmp_path / "named", tiny_network(), CheckpointInfo(class_names=names))
    out = tmp_path / "my `new` $(model)"
    main(["push", str(tmp_path / "named"), "--out", str(out), "--num-per-label", "0", "--license", "--- x"])
    header, text = card_of(out)
    assert header["license"] == "--- x"
    assert "| classes | it's \\<b\\>, b\\|c, \\\\xff |" in text
    command = next(line for line in text.splitlines() if line.startswith("    lamamba sample"))
    assert shlex.split(command)[:5] == ["lamamba", "sample", out.name, "--labels", "it's <b>"]
    call = next(line for line in text.splitlines() if line.startswith("images ="))
    assert ast.literal_eval(call.split("class_labels=")[1].split(", num")[0]) == ["it's <b>"]
    again = LaMambaDiffPipeline.from_pretrained(out, local_files_only=True)
    assert list(again.labels) == list(names)


def test_an_unconditional_network_has_a_card_too(tmp_path: Path) -> None:
    write_weights(tmp_path / "plain", tiny_network(num_classes=0), CheckpointInfo())
    main(["push", str(tmp_path / "plain"), "--out", str(tmp_path / "out"), "--num-per-label", "1", "--device", "cpu"])
    header, text = card_of(tmp_path / "out")
    assert header["tags"] == ["diffusers", "diffusion", "mamba"]
    assert "license" not in header
    assert "datasets" not in header
    assert "pipe(num_inference_steps=25)" in text
    assert "images seen" not in text


def run_client(hub: Hub, folder: Path, script: str) -> str:
    """Run Python with the hub's settings in the environment, where users have them, and return what it printed."""
    settings = {
        "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_CACHE": str(folder / "cache"),
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **settings}, capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_a_pipeline_comes_back_from_the_hub(
    hub: Hub, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All by a real client over HTTP: send, load, sample, finetune, and again from the cache without the hub."""
    hub.repositories["tester/foreign"] = Repository(False, {"main": {
        "model_index.json": b'{"_class_name": "StableDiffusionPipeline"}', "unet/model.safetensors": b"large",
    }})  # fmt: skip
    sample = ["sample", "tester/tiny", "--labels", "newt", "--num-per-label", "1", "--steps", "2"]
    said = run_client(hub, tmp_path, f"""
import torch, lamamba
from lamamba import files
from lamamba.cli import main
options = [{str(run)!r}, "tester/tiny", "--num-per-label", "0"]
main(["push", *options, "--private", "--branch", "early", "--license", "mit"])
main(["push", *options, "--half"])
pipe = lamamba.LaMambaDiffPipeline.from_pretrained("tester/tiny", revision="early")
images = pipe([0, 2], 3, generator=torch.Generator().manual_seed(3), output_type="pt").images
torch.save(images, "images.pt")
main({sample})
main(["finetune", "tester/tiny", "--data", "builtin", "--out", "unused", "--channels", "3", "--dry-run"])
for name in ("tester/foreign", "tester/none"):
    try:
        main(["sample", name])
    except SystemExit:
        pass
""")  # fmt: skip
    assert f"{hub.endpoint}/tester/tiny/tree/early\n" in said
    assert f"{hub.endpoint}/tester/tiny\n" in said
    assert "'objective': 'flow'" in said.replace('"', "'"), "what is finetuned is the pipeline's"
    assert "tester/foreign on the Hugging Face hub is a StableDiffusionPipeline: only LaMambaDiffPipeline, " in said
    assert "tester/none, which is not a local path, could not be requested from http://127.0.0.1" in said
    assert not [request for request in hub.requests if "unet" in request]
    repository = hub.repositories["tester/tiny"]
    assert repository.private
    weights = "diffusion_pytorch_model.safetensors"
    early, newest = repository.branches["early"], repository.branches["main"]
    assert set(early) == set(newest) == {
        "README.md", "model_index.json", "scheduler/scheduler_config.json", "network/config.json", f"network/{weights}",
        "vae/config.json", f"vae/{weights}",
    }  # fmt: skip
    assert len(newest[f"network/{weights}"]) < 0.7 * len(early[f"network/{weights}"])
    assert b"license: mit" in early["README.md"]
    assert b"from_pretrained('tester/tiny')" in newest["README.md"]
    assert torch.equal(torch.load(tmp_path / "images.pt"), images_of(LaMambaDiffPipeline.from_checkpoint(run)))

    grid = (tmp_path / "grid.png").read_bytes()
    (tmp_path / "grid.png").unlink()
    num_asked = len(hub.requests)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    main(sample)
    assert (tmp_path / "grid.png").read_bytes() == grid
    assert len(hub.requests) == num_asked
    assert not [request for request in hub.unanswered if "agent-harnesses" not in request]  # which the client tries


@pytest.fixture
def client(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """The hub's client in this process, as far as it sends: addresses to fetch from are fixed when it is imported."""
    settings = {"ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": True}
    for name, value in settings.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return monkeypatch


def test_a_folder_with_a_card_is_sent_as_it_is(
    hub: Hub, client: pytest.MonkeyPatch, written: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "half has no effect" in fails(capsys, str(written), "tester/asis", "--half")
    main(["push", str(written), "tester/asis"])
    repository = hub.repositories["tester/asis"]
    assert not repository.private
    assert repository.branches["main"] == {
        path.relative_to(written).as_posix(): path.read_bytes() for path in written.rglob("*") if path.is_file()
    }
    capsys.readouterr()
    assert "tester/asis exists and is public" in fails(capsys, str(written), "tester/asis", "--private")


@pytest.mark.parametrize(
    ("name", "token", "said"),
    [
        ("tester/x", None, "needs a token: log in (`hf auth login`), or set HF_TOKEN"),
        ("tester/x", "hf_old", "tester/x could not be requested from"),
        ("somebody/x", TOKEN, "or HF_TOKEN) with access to it, or write the folder with --out"),
        ("tester/x--y", TOKEN, "Cannot have -- or .. in repo_id: 'tester/x--y'"),
        ("x", TOKEN, "repository 'x' is not of the form USER/NAME"),
    ],
)
def test_refusals_are_one_line_before_any_work(
    client: pytest.MonkeyPatch, run: Path, capsys: pytest.CaptureFixture[str], name: str, token: str | None, said: str
) -> None:
    if token is None:
        client.delenv("HF_TOKEN")
    else:
        client.setenv("HF_TOKEN", token)
    client.setattr("lamamba.commands.push._write_pipeline", lambda *_, **__: pytest.fail("it was written"))
    assert said in fails(capsys, str(run), name)


def test_a_hub_that_cannot_be_reached_is_named(
    client: pytest.MonkeyPatch, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    said = fails(capsys, str(run), "tester/x")
    assert "tester/x could not be requested from http://127.0.0.1:9 (" in said
    assert "write the folder with --out, and upload it later" in said
    client.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit):
        main(["sample", "tester/unheard-of"])
    said = capsys.readouterr().err
    assert "tester/unheard-of, which is not a local path, could not be requested" in said
    assert "unset HF_HUB_OFFLINE" in said


def test_a_card_that_the_hub_refuses_is_said(
    client: pytest.MonkeyPatch, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = fails(capsys, str(run), "tester/y", "--license", "unheard-of", "--num-per-label", "0")
    assert 'Invalid metadata in README.md. - "license" must be one of [mit, other]' in said


def test_a_path_below_a_folder_never_asks_the_hub(
    client: pytest.MonkeyPatch, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").mkdir()
    client.chdir(tmp_path)
    hub.requests.clear()
    for name in ("runs/mistyped", "/tester/tiny", "tester/tiny/checkpoints"):
        with pytest.raises(SystemExit):
            main(["sample", name])
        assert f"{name} does not exist" in capsys.readouterr().err
    assert not hub.requests


def test_what_cannot_be_pushed_is_said(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "give --out FOLDER to write the pipeline there, or USER/NAME of a repository" in fails(capsys, str(run))
    assert f"out {tmp_path} exists already" in fails(capsys, str(run), "--out", str(tmp_path))
    write_weights(tmp_path / "latents", tiny_network(in_channels=2), CheckpointInfo())
    said = fails(capsys, str(tmp_path / "latents"), "--out", str(tmp_path / "out"))
    assert "samples latents with 2 channels: give the folder" in said


def test_commands_take_a_pipeline_whose_scheduler_is_another(run: Path, written: Path, tmp_path: Path) -> None:
    """What `lamamba sample` draws depends on its own options; the scheduler in the folder stays where it is."""
    pipe = LaMambaDiffPipeline.from_pretrained(written, local_files_only=True)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path / "euler")
    for name, source in (("checkpoint", run), ("pipeline", tmp_path / "euler")):
        main([
            "sample", str(source), "--labels", "newt,fish|flat", "--steps", "3", "--num-per-label", "1", "--device",
            "cpu", "--out", str(tmp_path / f"{name}.png"),
        ])  # fmt: skip
    drawn = [Image.open(tmp_path / f"{name}.png") for name in ("checkpoint", "pipeline")]
    assert np.array_equal(*drawn)
    settings = [json.loads(image.info["lamamba"]) for image in drawn]
    assert settings[0]["images_seen"] == settings[1]["images_seen"] == 12345
    main(["push", str(tmp_path / "euler"), "--out", str(tmp_path / "again"), "--num-per-label", "0"])
    again = LaMambaDiffPipeline.from_pretrained(tmp_path / "again", local_files_only=True)
    assert type(again.scheduler) is diffusers.FlowMatchEulerDiscreteScheduler
    assert load_checkpoint(tmp_path / "again").info.class_names == CLASSES
