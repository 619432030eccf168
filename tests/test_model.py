"""The network against the released one's recorded numbers, and what goes beyond it."""

import json
import math
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from lamamba.checkpoints.released import load_released, translate
from lamamba.config import NetworkConfig
from lamamba.diffusion import OBJECTIVES, training_losses
from lamamba.model import LaMambaDiff
from lamamba.sampling.guidance import guide
from small_network import build, build_random, make_batch, relative_error

GOLDEN = Path(__file__).parent / "golden"
NETWORKS = ["golden_continuous", "golden_window8_res32", "golden_cross_dstate4_uncond"]


def load_golden(name: str) -> tuple[LaMambaDiff, dict[str, Tensor]]:
    with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
        released = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    state = {key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}
    network = load_released(
        state,
        embed_dim=released["embed_dim"],
        sample_size=released["image_size"] // 8,
        num_classes=released["num_classes"],
        num_heads=released["num_heads"],
        window_size=released["window"],
        ssm_state_size=released.get("d_state", 1),
        scan="continuous" if released.get("continuous", True) else "raster",
        ssm_conv_bias=released.get("conv_bias", False),
        downsample={"v1": "merge", "v2": "conv"}[released.get("downsample", "v1")],
    )
    return network, tensors


@pytest.mark.parametrize("name", NETWORKS)
def test_output_and_every_recorded_gradient_agree_with_the_released_network(name: str) -> None:
    network, golden = load_golden(name)
    out = network(golden["x"], golden["t"], golden["y"])
    assert relative_error(out, golden["out"]) < 1e-5
    (out * golden["loss_weight"]).sum().backward()
    parameters = dict(network.named_parameters())
    recorded = [key for key in golden if key.startswith("grad.")]
    assert len(recorded) > 40
    # The recorded float32 gradients are themselves up to 1.15e-5 from float64 ones, where this package's are 2.4e-6.
    for key in recorded:
        grad = parameters[translate(key.removeprefix("grad."))].grad
        assert grad is not None
        assert relative_error(grad.reshape(golden[key].shape), golden[key]) < 1.3e-5, key


@pytest.mark.parametrize("name", NETWORKS)
def test_float32_gradients_agree_with_float64(name: str) -> None:
    gradients = []
    for dtype in (torch.float32, torch.float64):
        network, golden = load_golden(name)
        network.to(dtype)
        out = network(golden["x"].to(dtype), golden["t"], golden["y"])
        (out * golden["loss_weight"].to(dtype)).sum().backward()
        gradients.append({key: parameter.grad for key, parameter in network.named_parameters()})
    for key, exact in gradients[1].items():
        assert relative_error(gradients[0][key], exact) < 5e-6, key


@pytest.mark.parametrize("name", NETWORKS[:2])
def test_guidance_agrees_with_the_released_network(name: str) -> None:
    network, golden = load_golden(name)
    denoiser = guide(network, scale=4.0, null_label=network.null_label)
    batch = len(golden["x"])
    with torch.no_grad():
        out = denoiser(golden["x"], golden["t"], golden["y"])
    assert relative_error(out, golden["cfg_out_scale_4"][:batch]) < 1e-5


# What each option changes: the parameters, or with the same parameters the output.
OTHER_VALUES = {
    "in_channels": 3,
    "sample_size": 16,
    "num_classes": 5,
    "embed_dim": 16,
    "depths": (1, 1, 1, 1),
    "bottleneck_depth": 2,
    "decoder_extra_depth": 1,
    "num_heads": 4,
    "window_size": 2,
    "ssm_ratio": 1.0,
    "ssm_state_size": 3,
    "ssm_dt_rank": 5,
    "ssm_conv_bias": True,
    "scan": "raster",
    "mlp_ratio": 2.0,
    "downsample": "conv",
    "use_ssm": False,
    "use_attention": False,
}


