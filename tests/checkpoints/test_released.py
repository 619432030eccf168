"""Checkpoints of the released code: read by name and shape, never run."""

import argparse
import json
import os
import pathlib
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from lamamba.checkpoints.released import load_released, released_state, save_released, sizes_in, translate
from lamamba.errors import CheckpointError, ConfigError
from lamamba.model import LaMambaDiff

GOLDEN = Path(__file__).parents[1] / "golden"
OPTIONS = {
    "num_classes": 0,
    "ssm_state_size": 4,
    "scan": "raster",
    "ssm_conv_bias": True,
    "downsample": "conv",
}


def load_golden_state(name: str) -> tuple[dict[str, Tensor], dict[str, object]]:
    """A state dict that the released code wrote, and the options of its network."""
    with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
        config = json.loads(file.metadata()["config"])
        keys = [key for key in file.keys() if key.startswith("model.")]  # noqa: SIM118 - safe_open is no mapping
        state = {key.removeprefix("model."): file.get_tensor(key) for key in keys}
    geometry = {
        "embed_dim": config["embed_dim"],
        "sample_size": config["image_size"] // 8,
        "num_classes": config["num_classes"],
        "num_heads": config["num_heads"],
        "window_size": config["window"],
    }
    return state, {**(OPTIONS if "cross" in name else {}), **geometry}


@pytest.fixture(scope="module")
def released() -> tuple[dict[str, Tensor], dict[str, object]]:
    return load_golden_state("golden_cross_dstate4_uncond")


def assert_holds(network: LaMambaDiff, state: dict[str, Tensor]) -> None:
    parameters = network.state_dict()
    names = {name: translate(name) for name in state}
    found = {name: new for name, new in names.items() if new in parameters}
    assert sorted(found.values()) == sorted(parameters)
    for name, new in found.items():
        assert torch.equal(parameters[new].flatten(), state[name].flatten()), name


