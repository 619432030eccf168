"""Averages of any length come out of a few stored ones, and a damaged snapshot is named."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lamamba.training.averages
from lamamba.checkpoints.checkpoint import CheckpointInfo, load_checkpoint
from lamamba.cli import main
from lamamba.config import AverageConfig
from lamamba.errors import CheckpointError
from lamamba.training.averages import (
    MAX_RESIDUAL,
    MAX_SIGMA_REL,
    PowerAverages,
    cosines,
    fit_profile,
    gamma_of,
    reconstruct,
    save_snapshot,
    snapshots_in,
)
from small_network import TINY_NETWORK

STEPS, EVERY, BATCH = 400, 50, 8


class Walk(nn.Module):
    """Weights of a size near 1 that wander."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16, 3))
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("buffer", torch.ones(2))
        self.generator = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def step(self) -> None:
        for parameter in self.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=self.generator)


def walk(
    averages: Callable[[nn.Module], PowerAverages], after: Callable[[PowerAverages, int], object] | None = None
) -> tuple[PowerAverages, dict[str, Tensor]]:
    """Walk all steps; returns the averages and (steps, ...) float64 weights after each step."""
    module = Walk()
    tracked = averages(module)
    seen: dict[str, list[Tensor]] = {name: [] for name, _ in module.named_parameters()}
    for step in range(1, STEPS + 1):
        module.step()
        tracked.update(module, step)
        for name, parameter in module.named_parameters():
            seen[name].append(parameter.detach().double().clone())
        if after is not None:
            after(tracked, step)
    return tracked, {name: torch.stack(values) for name, values in seen.items()}