def test_every_option_of_the_network_is_tested_here() -> None:
    assert {field.name for field in fields(NetworkConfig)} == {*OTHER_VALUES, "label_dropout"}


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_every_option_changes_something(name: str) -> None:
    usual, other = build_random(), build_random(**{name: OTHER_VALUES[name]})
    shapes = [{key: value.shape for key, value in network.state_dict().items()} for network in (usual, other)]
    if name != "scan":
        assert shapes[0] != shapes[1]
        assert sum(p.numel() for p in usual.parameters()) != sum(p.numel() for p in other.parameters())
    else:
        other.load_state_dict(usual.state_dict())
        assert relative_error(other(*make_batch()), usual(*make_batch())) > 1e-3
    out = other(*make_batch(channels=other.config.in_channels))
    assert out.shape == (2, 2 * other.config.in_channels, 8, 8)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5])
def test_label_dropout_is_the_rate_of_null_labels_in_training(rate: float, objective: str) -> None:
    seen = []

    def denoiser(x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.append(y)
        return torch.cat([x_t, x_t], dim=1)

    num_images, null_label = 20_000, 3
    y = torch.arange(num_images) % null_label
    training_losses(
        OBJECTIVES[objective],
        denoiser,
        torch.zeros(num_images, 1, 1, 1),
        y,
        null_label=null_label,
        label_dropout=rate,
        generator=torch.Generator().manual_seed(0),
    )
    (labels,) = seen
    dropped = labels == null_label
    spread = math.sqrt(rate * (1 - rate) / num_images)
    assert abs(float(dropped.double().mean()) - rate) <= 4 * spread
    assert torch.equal(labels[~dropped], y[~dropped])


@pytest.mark.parametrize("options", [{}, {"downsample": "conv", "scan": "raster"}], ids=["default", "conv-raster"])
@pytest.mark.parametrize(("height", "width"), [(4, 4), (4, 6), (6, 10), (10, 6), (14, 14), (34, 18), (4, 22)], ids=str)
def test_any_even_size_works_and_every_pixel_matters(height: int, width: int, options: dict[str, object]) -> None:
    network = build_random(**options)
    x_t, t, y = make_batch(height, width)
    x_t.requires_grad_()
    out = network(x_t, t, y)
    assert out.shape == (2, 8, height, width)
    assert torch.isfinite(out).all()
    (sensitivity,) = torch.autograd.grad(out[0].square().sum(), x_t)
    assert torch.isfinite(sensitivity).all()
    assert (sensitivity[0] != 0).all()
    assert (sensitivity[1] == 0).all(), "images of a batch should not see each other"


def test_every_pixel_sees_every_other() -> None:
    network = build_random(use_attention=False).double()
    x_t, t, y = make_batch(8, 12, batch=1)
    x_t = x_t.double().requires_grad_()
    for row, column in [(0, 0), (7, 11), (3, 5)]:
        (sensitivity,) = torch.autograd.grad(network(x_t, t, y)[0, :, row, column].sum(), x_t)
        assert (sensitivity != 0).all()


def test_output_depends_on_timestep_and_label() -> None:
    network = build_random()
    x_t, t, y = make_batch()
    out = network(x_t, t, y)
    assert relative_error(network(x_t, t + 100, y), out) > 1e-3
    assert relative_error(network(x_t, t, (y + 1) % 4), out) > 1e-3
    assert torch.equal(network(x_t, t.float(), y), out)


def test_an_unconditional_network_needs_no_label() -> None:
    network = build_random(num_classes=0)
    x_t, t, _ = make_batch()
    assert torch.equal(network(x_t, t), network(x_t, t, torch.zeros(2, dtype=torch.long)))
    assert network.null_label == 0


WRONG_INPUTS = {
    "odd height": ({"x_t": (2, 4, 7, 8)}, "x_t is 7 by 8 pixels"),
    "odd width": ({"x_t": (2, 4, 8, 9)}, "x_t is 8 by 9 pixels"),
    "too low": ({"x_t": (2, 4, 2, 8)}, "x_t is 2 by 8 pixels"),
    "too narrow": ({"x_t": (2, 4, 8, 2)}, "x_t is 8 by 2 pixels"),
    "empty": ({"x_t": (2, 4, 0, 0)}, "x_t is 0 by 0 pixels"),
    "channels": ({"x_t": (2, 3, 8, 8)}, r"x_t is \(2, 3, 8, 8\): give \(b, 4, h, w\)"),
    "no batch": ({"x_t": (4, 8, 8)}, r"x_t is \(4, 8, 8\)"),
    "timesteps": ({"t": (3,)}, r"t is \(3,\): give \(2,\)"),
    "one timestep": ({"t": ()}, r"t is \(\): give \(2,\)"),
    "labels": ({"y": (1,)}, r"y is \(1,\): give \(2,\)"),
    "columns of labels": ({"y": (2, 1)}, r"y is \(2, 1\)"),
}


@pytest.mark.parametrize("case", WRONG_INPUTS)
def test_wrong_shapes_are_refused_by_name(case: str) -> None:
    shapes, message = WRONG_INPUTS[case]
    x_t, t, y = make_batch()
    inputs = {"x_t": x_t, "t": t, "y": y}
    for name, shape in shapes.items():
        inputs[name] = torch.zeros(shape, dtype=inputs[name].dtype)
    with pytest.raises(ValueError, match=message):
        build()(**inputs)


@pytest.mark.parametrize("labels", [[0, 4], [-1, 2], [1000, 0]])
def test_labels_out_of_range_are_refused(labels: list[int]) -> None:
    x_t, t, _ = make_batch()
    with pytest.raises(ValueError, match=rf"y goes from {min(labels)} to {max(labels)}: labels go from 0 to 3"):
        build()(x_t, t, torch.tensor(labels))


def test_missing_labels_are_refused() -> None:
    x_t, t, _ = make_batch()
    with pytest.raises(ValueError, match="y is missing"):
        build()(x_t, t)


@pytest.mark.parametrize("way", ["weights", "autocast"])
def test_bf16_is_finite_and_near_float32(way: str) -> None:
    network = build_random()
    x_t, t, y = make_batch(10, 8)
    exact = network(x_t, t, y)
    if way == "weights":
        out = network.to(torch.bfloat16)(x_t, t, y)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            out = network(x_t, t, y)
    assert out.dtype == x_t.dtype
    assert torch.isfinite(out).all()
    assert 1e-5 < relative_error(out, exact) < 0.05
    out.square().mean().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in network.parameters())


