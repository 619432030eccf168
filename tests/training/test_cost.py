"""Counted parameters and multiply-adds against numbers worked out by hand and against the paper's."""

import pytest
import torch

from lamamba.config import PRESETS, InfoConfig
from lamamba.model import LaMambaDiff
from lamamba.training.cost import WHOSE_STATES, count, count_as_papers_on_mamba, print_info


def build_on_meta(**options: object) -> LaMambaDiff:
    with torch.device("meta"):
        return LaMambaDiff(**options)


def build_tiny(**options: object) -> LaMambaDiff:
    tiny = {"embed_dim": 8, "num_heads": 2, "window_size": 4, "num_classes": 3, "sample_size": 8}
    return build_on_meta(**{**tiny, **options})


def block_macs(width: int, pixels: int, keys: int, projected: bool, states: int = 1) -> int:
    """Count one block by hand; the step's rank is 1 up to a width of 16."""
    inner, rank = 2 * width, -(-width // 16)
    condition = (32 * width if projected else 0) + width * 9 * width
    scan_branch = [
        width * 2 * inner,  # in_proj
        9 * inner,  # depthwise convolution
        4 * (rank + 2 * states) * inner,  # x_proj
        4 * rank * inner,  # dt_proj
        4 * inner * (4 * states + 2),  # scan
        inner * width,  # out_proj
    ]
    attention = [width * 3 * width, 2 * keys * width, width * width]
    mlp = [2 * width * 4 * width]
    return condition + pixels * sum(scan_branch + attention + mlp)


def test_only_networks_on_the_meta_device_are_counted() -> None:
    with pytest.raises(ValueError, match="the network is on cpu: build it on the meta device"):
        count(LaMambaDiff.from_preset("nano"), 8, 8)


@pytest.mark.parametrize("states", [1, 16])
def test_stages_of_a_tiny_network_are_the_numbers_worked_out_by_hand(states: int) -> None:
    macs = {stage: macs for stage, (_, macs) in count(build_tiny(ssm_state_size=states), 8, 8).items()}
    assert macs["embeddings"] == 64 * 4 * 8 + 256 * 32 + 32 * 32
    assert macs["encoder 0 (8 wide)"] == 2 * block_macs(8, 64, 16, True, states) + 16 * 32 * 16
    assert macs["encoder 1 (16 wide)"] == 2 * block_macs(16, 16, 16, True, states) + 4 * 64 * 32
    for stage in ("encoder 2 (32 wide)", "encoder 3 (32 wide)", "bottleneck"):
        assert macs[stage] == 2 * block_macs(32, 4, 4, False, states), stage
    for stage in ("decoder 0 (32 wide)", "decoder 1 (32 wide)"):
        assert macs[stage] == 3 * block_macs(32, 4, 4, True, states), stage
    assert macs["decoder 2 (16 wide)"] == 3 * block_macs(16, 16, 16, True, states) + 4 * 32 * 64
    assert macs["decoder 3 (8 wide)"] == 3 * block_macs(8, 64, 16, True, states) + 16 * 16 * 32
    assert macs["head"] == 64 * 8 * 8 + 32 * 8 + 8 * 16 + 64 * 8 * 8


def test_first_stage_is_the_number_on_paper() -> None:
    # 64 pixels: 256 + 576 of the condition, then 16384 in, 9216 convolution, 12288 and 4096 projections, 24576 scan,
    # 8192 out, 12288 + 16384 + 4096 attention, 32768 MLP; twice, and 8192 of the downsampling.
    assert count(build_tiny(), 8, 8)["encoder 0 (8 wide)"][1] == 2 * 141_120 + 8_192


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"downsample": "conv"},
        {"bottleneck_depth": 0},
        {"use_ssm": False},
        {"use_attention": False},
        {"depths": (1, 2, 1, 3), "num_classes": 0},
    ],
    ids=str,
)
def test_stages_sum_to_all(options: dict[str, object]) -> None:
    network = build_tiny(**options)
    rows = count(network, 8, 16)
    parameters, macs = rows.pop("all")
    assert parameters == sum(parameter.numel() for parameter in network.parameters())
    assert parameters == sum(row[0] for row in rows.values())
    assert macs == sum(row[1] for row in rows.values())
    assert next(iter(rows)) == "embeddings"
    assert list(rows)[-1] == "head"


def test_cost_is_linear_in_the_pixels() -> None:
    network = build_tiny()
    small, large = count(network, 16, 16), count(network, 32, 32)
    for stage in ("decoder 3 (8 wide)", "encoder 0 (8 wide)"):
        condition = (3 if "decoder" in stage else 2) * (32 * 8 + 8 * 72)
        assert large[stage][1] - condition == 4 * (small[stage][1] - condition)


def scanned_elements(options: dict[str, object]) -> int:
    """Sum path, step and channel over all the scans of a network."""
    width, size = options["embed_dim"], options["sample_size"]
    stages = [(width, size, 2 + 3), (2 * width, size // 2, 2 + 3), (4 * width, size // 4, 2 + 3 + 2 + 3 + 2)]
    return sum(4 * (side * side) * (2 * channels) * num_blocks for channels, side, num_blocks in stages)


# docs/network.md has the numbers of all presets, which another test compares with the code.
@pytest.mark.parametrize(
    ("name", "parameters", "macs", "as_papers"),
    [
        ("s-256-16-states", 28_159_776, 2_440_507_392, 2_869_899_264),
        ("xl-256", 652_484_648, 45_719_203_840, 45_801_779_200),
        ("s-512-16-states", 28_356_384, 9_735_647_232, 11_453_214_720),
    ],
)
def test_presets_cost_this_much(name: str, parameters: int, macs: int, as_papers: int) -> None:
    config = PRESETS[name]
    network = build_on_meta(**vars(config))
    side, states = config.sample_size, config.ssm_state_size
    assert count(network, side, side)["all"] == (parameters, macs)
    assert count_as_papers_on_mamba(network, side, side) == as_papers
    assert as_papers - macs == scanned_elements(vars(config)) * (9 * states - (4 * states + 2))


@pytest.mark.parametrize(("name", "dit", "saved"), [("xl-256", 118.64e9, 0.576), ("xl-512", 524.6e9, 0.616)])
def test_the_published_savings_are_those_of_sixteen_states(name: str, dit: float, saved: float) -> None:
    def saving(states: str) -> float:
        config = PRESETS[name + states]
        return 1 - count_as_papers_on_mamba(build_on_meta(**vars(config)), *2 * [config.sample_size]) / dit

    assert saving("-16-states") == pytest.approx(saved, abs=1.5e-3)
    assert saving("") > saved + 0.03
    assert f"{saved:.1%}".replace("%", " %") in WHOSE_STATES
    assert f"{dit / 1e9:.10g} G" in WHOSE_STATES


def test_info_shows_both_numbers_of_states_and_whose_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    print_info(InfoConfig("xl-256-16-states"))
    shown = " ".join(capsys.readouterr().out.split())
    assert "│ xl-256 │ 1 │ 652,484,648 │ 45.72 │ 45.80 │" in shown
    assert "│ xl-256-16-states │ 16 │ 659,742,248 │ 48.20 │ 50.34 │" in shown
    assert WHOSE_STATES in shown


def test_info_of_nano_says_nothing_of_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    print_info(InfoConfig("nano"))
    shown = capsys.readouterr().out
    assert "4,284,182" in shown
    assert "16-states" not in shown