def of_length(averages: PowerAverages, sigma_rel: float) -> dict[str, Tensor]:
    prefix = f"{sigma_rel:.3f}."
    return {
        name.removeprefix(prefix): value for name, value in averages.state_dict().items() if name.startswith(prefix)
    }


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Root of the mean square over all weights."""
    assert a.keys() == b.keys()
    return float(torch.cat([(a[name].double() - b[name].double()).flatten() for name in a]).square().mean().sqrt())


@pytest.fixture(scope="module", params=[torch.float16, torch.float32], ids=["float16", "float32"])
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.dtype]:
    run = tmp_path_factory.mktemp("run")

    def save(averages: PowerAverages, step: int) -> None:
        if step % EVERY == 0:
            save_snapshot(run, averages.state_dict(), step, step * BATCH, request.param)

    walk(PowerAverages, save)
    return run, request.param


def small_run(run: Path, num_snapshots: int = 1) -> Path:
    module = Walk()
    averages = PowerAverages(module)
    for step in range(1, num_snapshots + 1):
        module.step()
        averages.update(module, step)
        path = save_snapshot(run, averages.state_dict(), step, step * BATCH)
    return path


@pytest.mark.parametrize("sigma_rel", [1e-6, 0.01, 0.05, 0.1, 0.2, 0.28, MAX_SIGMA_REL])
def test_length_and_exponent_are_inverse(sigma_rel: float) -> None:
    gamma = gamma_of(sigma_rel)
    assert math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2) == pytest.approx(sigma_rel, rel=1e-9)


def test_known_lengths() -> None:
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005)
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.005)
    assert gamma_of(MAX_SIGMA_REL) == pytest.approx(0, abs=1e-6)
    # The length is the standard deviation of the profile on [0, 1].
    tau = (np.arange(200_000) + 0.5) / 200_000
    profile = (gamma_of(0.07) + 1) * tau ** gamma_of(0.07)
    mean = (profile * tau).mean()
    assert math.sqrt((profile * (tau - mean) ** 2).mean()) == pytest.approx(0.07, rel=1e-6)


@pytest.mark.parametrize("sigma_rel", [0, -0.1, 0.29, math.nan])
def test_lengths_out_of_range(sigma_rel: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sigma_rel"):
        gamma_of(sigma_rel)
    with pytest.raises(ValueError, match="sigma_rel"):
        PowerAverages(Walk(), (0.05, sigma_rel))
    with pytest.raises(CheckpointError, match="sigma_rel"):
        reconstruct(tmp_path, sigma_rel)


@pytest.mark.parametrize("sigma_rels", [(), (0.05, 0.05), (0.0505,)])
def test_lengths_that_could_not_be_told_apart(sigma_rels: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="sigma_rel"):
        PowerAverages(Walk(), sigma_rels)


@pytest.mark.parametrize("a", [(16.97, 1000.0), (6.94, 1000.0), (0.0, 400.0)])
@pytest.mark.parametrize("b", [(16.97, 1000.0), (3.2, 250.0)])
def test_inner_products_against_quadrature(a: tuple[float, float], b: tuple[float, float]) -> None:
    tau = (np.arange(1_000_000) + 0.5) / 1000

    def profile(gamma: float, steps: float) -> np.ndarray:
        return np.where(tau <= steps, (gamma + 1) / steps * (np.minimum(tau, steps) / steps) ** gamma, 0)

    p, q = profile(*a), profile(*b)
    wanted = (p @ q) / math.sqrt((p @ p) * (q @ q))
    arrays = [np.array(number) for number in (*a, *b)]
    assert cosines(*arrays) == pytest.approx(wanted, rel=1e-6)


def test_long_runs_do_not_overflow() -> None:
    gammas, steps = np.array([gamma_of(0.01), gamma_of(0.25)] * 3), np.repeat([1.0, 5e5, 1e6], 2)
    fit = fit_profile(gammas, steps, gamma_of(0.1), 1e6)
    assert np.isfinite(fit.weights).all()
    assert math.isfinite(fit.residual)


def test_the_fit_is_the_best_with_a_sum_of_one() -> None:
    # Against the same problem on a fine grid, solved with one unknown less in place of the constraint.
    gammas, steps = np.tile([gamma_of(0.05), gamma_of(0.1)], 4), np.repeat([100.0, 200.0, 300.0, 400.0], 2)
    tau = (np.arange(400_000) + 0.5) / 1000
    profiles = np.stack(
        [np.where(tau <= t, (g + 1) / t * (tau / t) ** g, 0) for g, t in zip(gammas, steps, strict=True)], axis=1
    )
    gamma = gamma_of(0.15)
    wanted = (gamma + 1) / 400 * (tau / 400) ** gamma
    others = np.linalg.lstsq(profiles[:, 1:] - profiles[:, :1], wanted - profiles[:, 0], rcond=None)[0]
    fit = fit_profile(gammas, steps, gamma, 400)
    np.testing.assert_allclose(fit.weights, [1 - others.sum(), *others], atol=1e-5)
    residual = np.linalg.norm(wanted - profiles @ fit.weights) / np.linalg.norm(wanted)
    assert fit.residual == pytest.approx(residual, rel=1e-4)
    assert fit.weights.sum() == pytest.approx(1, abs=1e-12)


def test_the_fit_of_a_stored_profile_is_that_one() -> None:
    gammas, steps = np.tile([gamma_of(0.05), gamma_of(0.1)], 100), np.repeat(np.arange(1.0, 101.0), 2)
    fit = fit_profile(gammas, steps, gamma_of(0.05), 100)
    assert np.array_equal(fit.weights, np.eye(200)[198])
    assert fit.residual == 0


def test_updates_are_the_weighted_sum_of_all_steps() -> None:
    lengths = (0.05, 0.1, 0.2)
    averages, seen = walk(lambda module: PowerAverages(module, lengths))
    for length in lengths:
        # The weight of step k is the integral of the profile over (k - 1, k].
        rising = torch.arange(STEPS + 1, dtype=torch.float64).div(STEPS) ** (gamma_of(length) + 1)
        for name, value in of_length(averages, length).items():
            wanted = torch.tensordot(rising.diff(), seen[name], 1)
            torch.testing.assert_close(value.double(), wanted, rtol=0, atol=2e-6)


def test_the_first_step_is_taken_whole() -> None:
    module = Walk()
    averages = PowerAverages(module)
    module.step()
    averages.update(module, 1)
    for name, parameter in module.named_parameters():
        assert torch.equal(averages.state_dict()[f"0.050.{name}"], parameter)
        assert not averages.state_dict()[f"0.050.{name}"].requires_grad
    with pytest.raises(ValueError, match="count steps from 1"):
        averages.update(module, 0)


def test_weights_in_bfloat16_are_averaged_in_float32() -> None:
    module = Walk().bfloat16()
    averages = PowerAverages(module)
    module.step()
    averages.update(module, 1000)
    assert {value.dtype for value in averages.state_dict().values()} == {torch.float32}
    assert not torch.equal(averages.state_dict()["0.050.weight"], torch.ones(16, 3))


@pytest.mark.parametrize(("sigma_rel", "end"), [(0.04, STEPS), (0.07, STEPS), (0.15, STEPS), (0.07, STEPS // 2)])
def test_a_length_that_was_not_stored(stored: tuple[Path, torch.dtype], sigma_rel: float, end: int) -> None:
    run, _ = stored
    tracked: dict[str, Tensor] = {}

    def keep(averages: PowerAverages, step: int) -> None:
        if step == end:
            tracked.update({name: value.clone() for name, value in of_length(averages, sigma_rel).items()})

    walk(lambda module: PowerAverages(module, (sigma_rel,)), keep)
    error = distance(reconstruct(run, sigma_rel, end * BATCH), tracked)
    held = load_file(run / "averages" / f"{end * BATCH:012d}.safetensors")
    nearest = min(
        distance({name[6:]: value for name, value in held.items() if name.startswith(prefix)}, tracked)
        for prefix in ("0.050.", "0.100.")
    )
    assert error < 1e-3
    assert error < nearest / 8


def test_a_stored_length_is_as_stored(stored: tuple[Path, torch.dtype]) -> None:
    run, _ = stored
    for images in (None, 200 * BATCH):
        held = load_file(run / "averages" / f"{images or STEPS * BATCH:012d}.safetensors")
        for length in (0.05, 0.1):
            weights = reconstruct(run, length, images)
            assert weights.keys() == {"weight", "scale"}
            assert all(
                torch.equal(value, held[f"{length:.3f}.{name}"].float()) and value.dtype == torch.float32
                for name, value in weights.items()
            )


def test_what_does_not_change_comes_out_as_it_is(tmp_path: Path) -> None:
    module = Walk()
    averages = PowerAverages(module)
    for step in range(1, 5):
        averages.update(module, step)
        save_snapshot(tmp_path, averages.state_dict(), step, step * BATCH)
    torch.testing.assert_close(reconstruct(tmp_path, 0.07), of_length(averages, 0.05), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("sigma_rel", "end"), [(0.02, STEPS), (0.25, STEPS), (0.2, EVERY)])
def test_lengths_that_are_out_of_reach(stored: tuple[Path, torch.dtype], sigma_rel: float, end: int) -> None:
    run, _ = stored
    with pytest.raises(CheckpointError, match=f"sigma_rel {sigma_rel} .*residual.*closer to 0.050, 0.100") as error:
        reconstruct(run, sigma_rel, end * BATCH)
    assert "\n" not in str(error.value)


def test_rounding_that_would_be_amplified(tmp_path: Path) -> None:
    # Many snapshots fit a much shorter profile well, with large weights of both signs.
    for dtype in (torch.float16, torch.float32):
        module, run = Walk(), tmp_path / str(dtype)
        averages = PowerAverages(module)
        for step in range(1, 101):
            averages.update(module, step)
            save_snapshot(run, averages.state_dict(), step, step, dtype)
    gammas, steps = np.tile([gamma_of(0.05), gamma_of(0.1)], 100), np.repeat(np.arange(1.0, 101.0), 2)
    assert fit_profile(gammas, steps, gamma_of(0.015), 100).residual < MAX_RESIDUAL
    with pytest.raises(CheckpointError, match="rounding error"):
        reconstruct(tmp_path / "torch.float16", 0.015)
    assert reconstruct(tmp_path / "torch.float32", 0.015)["scale"] == pytest.approx(1, abs=1e-4)


def test_snapshots_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no snapshot"):
        reconstruct(tmp_path, 0.05)
    small_run(tmp_path, 3)
    assert [int(path.stem) for path in snapshots_in(tmp_path)] == [8, 16, 24]
    with pytest.raises(CheckpointError, match="no snapshot of 17 images: the nearest has 16"):
        reconstruct(tmp_path, 0.05, 17)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip(path: Path, position: int = -10) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    save_file({"0.050.weight": torch.ones(3)}, path)


def rename(path: Path) -> None:
    path.rename(path.with_name(f"{24:012d}.safetensors"))


@pytest.mark.parametrize("damage", [truncate, flip, empty, foreign])
def test_a_damaged_snapshot_is_named(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    small_run(tmp_path, 8)
    path = snapshots_in(tmp_path)[-2]
    reconstruct(tmp_path, 0.07)
    damage(path)
    with pytest.raises(CheckpointError, match=f"{path} is damaged") as error:
        reconstruct(tmp_path, 0.07)
    assert "\n" not in str(error.value)


def test_no_flipped_bit_goes_unseen(tmp_path: Path) -> None:
    path = small_run(tmp_path)
    for position in range(path.stat().st_size):
        flip(path, position)
        with pytest.raises(CheckpointError, match=str(path)):
            reconstruct(tmp_path, 0.05)
        flip(path, position)
    reconstruct(tmp_path, 0.05)


def test_a_snapshot_under_another_name(tmp_path: Path) -> None:
    rename(small_run(tmp_path))
    with pytest.raises(CheckpointError, match="states 8 images"):
        reconstruct(tmp_path, 0.05)


def test_a_later_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(lamamba.training.averages, "FORMAT", 99)
        small_run(tmp_path)
    with pytest.raises(CheckpointError, match="update lamamba"):
        reconstruct(tmp_path, 0.05)


def test_snapshots_of_different_networks(tmp_path: Path) -> None:
    small_run(tmp_path, 2)
    other = PowerAverages(nn.Linear(3, 3))
    path = save_snapshot(tmp_path, other.state_dict(), 1, BATCH)
    with pytest.raises(CheckpointError, match=f"{path} and .* different networks"):
        reconstruct(tmp_path, 0.05)


def test_a_full_disk_leaves_what_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = small_run(tmp_path)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for images in (BATCH, 2 * BATCH):
        with pytest.raises(CheckpointError, match="could not be written"):
            save_snapshot(tmp_path, PowerAverages(Walk()).state_dict(), 2, images)
    assert [(each.name, each.read_bytes()) for each in path.parent.iterdir()] == [(path.name, before)]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "averages").write_text("")
    with pytest.raises(CheckpointError, match="could not be written"):
        small_run(tmp_path)


def test_what_was_not_finished_is_ignored_and_the_same_images_replaced(tmp_path: Path) -> None:
    path = small_run(tmp_path)
    path.with_name(f".incomplete-{16:012d}.safetensors").write_bytes(b"")
    assert snapshots_in(tmp_path) == [path]
    averages = PowerAverages(nn.Linear(2, 1))
    assert save_snapshot(tmp_path, averages.state_dict(), 1, BATCH) == path
    assert save_snapshot(tmp_path, averages.state_dict(), 1, 2 * BATCH).parent == path.parent
    assert sorted(each.name for each in path.parent.iterdir()) == [f"{images:012d}.safetensors" for images in (8, 16)]
    assert reconstruct(tmp_path, 0.05).keys() == {"weight", "bias"}


def test_weights_that_float16_cannot_hold(tmp_path: Path) -> None:
    module = Walk()
    nn.init.constant_(module.weight, 1e5)
    with pytest.raises(CheckpointError, match=r"0\.050\.weight is not finite"):
        save_snapshot(tmp_path, PowerAverages(module).state_dict(), 1, BATCH)
    assert not snapshots_in(tmp_path)
    save_snapshot(tmp_path, PowerAverages(module).state_dict(), 1, BATCH, torch.float32)
    assert (reconstruct(tmp_path, 0.05)["weight"] == 1e5).all()


def test_arguments_of_a_snapshot_that_cannot_be(tmp_path: Path) -> None:
    averages = PowerAverages(Walk())
    with pytest.raises(ValueError, match="bfloat16"):
        save_snapshot(tmp_path, averages.state_dict(), 1, BATCH, torch.bfloat16)
    with pytest.raises(ValueError, match="step 0"):
        save_snapshot(tmp_path, averages.state_dict(), 0, 0)


def test_weights_in_another_layout_of_memory(tmp_path: Path) -> None:
    module = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    averages = PowerAverages(module)
    averages.update(module, 1)
    save_snapshot(tmp_path, averages.state_dict(), 1, BATCH, torch.float32)
    assert torch.equal(reconstruct(tmp_path, 0.1)["weight"], module.weight)


def test_resumed_averages_continue_bit_for_bit(tmp_path: Path) -> None:
    whole, _ = walk(PowerAverages)
    module = Walk()
    averages = PowerAverages(module)
    for step in range(1, STEPS + 1):
        if step == 123:
            save_file(averages.state_dict(), tmp_path / "state.safetensors")
            averages = PowerAverages(module)
            averages.load_state_dict(load_file(tmp_path / "state.safetensors"))
        module.step()
        averages.update(module, step)
    assert whole.state_dict().keys() == averages.state_dict().keys()
    assert all(torch.equal(value, averages.state_dict()[name]) for name, value in whole.state_dict().items())


def test_a_state_that_does_not_fit() -> None:
    averages = PowerAverages(Walk())
    state = averages.state_dict()
    for other in (
        {**state, "0.050.weight": torch.ones(3, 16)},
        {name: value for name, value in state.items() if name != "0.050.weight"},
        {**state, "0.070.weight": torch.ones(16, 3)},
    ):
        with pytest.raises(CheckpointError, match=r"weight: use the network"):
            averages.load_state_dict(other)


def test_a_run_keeps_snapshots_and_makes_any_average(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Interrupted and resumed it keeps the same ones as in one go, to the byte."""
    options = ["--data", "builtin", "--batch-size", "2", "--device", "cpu", "--sample-steps", "1", *TINY_NETWORK]
    often = ["--power-averages", "0.05", "0.1", "--snapshot-every", "4", "--checkpoint-every", "6"]
    often += ["--sample-every", "100000"]
    main(["train", "--out", str(tmp_path / "whole"), "--num-images", "20", *options, *often])
    main(["train", "--out", str(tmp_path / "parts"), "--num-images", "10", *options, *often])
    main(["train", "--out", str(tmp_path / "parts"), "--num-images", "20", "--resume"])
    whole, parts = (snapshots_in(tmp_path / name) for name in ("whole", "parts"))
    assert [int(path.stem) for path in whole] == [4, 8, 12, 16, 20]
    for path in whole:  # of the shorter run the last one is another
        ours, other = load_file(path), load_file(tmp_path / "parts" / "averages" / path.name)
        assert ours.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in ours.items())
    assert len(parts) == 6
    capsys.readouterr()
    main(["average", str(tmp_path / "whole"), "--sigma-rel", "0.07", "--out", str(tmp_path / "averaged")])
    assert "EMA of length 0.07 after 20 images" in capsys.readouterr().out
    loaded = load_checkpoint(tmp_path / "averaged")
    assert loaded.info.images == 20
    wanted = reconstruct(tmp_path / "whole", 0.07)
    assert all(torch.equal(value, wanted[name]) for name, value in loaded.network.state_dict().items())
    main(["sample", str(tmp_path / "averaged"), "--steps", "1", "--device", "cpu", "--out", str(tmp_path / "grid.png")])
    with pytest.raises(SystemExit):
        main(["average", str(tmp_path / "whole"), "--sigma-rel", "0.5", "--out", str(tmp_path / "none")])
    assert "sigma_rel 0.5 is out of range" in capsys.readouterr().err


