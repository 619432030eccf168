"""Options that cannot work are refused by name, and the presets are what they are said to be."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest
import torch

from lamamba.config import (
    PRESETS,
    SIXTEEN_STATES,
    EncodeConfig,
    EvaluateConfig,
    GenerateConfig,
    GridConfig,
    InfoConfig,
    NetworkConfig,
    PlanConfig,
    PlotConfig,
    SampleConfig,
    TrainConfig,
    nearest,
    preset,
)
from lamamba.errors import ConfigError, LamambaError
from lamamba.model import LaMambaDiff

WRONG_NETWORKS = [
    ("in_channels", 0),
    ("in_channels", 4.0),
    ("sample_size", 2),
    ("sample_size", 31),
    ("sample_size", 32.0),
    ("num_classes", -1),
    ("num_classes", 10.5),
    ("embed_dim", 0),
    ("embed_dim", 322),
    ("embed_dim", 320.0),
    ("embed_dim", "320"),
    ("depths", (2, 2, 2)),
    ("depths", (2, 2, 2, 2, 2)),
    ("depths", (2, 2, 0, 2)),
    ("depths", (2, 2, 2.0, 2)),
    ("depths", ()),
    ("depths", 3),
    ("depths", None),
    ("depths", "2222"),
    ("depths", (2, 2, True, 2)),
    ("depths", (100_000,) * 4),
    ("depths", (32, 32, 32, 32)),
    ("decoder_extra_depth", 257),
    ("sample_size", 1 << 20),
    ("embed_dim", 1 << 20),
    ("num_classes", 1 << 40),
    ("window_size", 1 << 20),
    ("ssm_dt_rank", 1 << 20),
    ("mlp_ratio", 1e6),
    ("bottleneck_depth", -1),
    ("bottleneck_depth", 1.5),
    ("bottleneck_depth", True),
    ("decoder_extra_depth", -1),
    ("num_heads", 0),
    ("num_heads", 15),
    ("num_heads", 640),
    ("window_size", 0),
    ("window_size", 7),
    ("window_size", 8.0),
    ("ssm_ratio", 0.0),
    ("ssm_ratio", -1.0),
    ("ssm_ratio", 1.001),
    ("ssm_ratio", float("nan")),
    ("ssm_ratio", float("inf")),
    ("ssm_ratio", 1e308),
    ("ssm_ratio", "2.0"),
    ("ssm_ratio", None),
    ("ssm_ratio", True),
    ("ssm_state_size", 0),
    ("ssm_state_size", 1.0),
    ("ssm_dt_rank", 0),
    ("ssm_dt_rank", -20),
    ("ssm_dt_rank", 1.5),
    ("ssm_dt_rank", "16"),
    ("ssm_dt_rank", True),
    ("ssm_conv_bias", 1),
    ("scan", "cross"),
    ("scan", "Continuous"),
    ("scan", None),
    ("mlp_ratio", 0.0),
    ("mlp_ratio", -4.0),
    ("mlp_ratio", 1.001),
    ("mlp_ratio", float("-inf")),
    ("downsample", "v1"),
    ("downsample", ""),
    ("label_dropout", -0.1),
    ("label_dropout", 1.0),
    ("label_dropout", float("nan")),
    ("label_dropout", "0.1"),
    ("label_dropout", False),
    ("use_ssm", "no"),
    ("use_ssm", None),
    ("use_attention", 0),
]


@pytest.mark.parametrize(("name", "value"), WRONG_NETWORKS, ids=str)
def test_a_wrong_network_option_is_refused_by_name_and_value(name: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        NetworkConfig(**{name: value})
    assert str(caught.value).startswith(f"{name} is {value!r}: it must be ")


def test_a_network_without_any_mixing_is_refused() -> None:
    with pytest.raises(ConfigError, match="use_attention is False"):
        NetworkConfig(use_ssm=False, use_attention=False)


@pytest.mark.parametrize(("name", "value"), [("num_heads", 3), ("scan", "spiral"), ("sample_size", 7)])
def test_the_network_refuses_what_its_config_refuses(name: str, value: object) -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match=f"{name} is {value!r}"):
        LaMambaDiff(**{"embed_dim": 8, "num_heads": 2, name: value})


WRONG_TRAININGS = [
    ("num_images", 0),
    ("batch_size", 0),
    ("accumulate", 0),
    ("accumulate", 65),
    ("sample_steps", 0),
    ("log_every", 0),
    ("sample_every", -1),
    ("checkpoint_every", 0),
    ("max_grad_norm", -1.0),
    ("weight_decay", -0.1),
    ("num_workers", -1),
    ("keep_checkpoints", -1),
    ("seed", -1),
    ("seed", 2**64),
    ("num_images", 10**15),
    ("batch_size", 10**9),
    ("num_workers", 10**9),
    ("image_size", 10**8),
    ("sample_steps", 10**9),
    ("learning_rate", float("inf")),
    ("learning_rate", 0.0),
    ("learning_rate", -1e-4),
    ("learning_rate", float("nan")),
    ("ema_decay", 1.0),
    ("ema_decay", -0.1),
]


@pytest.mark.parametrize(("name", "value"), WRONG_TRAININGS, ids=str)
def test_a_wrong_training_option_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(out=Path("run"), **{name: value})
    assert str(caught.value).startswith(f"{name} is {value!r}: it must be ")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_per_label", 0), ("num_per_label", 99999999999), ("steps", 0), ("batch_size", -1), ("seed", -1),
        ("seed", 2**64), ("seed", 1.5), ("size", (8, -8)), ("size", (8, 10**9)),
    ],
)  # fmt: skip
def test_a_wrong_sampling_option_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        SampleConfig(checkpoint="nano", **{name: value})
    assert str(caught.value).startswith(f"{name} is {value!r}: it must be ")


@pytest.mark.parametrize(
    "options",
    [
        {"sample_size": 4},
        {"num_classes": 0},
        {"in_channels": 1},
        {"embed_dim": 4, "num_heads": 1},
        {"window_size": 2},
        {"depths": (1, 1, 1, 1), "bottleneck_depth": 0, "decoder_extra_depth": 0},
        {"ssm_dt_rank": 1},
        {"ssm_ratio": 0.5, "mlp_ratio": 1.5},
        {"ssm_ratio": 2, "mlp_ratio": 3, "label_dropout": 0},
        {"depths": [1, 2, 1, 1]},
        {"label_dropout": 0.0},
        {"use_ssm": False},
        {"use_attention": False},
    ],
    ids=str,
)
def test_limits_are_allowed(options: dict[str, object]) -> None:
    assert all(getattr(NetworkConfig(**options), name) == value for name, value in options.items())


def flow_at(logits: tuple[float, float]) -> TrainConfig:
    return TrainConfig(Path("a"), objective="flow", timesteps="logit-normal", timestep_logits=logits)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: InfoConfig("nano", size=(1, -1)), "size is (1, -1): it must be a height and a width from 1 to 4,096"),
        (lambda: InfoConfig("nano", size=(10**9, 2)), "size is (1000000000, 2): it must be a height and a width from"),
        (lambda: GenerateConfig(checkpoint="nano", out=Path("a"), num_images=10**15), "it must be at most 1,000,000,0"),
        (lambda: GenerateConfig(checkpoint="nano", out=Path("a"), images_per_shard=10**9), "must be at most 100,000"),
        (lambda: EvaluateConfig("a", "b", seed=2**64), "seed is 18446744073709551616: it must be a whole"),
        (lambda: GenerateConfig(checkpoint="nano", out=Path("a"), seed=2**64 - 2, num_images=3), "for 3 images"),
        (lambda: EncodeConfig("a", Path("b"), Path("c"), num_workers=10**9), "num_workers is 1000000000: it must be"),
        (lambda: GridConfig((Path("a"),), scale=10**9), "scale is 1000000000: it must be at most 64"),
        (lambda: PlotConfig((Path("a"),), frames=10**9), "frames is 1000000000: it must be at most 1,000"),
        (lambda: PlanConfig("nano", num_images=10**15), "num_images is 1000000000000000: it must be at most"),
        (lambda: TrainConfig(Path("a"), power_averages=(0.1, 0.1)), "(0.1, 0.1): it must be different lengths"),
        (lambda: TrainConfig(Path("a"), contrast=0.05), "contrast is 0.05: it must be 0 with the objective diffusion"),
        (lambda: TrainConfig(Path("a"), objective="flow", contrast=1.0), "contrast is 1.0: it must be at most 0.99"),
        (lambda: TrainConfig(Path("a"), objective="flow", contrast=0.1, accumulate=2), "must be 0 with accumulate"),
        (lambda: TrainConfig(Path("a"), objective="flow", contrast=0.1, min_snr_gamma=5.0), "0 with min_snr_gamma"),
        (lambda: TrainConfig(Path("a"), objective="flow", contrast=0.1, batch_size=1), "must be 0 with batch_size 1"),
        (lambda: TrainConfig(Path("a"), dropout=1.0), "dropout is 1.0: it must be from 0 to less than 1"),
        (lambda: TrainConfig(Path("a"), objective="flow", timestep_logits=(0.8, 0.8)), "0 1 with the timesteps"),
        (lambda: TrainConfig(Path("a"), timesteps="logit-normal"), "'logit-normal': it must be uniform with"),
        (lambda: flow_at((float("nan"), 1.0)), "(nan, 1.0): it must be a mean, and a standard deviation above 0"),
        (lambda: flow_at((0.0, 0.0)), "(0.0, 0.0): it must be a mean, and a standard deviation above 0"),
    ],
)
def test_options_have_limits(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert said in str(caught.value)


def of_recipe(config: TrainConfig) -> tuple[object, ...]:
    names = ("objective", "optimizer", "learning_rate", "warmup_images", "decay", "horizontal_flip")
    return tuple(getattr(config, name) for name in names)


def test_a_recipe_sets_what_is_not_given() -> None:
    out = Path("run")
    assert of_recipe(TrainConfig(out)) == of_recipe(TrainConfig(out, recipe="paper"))
    assert of_recipe(TrainConfig(out)) == ("diffusion", "adamw", 1e-4, 0, "none", False)
    best = TrainConfig(out, recipe="best", num_images=7_000)
    assert of_recipe(best) == ("flow", "muon", 3e-3, 350, "cosine", True)
    assert of_recipe(replace(best, seed=3)) == of_recipe(best)
    given = dict(objective="flow-x", optimizer="adamw", learning_rate=1e-4, warmup_images=0, decay="none")
    assert of_recipe(TrainConfig(out, recipe="best", horizontal_flip=False, **given)) == (*given.values(), False)
    with pytest.raises(ConfigError, match="recipe is 'bset': it must be paper or best"):
        TrainConfig(out, recipe="bset")  # type: ignore[arg-type]


def test_config_errors_are_errors_of_this_package() -> None:
    assert issubclass(ConfigError, LamambaError)


def test_configs_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        NetworkConfig().embed_dim = 8  # type: ignore[misc]


def count_parameters(name: str, **options: object) -> int:
    with torch.device("meta"):
        network = LaMambaDiff.from_preset(name, **options)
    return sum(parameter.numel() for parameter in network.parameters())


def test_default_network_is_the_released_xl() -> None:
    assert PRESETS["xl-256"] == NetworkConfig()
    assert count_parameters("xl-256") == 652_484_648


def test_presets_with_sixteen_states_differ_in_nothing_else() -> None:
    pairs = [(name, name.removesuffix(SIXTEEN_STATES)) for name in PRESETS if name.endswith(SIXTEEN_STATES)]
    assert len(pairs) == 8
    for name, other in pairs:
        assert PRESETS[name] == replace(PRESETS[other], ssm_state_size=16), name
        assert PRESETS[other].ssm_state_size == 1, other


def test_nano_is_small() -> None:
    assert 2e6 < count_parameters("nano") < 7e6


def test_there_are_seventeen_presets() -> None:
    sizes = {f"{size}-{pixels}" for size in ("s", "b", "l", "xl") for pixels in (256, 512)}
    assert set(PRESETS) == {"nano"} | sizes | {f"{name}-16-states" for name in sizes}


@pytest.mark.parametrize(("size", "width", "heads"), [("s", 64, 4), ("b", 128, 8), ("l", 256, 16), ("xl", 320, 16)])
@pytest.mark.parametrize(("pixels", "sample_size"), [(256, 32), (512, 64)])
def test_presets_have_the_paper_s_widths(size: str, width: int, heads: int, pixels: int, sample_size: int) -> None:
    config = preset(f"{size}-{pixels}")
    assert (config.embed_dim, config.num_heads, config.sample_size) == (width, heads, sample_size)
    given = {"embed_dim": width, "num_heads": heads, "sample_size": sample_size}
    assert config == NetworkConfig(**given)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("xl", "xl-256 or xl-512 or xl-256-16-states"),
        ("S", "s-256 or s-512 or s-256-16-states"),
        ("xl-512-16", "xl-512-16-states"),
        ("XL-256", "xl-256 or xl-256-16-states"),
        ("nanno", "nano"),
        ("xl-521", "xl-512"),
        ("l_256", "l-256"),
    ],
)
def test_an_unknown_preset_is_answered_with_the_nearest(name: str, meant: str) -> None:
    for look_up in (preset, LaMambaDiff.from_preset):
        with pytest.raises(ConfigError, match=rf"no preset is named '{name}': did you mean {meant}\?"):
            look_up(name)


def test_a_preset_like_no_other_is_answered_with_all() -> None:
    with pytest.raises(ConfigError) as caught:
        preset("resnet")
    assert all(name in str(caught.value) for name in PRESETS)
    assert nearest("abc", ["abd", "xyz"]) == "did you mean abd?"
    assert nearest("", ["abd", "xyz"]) == "there are abd, xyz"


def test_from_preset_replaces_options() -> None:
    with torch.device("meta"):
        network = LaMambaDiff.from_preset("s-512", num_classes=7, scan="raster", depths=(1, 1, 1, 1))
    wanted = {**vars(preset("s-512")), "num_classes": 7, "scan": "raster", "depths": (1, 1, 1, 1)}
    assert {field.name: network.config[field.name] for field in fields(NetworkConfig)} == wanted
    assert len(network.encoder[0]) == 1


def test_from_preset_refuses_wrong_options() -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match="window_size is 3"):
        LaMambaDiff.from_preset("nano", window_size=3)


def test_options_are_read_without_importing_torch() -> None:
    code = "import sys; from lamamba.config import NetworkConfig; NetworkConfig(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
