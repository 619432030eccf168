"""`lamamba convert`: released checkpoints to folders that can be sampled, and back, to the last bit."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lamamba.checkpoints.checkpoint import load_checkpoint
from lamamba.checkpoints.released import load_released, read_released, save_released
from lamamba.cli import main
from lamamba.config import PRESETS
from lamamba.model import LaMambaDiff
from refusals import refusal

GEOMETRY = {"embed_dim": 8, "num_heads": 2, "window_size": 4, "ssm_state_size": 2}
OPTIONS = [word for name, value in GEOMETRY.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def build(seed: int) -> LaMambaDiff:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = LaMambaDiff(**GEOMETRY, in_channels=1, sample_size=16, num_classes=3)
        for parameter in network.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return network.eval()


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("released") / "0400000.pt"
    save_released(path, model=build(0), ema=build(1))
    return path


def assert_same(one: LaMambaDiff, other: LaMambaDiff) -> None:
    assert one.config.sample_size == other.config.sample_size
    state, wanted = one.state_dict(), other.state_dict()
    assert sorted(state) == sorted(wanted)
    assert all(torch.equal(state[name], value) for name, value in wanted.items())


def states_in(path: Path) -> dict[str, dict[str, Tensor]]:
    content: dict[str, dict[str, Tensor]] = torch.load(path, weights_only=True)
    return content


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    return refusal(capsys, lambda: main(["convert", *map(str, arguments)]))


def test_there_and_back_to_the_last_bit(released: Path, tmp_path: Path) -> None:
    folder, again = tmp_path / "folder", tmp_path / "again.pt"
    main(["convert", str(released), str(folder), *OPTIONS])
    assert_same(load_checkpoint(folder, "network").network, build(0))
    assert_same(load_checkpoint(folder, "ema").network, build(1))
    main(["convert", str(folder), str(again)])
    before, after = states_in(released), states_in(again)
    assert list(before) == list(after) == ["model", "ema"]
    for weights, state in before.items():
        assert sorted(after[weights]) == sorted(state)
        for name, value in state.items():
            assert after[weights][name].dtype == value.dtype
            assert torch.equal(after[weights][name], value), name
    assert not list(tmp_path.glob(".incomplete*"))


def test_what_was_converted_is_sampled_as_the_network_it_was(released: Path, tmp_path: Path) -> None:
    main(["convert", str(released), str(tmp_path / "folder"), *OPTIONS])
    build(1).save_pretrained(tmp_path / "network")
    for name in ("folder", "network"):
        options = ["--steps", "2", "--device", "cpu", "--labels", "2", "--out", str(tmp_path / f"{name}.png")]
        main(["sample", str(tmp_path / name), *options])
    converted, wanted = (np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("folder", "network"))
    assert np.abs(converted - wanted).max() <= 1
    assert wanted.std() > 1


def test_the_shipped_weights_have_a_released_form(tmp_path: Path) -> None:
    main(["convert", "nano", str(tmp_path / "nano.pt")])
    states = read_released(tmp_path / "nano.pt")
    assert all(value.dtype in (torch.float32, torch.int64) for value in states["ema"].values())
    nano = load_checkpoint("nano").network
    for weights in ("model", "ema"):
        assert_same(load_released(tmp_path / "nano.pt", weights, **vars(PRESETS["nano"])), nano.float())


def test_a_preset_says_the_network_of_a_released_checkpoint(tmp_path: Path) -> None:
    main(["convert", "nano", str(tmp_path / "nano.pt")])
    main(["convert", str(tmp_path / "nano.pt"), str(tmp_path / "nano"), "--preset", "nano"])
    assert_same(load_checkpoint(tmp_path / "nano").network, load_checkpoint("nano").network.float())
    main(["convert", str(tmp_path / "nano" / "ema"), str(tmp_path / "again.pt")])
    first, again = states_in(tmp_path / "nano.pt"), states_in(tmp_path / "again.pt")
    assert all(torch.equal(again["model"][name], value) for name, value in first["model"].items())


@pytest.mark.parametrize("weights", ["model", "ema", "bare"])
def test_a_file_of_one_kind_of_weights_becomes_the_averaged(released: Path, tmp_path: Path, weights: str) -> None:
    state = states_in(released)["ema"]
    torch.save(state if weights == "bare" else {weights: state}, tmp_path / "one.pt")
    main(["convert", str(tmp_path / "one.pt"), str(tmp_path / "folder"), *OPTIONS])
    assert_same(load_checkpoint(tmp_path / "folder").network, build(1))
    assert not (tmp_path / "folder" / "network").exists()


def test_the_autoencoder_is_kept_with_the_weights(released: Path, tmp_path: Path, autoencoder: Path) -> None:
    main(["convert", str(released), str(tmp_path / "folder"), *OPTIONS, "--vae", str(autoencoder)])
    assert json.loads((tmp_path / "folder" / "checkpoint.json").read_text())["vae"] == str(autoencoder.resolve())


def test_what_cannot_be_is_one_line(released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert "does not fit this network, give its options" in refused(capsys, released, out)
    assert "no preset is named 'xl': did you mean" in refused(capsys, released, out, "--preset", "xl")
    assert "is the name of a file, but the result is a folder" in refused(
        capsys, released, tmp_path / "out.pt", *OPTIONS
    )
    assert "holds no autoencoder" in refused(capsys, released, out, *OPTIONS, "--vae", tmp_path)
    assert "does not end in .pt" in refused(capsys, "nano", out)
    assert "preset has no effect, because nano is not of the authors' code" in refused(
        capsys, "nano", tmp_path / "out.pt", "--preset", "nano"
    )
    assert "did you mean nano?" in refused(capsys, "nanno", tmp_path / "out.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    assert "cannot be read as a PyTorch checkpoint" in refused(capsys, tmp_path / "text.pt", out)
    assert [path.name for path in tmp_path.iterdir()] == ["text.pt"]
    assert "exists already" in refused(capsys, released, tmp_path, *OPTIONS)


def test_names_that_wrappers_prefix_are_read(released: Path) -> None:
    state = states_in(released)["ema"]
    for prefix in ("_orig_mod.", "module.", "_orig_mod.module.", "module._orig_mod.", "_fsdp_wrapped_module."):
        wrapped = {prefix + name: value for name, value in state.items()}
        assert_same(load_released(wrapped, in_channels=1, sample_size=16, num_classes=3, **GEOMETRY), build(1))
    wrapped = {name.replace(".blocks.0.", ".blocks.0._orig_mod."): value for name, value in state.items()}
    assert_same(load_released(wrapped, in_channels=1, sample_size=16, num_classes=3, **GEOMETRY), build(1))


def test_the_format_before_zip_files_is_read(released: Path, tmp_path: Path) -> None:
    states = {
        part: {f"_orig_mod.{name}": value for name, value in state.items()}
        for part, state in states_in(released).items()
    }
    torch.save(states, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    main(["convert", str(tmp_path / "old.pt"), str(tmp_path / "folder"), *OPTIONS])
    assert_same(load_checkpoint(tmp_path / "folder", "network").network, build(0))
    assert_same(load_checkpoint(tmp_path / "folder", "ema").network, build(1))


def test_a_name_with_and_without_a_prefix_is_refused(
    released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = states_in(released)["ema"]
    torch.save({**state, "module.pos_embed": state["pos_embed"]}, tmp_path / "both.pt")
    said = refused(capsys, tmp_path / "both.pt", tmp_path / "folder", *OPTIONS)
    assert "both.pt has pos_embed twice, under names with and without the prefix of a wrapper" in said


def test_a_pickle_that_names_code_is_refused_in_our_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "evil.pt"
    path.write_bytes(b"cos\nsystem\n(S'touch " + bytes(tmp_path / "done") + b"'\ntR.")
    said = refused(capsys, path, tmp_path / "folder", *OPTIONS)
    assert f"{path} refers to os.system, which is code and does not belong in weights: it was not run" in said
    assert "weights_only" not in said
    assert sorted(tmp_path.iterdir()) == [path]


def test_weights_that_are_not_finite_are_refused(
    released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {name: value.clone() for name, value in states_in(released)["ema"].items()}
    state["final_linear.bias"][0] = float("inf")
    torch.save(state, tmp_path / "broken.pt")
    assert "1 not finite (head.output.bias)" in refused(capsys, tmp_path / "broken.pt", tmp_path / "out", *OPTIONS)