STATE = ("A_log", "D", "dt_bias")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_loading_in_another_dtype_keeps_the_parameters_of_the_state(dtype: torch.dtype, tmp_path: Path) -> None:
    network = build_random(ssm_state_size=3)
    for name, parameter in network.named_parameters():
        if not name.endswith(STATE):  # so that only what becomes of the others can make a difference
            parameter.data = parameter.data.to(torch.bfloat16).to(torch.float16).float()
    network.save_pretrained(tmp_path)
    x_t, t, y = make_batch(10, 8)
    exact = network(x_t, t, y)

    loaded, found = LaMambaDiff.from_pretrained(tmp_path, torch_dtype=dtype, output_loading_info=True)
    assert not found["missing_keys"]
    assert loaded.dtype == dtype
    assert len([name for name, _ in loaded.named_parameters() if name.endswith(STATE)]) == 3 * 11
    for name, parameter in loaded.named_parameters():
        kept = name.endswith(STATE) and dtype != torch.float64
        assert parameter.dtype == (torch.float32 if kept else dtype), name
    out = loaded(x_t, t, y)
    assert out.dtype == x_t.dtype
    assert relative_error(out, exact) < 0.05
    assert torch.equal(loaded.float()(x_t, t, y), exact)
    if dtype != torch.float64:
        assert relative_error(network.to(dtype).float()(x_t, t, y), exact) > 1e-5


