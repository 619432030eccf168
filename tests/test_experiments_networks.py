"""The networks that the comparison trains beside LaMamba: their sizes, beginnings and gradients."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import contestants
import pieces
import scoring
import training
from comparison_setting import place, read


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
