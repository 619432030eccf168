"""`lamamba export`: onnxruntime and exported programs compute what PyTorch does, for every kind of network."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from lamamba.checkpoints.checkpoint import CheckpointInfo, write_weights
from lamamba.cli import main
from lamamba.commands.export import METADATA, example_inputs
from lamamba.commands.onnx_graph import build
from lamamba.model import LaMambaDiff, convert_parameters
from lamamba.ops.backend import use_backend
from lamamba.sampling.guidance import guide

TINY = {
    "in_channels": 1, "sample_size": 8, "num_classes": 3, "embed_dim": 8, "num_heads": 2, "window_size": 4,
    "depths": (1, 2, 1, 1), "bottleneck_depth": 1, "decoder_extra_depth": 0,
}  # fmt: skip


def tiny_network(**options: Any) -> LaMambaDiff:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = LaMambaDiff(**{**TINY, **options}).eval().requires_grad_(False)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return network


def session(model: Any) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    content = model if isinstance(model, bytes) else model.SerializeToString()
    return onnxruntime.InferenceSession(content, options)


def run(model: Any, inputs: dict[str, Tensor]) -> np.ndarray:
    return session(model).run(None, {name: value.numpy() for name, value in inputs.items()})[0]


def as_onnx(network: LaMambaDiff, size: tuple[int, int], **options: Any) -> Any:
    return build(
        network, size, **{"guided": False, "stored": "float32", "computed": "float32", "metadata": {}, **options}
    )


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((8, 8), {}),
        ((8, 8), {"scan": "raster"}),
        ((12, 20), {}),  # another size than in training, odd grids, padded and shifted windows, padded blocks
        ((12, 20), {"ssm_state_size": 3, "depths": (2, 2, 1, 1), "bottleneck_depth": 0}),
        ((6, 10), {"ssm_state_size": 16, "scan": "raster", "ssm_ratio": 1.0, "ssm_dt_rank": 2}),
        ((10, 6), {"downsample": "conv", "ssm_conv_bias": True, "in_channels": 3}),
        ((8, 8), {"use_ssm": False, "num_classes": 0}),
        ((8, 8), {"use_attention": False}),
    ],
    ids=["plain", "raster", "odd", "states", "many states", "convolutions", "attention only", "scan only"],
)
def test_onnxruntime_computes_what_pytorch_does(size: tuple[int, int], options: dict[str, Any]) -> None:
    network = tiny_network(**options)
    model = as_onnx(network, size)
    for batch in (3, 1):
        inputs = example_inputs(network, size, guided=False, batch=batch)
        wanted = network(**inputs).numpy()
        assert np.abs(wanted).max() > 0.1
        np.testing.assert_allclose(run(model, inputs), wanted, atol=1e-4 * np.abs(wanted).max(), rtol=0)


def test_a_recurrence_is_few_nodes() -> None:
    """1,024 steps; with several states they are one node, whose body walks a few steps at a time."""
    numbers = [len(as_onnx(tiny_network(ssm_state_size=states), (32, 32)).graph.node) for states in (1, 2)]
    assert numbers[0] < 11 * 260  # of eleven blocks
    assert numbers[1] < 11 * 135


def test_softplus_is_precise_where_it_is_small() -> None:
    from lamamba.commands import onnx_graph

    graph = onnx_graph.Graph("float32", "float32")
    out = graph.softplus("z")
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n"]) for name in ("z", out)]
    whole = onnx.helper.make_graph(graph.nodes, "softplus", values[:1], values[1:], list(graph.weights.values()))
    model = onnx.helper.make_model(whole, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
    z = torch.linspace(-60, 60, 4001)
    wanted = torch.nn.functional.softplus(z.double(), threshold=1e6).numpy()
    np.testing.assert_allclose(run(model, {"z": z}), wanted, rtol=5e-7)


def test_guidance_is_that_of_sampling() -> None:
    network = tiny_network()
    model = as_onnx(network, (8, 8), guided=True)
    inputs = example_inputs(network, (8, 8), guided=True, batch=2)
    for scale in (1.0, 2.5):
        inputs["guidance"] = torch.tensor(scale)
        wanted = guide(network, scale, network.null_label)(inputs["x_t"], inputs["t"], inputs["y"]).numpy()
        np.testing.assert_allclose(run(model, inputs), wanted, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("states", [1, 2])
def test_float16(states: int) -> None:
    network = tiny_network(ssm_state_size=states)
    inputs = example_inputs(network, (8, 8), guided=False, batch=2)
    wanted, whole = network(**inputs).numpy(), as_onnx(network, (8, 8))
    computed = as_onnx(network, (8, 8), stored="float16", computed="float16")
    stored = as_onnx(network, (8, 8), stored="float16")
    for model, tolerance in ((computed, 0.02), (stored, 0.005)):
        np.testing.assert_allclose(run(model, inputs), wanted, atol=tolerance * np.abs(wanted).max(), rtol=0)
        kinds = {weight.name: weight.data_type for weight in model.graph.initializer}
        assert kinds["encoder.0.0.ssm.A_log"] == onnx.TensorProto.FLOAT
        assert kinds["encoder.0.0.mlp.linear_1.weight"] == onnx.TensorProto.FLOAT16
        assert model.ByteSize() < 0.8 * whole.ByteSize()
    for name, parameter in network.named_parameters():  # weights that float16 holds exactly lose nothing
        if not name.endswith((".A_log", ".D", ".dt_bias")):
            parameter.data = parameter.data.half().float()
    exact = run(as_onnx(network, (8, 8), stored="float16"), inputs)
    np.testing.assert_allclose(exact, network(**inputs).numpy(), atol=1e-4 * np.abs(wanted).max(), rtol=0)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guided program of the smallest network, with two states."""
    folder = tmp_path_factory.mktemp("program")
    write_weights(folder / "weights", smallest(), CheckpointInfo(7, 1, "flow", ("bird", "fish", "newt")))
    main(["export", str(folder / "weights"), "--format", "pt2", "--guidance", "--out", str(folder / "out")])
    return folder / "out" / "network.pt2"