def write_checkpoint(path: Path, state: dict[str, Tensor], **more: object) -> Path:
    content = {
        "model": {name: value + 1 if value.is_floating_point() else value for name, value in state.items()},
        "ema": state,
        "opt": {"state": {0: {"step": torch.tensor(7.0), "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]},
        "args": argparse.Namespace(epochs=1400, data_path=pathlib.PurePosixPath("/data"), model="XL"),
        "config": {"embed_dim": 16, "nested": {"depths": [2, 2, 2, 2]}},
        **more,
    }
    torch.save(content, path)
    return path


def test_every_value_of_a_state_dict_arrives(released: tuple[dict, dict]) -> None:
    state, options = released
    network = load_released(state, **options)
    assert_holds(network, state)
    assert not network.training


def test_a_loaded_network_saves_and_loads_as_itself(released: tuple[dict, dict], tmp_path: Path) -> None:
    state, options = released
    network = load_released(state, **options)
    network.save_pretrained(tmp_path)
    again = LaMambaDiff.from_pretrained(tmp_path)
    assert_holds(again, state)
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    # Tensors lie elsewhere in memory once read from a file, which changes the last bit of some sums.
    torch.testing.assert_close(again(x, t), network(x, t), rtol=1e-5, atol=1e-5)


def test_a_checkpoint_file_holds_both_weights(released: tuple[dict, dict], tmp_path: Path) -> None:
    state, options = released
    path = write_checkpoint(tmp_path / "0400000.pt", state)
    assert_holds(load_released(path, **options), state)
    assert_holds(load_released(str(path), weights="ema", **options), state)
    raised = {name: value + 1 if value.is_floating_point() else value for name, value in state.items()}
    assert_holds(load_released(path, weights="model", **options), raised)


def test_a_file_of_a_bare_state_dict_is_read(released: tuple[dict, dict], tmp_path: Path) -> None:
    state, options = released
    torch.save(state, tmp_path / "ema.pt")
    assert_holds(load_released(tmp_path / "ema.pt", **options), state)


def test_names_of_data_parallel_training_are_read(released: tuple[dict, dict], tmp_path: Path) -> None:
    state, options = released
    torch.save({"ema": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "ema.pt")
    assert_holds(load_released(tmp_path / "ema.pt", **options), state)


class Calls:
    """Pickles as a call of any function with any arguments."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable, tuple]:
        return self.call


def attacks(victim: Path) -> dict[str, Calls]:
    return {
        "os.system": Calls(os.system, f"touch {victim}"),
        "pathlib.Path.touch": Calls(pathlib.Path.touch, victim),
        "eval": Calls(eval, f"open({str(victim)!r}, 'w')"),
        "exec": Calls(exec, f"open({str(victim)!r}, 'w')"),
        "open": Calls(open, str(victim), "w"),
        "os.mkdir": Calls(os.mkdir, str(victim)),
    }


@pytest.mark.parametrize("attack", sorted(attacks(Path("victim"))))
def test_the_attacks_of_this_test_would_work(attack: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    pickle.loads(pickle.dumps(attacks(victim)[attack]))
    assert victim.exists()


@pytest.mark.parametrize("layout", ["zip", "legacy", "plain pickle"])
@pytest.mark.parametrize("place", ["args", "ema", "top"])
@pytest.mark.parametrize("attack", sorted(attacks(Path("victim"))))
def test_a_malicious_pickle_is_never_run(
    released: tuple[dict, dict], tmp_path: Path, attack: str, place: str, layout: str
) -> None:
    state, options = released
    path, victim = tmp_path / "malicious.pt", tmp_path / "victim"
    call = attacks(victim)[attack]
    content = {"args": {"ema": state, "args": call}, "ema": {"ema": {**state, "extra": call}}, "top": call}[place]
    if layout == "plain pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=layout == "zip")
    # Beside the weights it may be replaced by something inert; among them it cannot be.
    try:
        network = load_released(path, **options)
    except CheckpointError:
        network = None
    assert not victim.exists()
    if network is not None:
        assert place == "args"
        assert_holds(network, state)


def test_a_harmless_name_beside_the_weights_does_not_prevent_loading(
    released: tuple[dict, dict], tmp_path: Path
) -> None:
    state, options = released
    victim = tmp_path / "victim"
    path = write_checkpoint(tmp_path / "checkpoint.pt", state, callback=Calls(open, str(victim), "w"))
    assert_holds(load_released(path, **options), state)
    assert not victim.exists()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere\.pt is not a file"):
        load_released(tmp_path / "nowhere.pt")
    with pytest.raises(CheckpointError, match="is not a file"):
        load_released(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 broken", b"\x80\x02}q\x00."])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"broken\.pt"):
        load_released(path)


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused(released: tuple[dict, dict], tmp_path: Path, fraction: float) -> None:
    state, options = released
    path = write_checkpoint(tmp_path / "cut.pt", state)
    content = path.read_bytes()
    path.write_bytes(content[: int(fraction * len(content))])
    with pytest.raises(CheckpointError, match=r"cut\.pt cannot be read"):
        load_released(path, **options)


def test_a_file_without_the_weights_asked_for_says_what_it_holds(tmp_path: Path) -> None:
    torch.save({"model": {}, "args": {}}, tmp_path / "model_only.pt")
    with pytest.raises(CheckpointError, match="has no 'ema' weights, only model"):
        load_released(tmp_path / "model_only.pt")


@pytest.mark.parametrize("content", [[1, 2], {"ema": 3}, {"ema": {"pos_embed": "text"}}, {"a": 1}], ids=str)
def test_a_file_without_tensors_by_name_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="has no state dict"):
        load_released(tmp_path / "other.pt")


def test_missing_and_unknown_names_and_wrong_shapes_are_all_listed(released: tuple[dict, dict]) -> None:
    state, options = released
    wrong = dict(state)
    del wrong["final_linear.bias"], wrong["layers.0.blocks.0.op.Ds"]
    wrong["layers.9.surprise"] = torch.zeros(3)
    wrong["patch_embed.norm.weight"] = torch.zeros(5)
    # As many numbers as wanted, in a layout that is not the released one.
    wrong["layers.0.blocks.0.attn.qkv.weight"] = state["layers.0.blocks.0.attn.qkv.weight"].mT
    with pytest.raises(CheckpointError) as caught:
        load_released(wrong, **options)
    message = str(caught.value)
    assert message.startswith("the state dict does not fit this network, give its options: ")
    width = options["embed_dim"]
    assert "head.output.bias is missing" in message
    assert "encoder.0.0.ssm.D is missing" in message
    assert "layers.9.surprise is unknown" in message
    assert f"patch_embed.norm.weight is (5,), but the network needs ({width},)" in message
    assert f"layers.0.blocks.0.attn.qkv.weight is ({width}, {3 * width})" in message


def test_a_long_list_of_problems_is_cut(released: tuple[dict, dict]) -> None:
    state, options = released
    with pytest.raises(CheckpointError, match=r"; and \d+ more$"):
        load_released(state, **{**options, "embed_dim": 16})


def test_an_option_of_another_network_is_noticed(released: tuple[dict, dict]) -> None:
    state, options = released
    with pytest.raises(CheckpointError, match=r"A_logs.*but the network needs \(4, \d+, 1\)"):
        load_released(state, **{**options, "ssm_state_size": 1})


def test_every_name_of_the_released_xl_has_its_place_and_shape() -> None:
    recorded = json.loads((GOLDEN / "official_xl_256_state.json").read_text())
    with torch.device("meta"):
        wanted = {name: tuple(value.shape) for name, value in LaMambaDiff.from_preset("xl-256").state_dict().items()}
    learned = {
        name: tuple(entry[0])
        for name, entry in recorded.items()
        if not name.endswith(("relative_position_index", "attn_mask"))
    }
    assert sorted(translate(name) for name in learned) == sorted(wanted)
    for name, shape in learned.items():
        ours = wanted[translate(name)]
        if name.endswith((".A_logs", ".Ds")):  # paths and channels in one dimension
            assert shape == (ours[0] * ours[1], *ours[2:]), name
        elif name == "patch_embed.proj.weight":  # a 1x1 convolution
            assert shape == (*ours, 1, 1), name
        else:
            assert shape == ours, name


GOLDEN_NETWORKS = ("golden_continuous", "golden_window8_res32", "golden_cross_dstate4_uncond")


def assert_same(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert sorted(state) == sorted(wanted)
    for name, value in wanted.items():
        assert state[name].dtype == value.dtype, name
        assert torch.equal(state[name], value), name


@pytest.mark.parametrize("name", GOLDEN_NETWORKS)
def test_the_way_back_gives_every_value_and_buffer_that_the_released_code_wrote(name: str) -> None:
    state, options = load_golden_state(name)
    assert sizes_in(state) == {
        option: options.get(option, 4) for option in ("in_channels", "sample_size", "num_classes")
    }
    assert_same(released_state(load_released(state, **options)), state)
    if "cross" not in name:
        recorded = json.loads((GOLDEN / "official_xl_256_state.json").read_text())
        assert sorted(state) == sorted(recorded), "the names are those of the released XL, all of them"


def test_the_way_back_gives_every_key_of_the_released_xl() -> None:
    recorded = json.loads((GOLDEN / "official_xl_256_state.json").read_text())
    with torch.device("meta"):
        network = LaMambaDiff.from_preset("xl-256")
    state = released_state(network)
    assert {name: [list(value.shape), str(value.dtype)] for name, value in state.items()} == {
        name: entry[:2] for name, entry in recorded.items()
    }
    derived = {name: value for name, value in state.items() if not value.is_meta}
    assert len(derived) == 26
    for name, value in derived.items():
        found = [value.double().mean(), value.double().std(), value.min(), value.max()]
        assert [float(number) for number in found] == pytest.approx(recorded[name][2:], rel=1e-5), name


def test_what_is_loaded_shares_no_memory_and_draws_nothing(released: tuple[dict, dict]) -> None:
    state, options = released
    before = torch.get_rng_state()
    network = load_released(state, **options)
    assert torch.equal(torch.get_rng_state(), before)
    kept = {name: value.clone() for name, value in state.items()}
    for parameter in network.parameters():
        assert parameter.requires_grad
        parameter.data.zero_()
    assert_same(state, kept)


def test_a_network_that_the_released_code_lacks_has_no_way_back(tmp_path: Path) -> None:
    small = {"embed_dim": 8, "num_heads": 2, "num_classes": 0}
    with torch.device("meta"):
        lacking = LaMambaDiff(**small, use_attention=False)
        narrow = LaMambaDiff(**small, sample_size=16)
    with pytest.raises(ConfigError, match="always has scans and attention"):
        released_state(lacking)
    with pytest.raises(ConfigError, match="windows of 8 do not fill all grids of a network of sample_size 16"):
        save_released(tmp_path / "narrow.pt", narrow, narrow)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["layers.0.blocks.0.unheard_of", "something.else", "pos_embedding", ""])
def test_an_unknown_name_comes_back_as_no_parameter(name: str) -> None:
    with torch.device("meta"):
        assert translate(name) not in LaMambaDiff().state_dict()