def gradients_of(network: torch.nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    network.zero_grad()
    out = network(*make_batch())
    out.square().mean().backward()
    return out.detach(), {name: parameter.grad.clone() for name, parameter in network.named_parameters()}


def test_gradient_checkpointing_gives_identical_gradients() -> None:
    network = build_random().train()
    out, gradients = gradients_of(network)
    calls = []
    network.enable_gradient_checkpointing()
    network.encoder[0][0].register_forward_pre_hook(lambda *_: calls.append(1))
    out_again, gradients_again = gradients_of(network)
    assert len(calls) == 2, "a checkpointed block runs twice"
    assert torch.equal(out, out_again)
    for name, gradient in gradients.items():
        assert torch.equal(gradients_again[name], gradient), name


@pytest.mark.parametrize(
    "options",
    [{}, {"scan": "raster", "ssm_conv_bias": True, "downsample": "conv", "ssm_state_size": 4}, {"sample_size": 12}],
    ids=["default", "other", "resized"],
)
def test_every_parameter_gets_a_gradient(options: dict[str, object]) -> None:
    for name, gradient in gradients_of(build_random(**options))[1].items():
        assert torch.isfinite(gradient).all(), name
        assert gradient.norm() > 0, name


def test_an_untrained_network_learns_from_the_first_step() -> None:
    gradients = gradients_of(build())[1]
    assert gradients["head.output.weight"].norm() > 0
    assert gradients["encoder.0.0.modulation.weight"].norm() > 0
    assert gradients["encoder.0.0.ssm.in_proj.weight"].norm() == 0, "its gate is closed"


@pytest.mark.slow
def test_a_compiled_network_takes_other_sizes() -> None:
    """As one graph. The second size makes torch.compile treat sizes as variables, but a grid's geometry is constant."""
    network = build_random(depths=(1, 1, 1, 1), bottleneck_depth=0)
    for stages in (network.encoder, network.decoder):  # blocks are slow to trace, and every stage has the same
        stages[1] = stages[2] = torch.nn.ModuleList()
    torch.compiler.reset()
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    with torch.no_grad():
        for height, width in ((8, 8), (12, 14)):
            x_t, t, y = torch.randn(2, 4, height, width), torch.tensor([3.0, 700.0]), torch.tensor([0, 1])
            assert relative_error(compiled(x_t, t, y), network(x_t, t, y)) < 1e-6
    torch.compiler.reset()


@pytest.mark.parametrize("shifted", [False, True], ids=["plain", "shifted"])
def test_a_compiled_block_equals_eager_forward_and_backward(shifted: bool) -> None:
    """Every operation that is not plain PyTorch is in a block; a whole network is slow to trace."""
    block = build_random().encoder[0][int(shifted)]
    generator = torch.Generator().manual_seed(0)
    x, condition = (torch.randn(shape, generator=generator) for shape in ((2, 8, 10, 8), (2, 32)))
    torch.compiler.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    results = []
    for forward in (block, compiled):
        block.zero_grad()
        inputs = [x.clone().requires_grad_(), condition.clone().requires_grad_()]
        out, (branch, gate, bias) = forward(*inputs)
        (out.square().mean() + ((branch + bias) * gate[:, None, None]).square().mean()).backward()
        gradients = {name: parameter.grad.clone() for name, parameter in block.named_parameters()}
        results.append({"out": out, "branch": branch, "x": inputs[0].grad, "condition": inputs[1].grad, **gradients})
    torch.compiler.reset()
    for name, wanted in results[0].items():
        assert relative_error(results[1][name], wanted) < 1e-5, name


def test_saved_and_loaded_network_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    network = build_random(scan="raster", ssm_dt_rank=3, num_classes=2)
    network.save_pretrained(tmp_path)
    again = LaMambaDiff.from_pretrained(tmp_path)
    assert {field.name: again.config[field.name] for field in fields(NetworkConfig)} == {
        field.name: list(value) if isinstance(value := network.config[field.name], tuple) else value
        for field in fields(NetworkConfig)
    }
    state, state_again = network.state_dict(), again.state_dict()
    assert sorted(state) == sorted(state_again)
    for name, value in state.items():
        assert state_again[name].dtype == value.dtype, name
        assert torch.equal(state_again[name], value), name
    x_t, t, _ = make_batch()
    y = torch.tensor([0, 2])
    # Tensors lie elsewhere in memory once read from a file, which changes the last bit of some sums.
    torch.testing.assert_close(again(x_t, t, y), network(x_t, t, y), rtol=1e-5, atol=1e-5)