def smallest() -> LaMambaDiff:
    return tiny_network(sample_size=4, ssm_state_size=2, depths=(1, 1, 1, 1), bottleneck_depth=0)


def test_a_program_needs_nothing_of_this_package(program: Path) -> None:
    extra = {METADATA: ""}
    loaded = torch.export.load(program, extra_files=extra)
    assert json.loads(extra[METADATA])["labels"] == ["bird", "fish", "newt"]
    assert not [node for node in loaded.graph.nodes if "lamamba" in str(node.target)]
    network = smallest()
    for batch in (1, 4):
        inputs = example_inputs(network, (4, 4), guided=True, batch=batch)
        wanted = guide(network, 2.0, network.null_label)(inputs["x_t"], inputs["t"], inputs["y"])
        torch.testing.assert_close(loaded.module()(**inputs), wanted, atol=1e-4, rtol=1e-4)


def test_a_file_says_what_it_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info = CheckpointInfo(12345, 100, "diffusion", ("bird", "fish", "newt"))
    write_weights(tmp_path / "weights", tiny_network(), info)
    (tmp_path / "weights" / "README.md").write_text("---\nlicense: mit\n---\n# Animals\n")
    main(["export", str(tmp_path / "weights"), "--format", "onnx", "--size", "8", "12", "--out", str(tmp_path / "out")])
    shown = capsys.readouterr().out
    assert "onnxruntime on this CPU: " in shown
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["network.onnx"]
    found = session((tmp_path / "out" / "network.onnx").read_bytes())
    properties = json.loads(found.get_modelmeta().custom_metadata_map[METADATA])
    assert properties["labels"] == ["bird", "fish", "newt"]
    assert (properties["license"], properties["images_seen"]) == ("mit", 12345)
    assert (properties["null_label"], properties["size"], properties["channels"]) == (3, [8, 12], 1)
    assert properties["schedule"]["beta_schedule"] == "linear"
    assert properties["data"] == {"kind": "pixels", "black": -1.0, "white": 1.0}
    assert {node.name: node.shape for node in found.get_inputs()} == {
        "x_t": ["batch", 1, 8, 12], "t": ["batch"], "y": ["batch"]
    }  # fmt: skip


def test_latents_come_with_their_scale(tmp_path: Path, autoencoder: Path) -> None:
    network = tiny_network(in_channels=2)
    write_weights(tmp_path / "weights", network, CheckpointInfo(vae=str(autoencoder)))
    main(["export", str(tmp_path / "weights"), "--format", "onnx", "--out", str(tmp_path / "out")])
    model = onnx.load(tmp_path / "out" / "network.onnx")
    properties = json.loads({entry.key: entry.value for entry in model.metadata_props}[METADATA])
    config = json.loads((autoencoder / "config.json").read_text())
    assert properties["data"]["kind"] == "latents"
    assert properties["data"]["scale"] == config["scaling_factor"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--size", "7", "8"], "odd side"),
        (["--size", "2", "8"], "one below 4"),
        (["--precision", "float16-weights"], "add --format onnx"),
        (["--guidance"], "label_dropout 0"),
    ],
)
def test_what_cannot_be_exported(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_weights(tmp_path / "weights", tiny_network(label_dropout=0.0), CheckpointInfo())
    with pytest.raises(SystemExit, match="2"):
        main(["export", str(tmp_path / "weights"), "--out", str(tmp_path / "out"), *arguments])
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_half_a_network_keeps_the_state_of_the_scan() -> None:
    inputs = example_inputs(smallest(), (4, 4), guided=False, batch=2)
    network = smallest()
    convert_parameters(network, torch.float16)
    with use_backend("portable"):
        found = network(**inputs)
    wanted = smallest()(**inputs)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, atol=0.02 * float(wanted.abs().max()), rtol=0)
    assert network.state_dict()["encoder.0.0.ssm.A_log"].dtype == torch.float32
    assert network.state_dict()["encoder.0.0.mlp.linear_1.weight"].dtype == torch.float16
