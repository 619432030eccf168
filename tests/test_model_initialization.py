"""Fresh parameters follow the laws of the released network, and position embeddings their formula."""

import json
import math
from pathlib import Path

import pytest
import torch

from lamamba.checkpoints.released import translate
from lamamba.model import LaMambaDiff
from small_network import build

GOLDEN = Path(__file__).parent / "golden"


def test_the_same_seed_gives_the_same_network() -> None:
    first, again, other = build(seed=1).state_dict(), build(seed=1).state_dict(), build(seed=2).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.output.weight"], other["head.output.weight"])


def wanted_distribution(name: str, shape: tuple[int, ...]) -> tuple[str, float]:
    """The initialisation of a parameter of this package's name and shape: a law and its one number."""
    module, _, kind = name.rpartition(".")
    if name == "position_embedding":
        return "sine-cosine", 0.0
    if kind in ("A_log", "dt_bias"):
        return kind, 0.0
    if kind == "D":
        return "constant", 1.0
    if kind == "relative_position_bias" or name.startswith(("timestep_embedding", "label_embedding")):
        return ("constant", 0.0) if kind == "bias" else ("normal", 0.02)
    if kind == "dt_weight":
        return "uniform", shape[-1] ** -0.5
    if kind == "x_proj_weight":
        return "uniform", shape[-1] ** -0.5
    if module.endswith("convolution"):  # PyTorch's default; only a depthwise 3x3 one is among the recorded
        return "uniform", math.prod(shape[1:]) ** -0.5
    if "norm" in module:
        return "constant", 1.0 if kind == "weight" else 0.0
    if kind == "bias" or module.endswith("modulation"):
        return "constant", 0.0
    return "uniform", math.sqrt(6 / (shape[0] + shape[1]))


def assert_follows(name: str, shape: tuple[int, ...], statistics: tuple[float, float, float, float]) -> None:
    """Hold mean, standard deviation, least and most to a law, within 5.5 standard errors."""
    mean, std, least, most = statistics
    count = math.prod(shape)
    law, number = wanted_distribution(name, shape)
    if law == "constant":
        assert (mean, least, most) == (number, number, number), name
    elif law == "A_log":
        assert (least, most) == pytest.approx((0.0, math.log(shape[-1])), abs=1e-6), name
        assert mean == pytest.approx(math.lgamma(shape[-1] + 1) / shape[-1], abs=1e-6), name
    elif law == "sine-cosine":
        assert -1 <= least < -0.9, name
        assert 0.9 < most <= 1, name
    elif law == "dt_bias":
        low, high = (math.log(math.expm1(step)) for step in (1e-3, 1e-1))
        assert low - 1e-4 <= least < most <= high + 1e-4, name
        # The inverse softplus is nearly the logarithm for small steps, so the law is nearly uniform.
        steps = torch.linspace(math.log(1e-3), math.log(1e-1), 10_001, dtype=torch.float64).exp()
        exact = torch.log(torch.expm1(steps))
        assert abs(mean - float(exact.mean())) < 5.5 * float(exact.std()) / math.sqrt(count), name
        assert abs(std - float(exact.std())) < 5.5 * float(exact.std()) * math.sqrt(0.25 / count), name
    else:
        sigma = number / math.sqrt(3) if law == "uniform" else number
        assert abs(mean) < 5.5 * sigma / math.sqrt(count), name
        assert abs(std - sigma) < 5.5 * sigma * math.sqrt((0.2 if law == "uniform" else 0.5) / count), name
        if law == "uniform":
            assert max(-least, most) <= number * (1 + 1e-5), name
            assert count < 1000 or min(-least, most) > 0.98 * number, name
        else:
            assert 1.5 * sigma < min(-least, most) <= max(-least, most) < 6 * sigma, name


def test_the_laws_of_initialisation_are_those_of_the_released_xl() -> None:
    """The laws that the next test holds networks to, held to the statistics of the released network itself."""
    recorded = json.loads((GOLDEN / "official_xl_256_state.json").read_text())
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in LaMambaDiff.from_preset("xl-256").state_dict().items()}
    checked = set()
    for released_name, (_, _, *statistics) in recorded.items():
        name = translate(released_name)
        if name in shapes:
            assert_follows(name, shapes[name], tuple(statistics))
            checked.add(name)
    assert checked == set(shapes)


@pytest.mark.parametrize(
    "options",
    [
        {"embed_dim": 32, "num_heads": 4, "window_size": 8, "num_classes": 20, "sample_size": 16},
        {"embed_dim": 32, "num_heads": 4, "ssm_state_size": 4, "ssm_dt_rank": 7, "ssm_ratio": 1.0, "mlp_ratio": 2.0},
    ],
    ids=["default", "other"],
)
def test_fresh_parameters_follow_the_laws(options: dict[str, object]) -> None:
    for name, value in build(**options).state_dict().items():
        value = value.double()
        statistics = tuple(float(x) for x in (value.mean(), value.std(), value.min(), value.max()))
        assert_follows(name, tuple(value.shape), statistics)


def test_position_embedding_is_sine_and_cosine_of_column_then_row() -> None:
    embedding = build(embed_dim=16, num_heads=2).position_embedding[0].detach()
    for row in range(8):
        for column in range(8):
            wanted = []
            for position in (column, row):
                angles = [position / 10000 ** (i / 4) for i in range(4)]
                wanted += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
            assert embedding[row, column].tolist() == pytest.approx(wanted, abs=1e-6)


def test_position_embedding_of_another_size_is_resized_not_repeated() -> None:
    network = build()
    assert network.resize_position_embedding(8, 8) is network.position_embedding
    resized = network.resize_position_embedding(16, 12)
    assert resized.shape == (1, 16, 12, 8)
    # Resizing to the same picture at twice the size keeps its mean.
    assert resized.mean().item() == pytest.approx(network.position_embedding.mean().item(), abs=0.02)