def test_a_snapshot_that_is_saved_meanwhile_is_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_run(tmp_path, 2)
    module = lamamba.training.averages
    written: list[int] = []

    def reconstruct_slowly(run: Path, *arguments: Any) -> dict[str, Tensor]:
        weights = reconstruct(run, *arguments)
        (run / "averages" / f"{24:012d}.safetensors").write_bytes(b"")
        return weights

    monkeypatch.setattr(module, "reconstruct", reconstruct_slowly)
    monkeypatch.setattr(module, "find_checkpoint", lambda run: run)
    monkeypatch.setattr(module, "build_empty", lambda _: None)
    monkeypatch.setattr(module, "fill", lambda *_: None)
    monkeypatch.setattr(module, "read_info", lambda _: CheckpointInfo())
    monkeypatch.setattr(module, "write_weights", lambda out, network, info: written.append(info.images))
    module.average(AverageConfig(tmp_path, 0.05, tmp_path / "out"))
    assert written == [2 * BATCH]


@pytest.mark.parametrize("length", [0.03, 0.25])
def test_the_default_twenty_snapshots_reach_what_the_docs_say(length: float) -> None:
    """Evenly spaced, of 0.05 and 0.10, in float16: docs/training.md."""
    steps = np.repeat(np.arange(1, 21) * 1000.0, 2)
    gammas = np.array([gamma_of(0.05), gamma_of(0.10)] * 20)
    fit = fit_profile(gammas, steps, gamma_of(length), 20_000)
    assert fit.residual < lamamba.training.averages.MAX_RESIDUAL
    assert np.linalg.norm(fit.weights) * torch.finfo(torch.float16).eps / 2 < lamamba.training.averages.MAX_ROUNDING
