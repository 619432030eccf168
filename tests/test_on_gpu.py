"""What only a GPU can show of the network: compiled, as a CUDA graph, trained with and without the kernels."""

import gc
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from lamamba.checkpoints.checkpoint import load_network
from lamamba.checkpoints.dit import DiT
from lamamba.checkpoints.saving import load_training_state
from lamamba.config import PRESETS, GuidanceOptions, TrainConfig
from lamamba.data.latents import Latents
from lamamba.diffusion import Diffusion
from lamamba.model import LaMambaDiff
from lamamba.ops.backend import use_backend
from lamamba.ops.launch import precompile
from lamamba.sampling import sample
from lamamba.sampling.captured import Captured, CapturedNetwork
from lamamba.sampling.pipeline import LaMambaDiffPipeline
from lamamba.sampling.schedulers import make_scheduler
from lamamba.training.run import resolve
from lamamba.training.trainer import Trainer
from small_network import relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

TINY = replace(PRESETS["nano"], embed_dim=32, num_heads=2, depths=(1, 1, 1, 1), bottleneck_depth=1)


def build(in_channels: int = 1) -> tuple[LaMambaDiff, tuple[Tensor, Tensor, Tensor]]:
    torch.manual_seed(0)
    network = LaMambaDiff(**{**vars(TINY), "in_channels": in_channels}).cuda()
    for parameter in network.parameters():  # or gates of zero would hide every branch
        torch.nn.init.normal_(parameter, std=0.05)
    return network, (torch.randn(4, in_channels, 16, 24).cuda(), torch.rand(4).cuda() * 1000, torch.arange(4).cuda())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_compiles_as_one_graph_for_training(checkpointing: bool, bf16: bool) -> None:
    """Output and gradients, all together: as exact as without torch.compile, within a factor of two."""
    network, batch = build()
    if checkpointing:
        network.enable_gradient_checkpointing()

    def output_and_gradients(forward: Any, bf16: bool) -> Tensor:
        network.zero_grad()
        with torch.autocast("cuda", torch.bfloat16) if bf16 else nullcontext():
            out = forward(*batch)
        out.square().mean().backward()
        gradients = [parameter.grad for parameter in network.parameters()]
        assert all(gradient is not None for gradient in gradients)
        return torch.cat([tensor.flatten() / tensor.norm() for tensor in (out.detach(), *gradients)])

    precompile(output_and_gradients, network, bf16)
    exact = output_and_gradients(network, bf16=False)
    compiled = output_and_gradients(torch.compile(network, fullgraph=True), bf16)
    torch.compiler.reset()
    bound = 2 * relative_error(output_and_gradients(network, bf16=True), exact) if bf16 else 1e-4
    assert relative_error(compiled, exact) <= bound


@torch.no_grad()
def test_a_cuda_graph_of_inference_is_the_same() -> None:
    network, batch = build()
    precompile(network, *batch)
    wanted = network(*batch)
    compiled = torch.compile(network, fullgraph=True)
    assert relative_error(compiled(*batch), wanted) < 1e-3
    for forward in (network, compiled):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = forward(*batch)
        out.fill_(torch.nan)
        graph.replay()
        assert relative_error(out, wanted) < 1e-3
    torch.compiler.reset()


@pytest.mark.parametrize("bf16", [False, True])
def test_recorded_passes_sample_the_same(bf16: bool) -> None:
    network, _ = build()
    network.eval()
    options = {"num_steps": 6, "guidance_scale": 3.0, "guidance_options": GuidanceOptions(interval=(0.3, 5.0))}

    def drawn(captures: CapturedNetwork, labels: list[int]) -> Tensor:
        return sample(captures, Diffusion(), labels, list(range(len(labels))), **options)

    recorded, plain = CapturedNetwork(network, bf16), CapturedNetwork(network, bf16, captures=False)
    for labels in ([1, 2, 3], [4, 5, 6], [7, 8], [1, 2, 3]):
        assert relative_error(drawn(recorded, labels), drawn(plain, labels)) < (0.02 if bf16 else 1e-4)
    before = drawn(recorded, [1, 2, 3])
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2)
    assert relative_error(drawn(recorded, [1, 2, 3]), before) > 0.05
    assert relative_error(drawn(recorded, [1, 2, 3]), drawn(plain, [1, 2, 3])) < (0.02 if bf16 else 1e-4)
    before = drawn(recorded, [1, 2, 3])
    network.to("cpu")
    for parameter in network.parameters():
        parameter.data = parameter.data / 2
    network.to("cuda")  # elsewhere in memory
    assert relative_error(drawn(recorded, [1, 2, 3]), before) > 0.05
    assert relative_error(drawn(recorded, [1, 2, 3]), drawn(plain, [1, 2, 3])) < (0.02 if bf16 else 1e-4)


def test_garbage_does_not_end_a_recording() -> None:
    """A graph that only Python's collector can free becomes garbage while another is recorded, and that is due."""
    x = torch.ones(3, device="cuda")
    old = [Captured(lambda x: {"y": x + 1})]
    assert old[0](x)["y"].tolist() == [2] * 3

    def double(x: Tensor) -> dict[str, Tensor]:
        if torch.cuda.is_current_stream_capturing():
            ring: list[Any] = [old.pop()]
            ring.append(ring)
            del ring
        many: list[list[object]] = [[] for _ in range(100_000)]
        return {"y": 2 * x + len(many)}

    assert Captured(double)(x)["y"].tolist() == [100_002] * 3
    assert not old
    assert gc.isenabled()


def test_sampling_leaves_no_graph_behind() -> None:
    network, _ = build()
    network.eval()
    gc.collect()
    gc.disable()
    try:
        before = {id(thing) for thing in gc.get_objects() if type(thing) is Captured}
        sample(network, Diffusion(), [1, 2], [0, 1], num_steps=2)
        assert {id(thing) for thing in gc.get_objects() if type(thing) is Captured} <= before
    finally:
        gc.enable()


def test_a_checkpoint_is_kept_in_the_memory_of_the_one_before(tmp_path: Path) -> None:
    """And is what there was when it began, though training goes on while it is written."""
    with closing(trainer(tmp_path)) as ours:
        reader = ours.batches()
        places = []
        for _ in range(3):
            ours.take_step(*next(reader))
            weights = {name: value.cpu().clone() for name, value in ours.network.state_dict().items()}
            moments = {
                f"optimizer.exp_avg.{name}": ours.optimizer.state[parameter]["exp_avg"].cpu().clone()
                for name, parameter in ours.network.named_parameters()
            }
            ours.save()
            ours.take_step(*next(reader))
            path = ours.writer.finish()
            assert path is not None
            found = load_network(path / "network").state_dict()
            state = {name: torch.zeros_like(value) for name, value in moments.items()}
            load_training_state(path, state)
            for ours_now, wanted in ((found, weights), (state, moments)):
                for name, value in wanted.items():
                    assert torch.equal(ours_now[name], value), name
            kept = [*(tensor for tensors in ours._saved.values() for tensor in tensors.values())]
            assert ours.writer._stager.state_dict_cache is not None
            kept += [tensor for tensor in ours.writer._stager.state_dict_cache.values() if tensor.ndim]
            assert all(tensor.is_pinned() for tensor in kept)
            places.append([tensor.data_ptr() for tensor in kept])
        assert places[0] == places[1] == places[2]


def test_a_recorded_dit_samples_the_same() -> None:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, out_channels=2, num_layers=2, sample_size=16,
        patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    network = DiT(transformer).cuda().eval()
    images = [
        sample(CapturedNetwork(network, captures=captures), Diffusion(), [1, 2], [0, 1], num_steps=6, guidance_scale=3)
        for captures in (True, False)
    ]
    assert relative_error(*images) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pipeline_samples_on_a_gpu_what_it_does_on_a_cpu(dtype: torch.dtype) -> None:
    pipe = LaMambaDiffPipeline.from_checkpoint("nano")
    wanted = pipe([1, {2: 0.5, 3: 0.5}], 5, generator=torch.Generator().manual_seed(0), output_type="pt").images
    pipe = LaMambaDiffPipeline.from_checkpoint("nano").to("cuda", dtype)
    for _ in range(2):
        images = pipe([1, {2: 0.5, 3: 0.5}], 5, generator=torch.Generator().manual_seed(0), output_type="pt").images
        assert float((images - wanted).abs().mean()) < (0.05 if dtype == torch.bfloat16 else 2e-3)


def test_a_compiled_autoencoder_decodes_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[32, 64, 64], latent_channels=4,
    ).save_pretrained(tmp_path)  # fmt: skip
    space = Latents.open(tmp_path, torch.device("cuda"), torch.bfloat16)
    with torch.inference_mode():  # as what `sample` returns
        latents = torch.randn(5, 4, 16, 16, device="cuda")
    wanted = space.decode(latents).float()
    space.compile()
    for _ in range(2):
        assert float((space.decode(latents).float() - wanted).abs().mean()) < 1  # of 255, in bfloat16


def trainer(out: Path, **options: Any) -> Trainer:
    config = {"out": out, "batch_size": 32, "network": TINY, "learning_rate": 1e-3, "device": "cuda", **options}
    return Trainer(*resolve(TrainConfig(**config)))


def losses_of(trainer: Trainer, number: int) -> Iterator[float]:
    for (images, labels), _ in zip(trainer.batches(), range(number), strict=False):
        yield float(trainer.take_step(images, labels)["loss"])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate": 2},
        {"accumulate": 3},
        {"gradient_checkpointing": True},
        {"dropout": 0.3},
        {"dropout": 0.3, "accumulate": 3},
    ],
    ids=str,
)
def test_a_cuda_graph_trains_the_same(tmp_path: Path, options: dict[str, Any]) -> None:
    """In float32, where nothing but the order of sums could differ."""
    options = {**options, "precision": "float32", "learning_rate": 1e-4}
    trainers = [trainer(tmp_path, cuda_graph=captured, **options) for captured in (False, True)]
    before = parameters_of(trainers[0])
    assert torch.equal(before, parameters_of(trainers[1]))
    losses = [list(losses_of(trainer, 5)) for trainer in trainers]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    # Adam takes steps of the same size where the gradient is nothing but rounding: so not each parameter by itself.
    wanted, ours = (parameters_of(trainer) - before for trainer in trainers)
    assert relative_error(ours, wanted) < 0.1


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"gradient_checkpointing": True}], ids=str)
def test_weights_rounded_together_train_the_same(tmp_path: Path, options: dict[str, Any]) -> None:
    """They are rounded as each layer would round them, so nothing may change."""
    trainers = [trainer(tmp_path, precision="bf16", **options) for _ in range(2)]
    trainers[0].rounding = nullcontext
    assert trainers[1].rounding is not nullcontext
    losses = [list(losses_of(trainer, 5)) for trainer in trainers]
    assert losses[0] == losses[1]
    assert torch.equal(*(parameters_of(trainer) for trainer in trainers))


def parameters_of(trainer: Trainer) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.network.parameters()])


@pytest.mark.parametrize(("precision", "steps_alike", "tolerance"), [("float32", 25, 0.01), ("bf16", 5, 0.02)])
def test_kernels_train_like_plain_pytorch(tmp_path: Path, precision: str, steps_alike: int, tolerance: float) -> None:
    """Steps grow apart by rounding: after 200, two versions in float32 on a CPU differ by 9 % in the mean of 50."""
    curves = []
    for backend in ("pytorch", "triton"):
        with use_backend(backend):
            curves.append(torch.tensor(list(losses_of(trainer(tmp_path, precision=precision), 200))))
    plain, ours = curves
    torch.testing.assert_close(ours[:steps_alike], plain[:steps_alike], rtol=tolerance, atol=0)
    assert float(ours[-50:].mean()) == pytest.approx(float(plain[-50:].mean()), rel=0.2)
    assert float(plain[-50:].mean()) < 0.15  # of 1.3 at first: both have learned, by as much as on a CPU


@pytest.mark.parametrize("space", ["pixels", "latents"])
def test_a_pipeline_is_offloaded_to_the_cpu(space: str, autoencoder: Path) -> None:
    latents = space == "latents"
    vae = AutoencoderKL.from_pretrained(autoencoder, low_cpu_mem_usage=False) if latents else None
    network, _ = build(in_channels=2 if latents else 1)
    pipe = LaMambaDiffPipeline(network, make_scheduler(Diffusion(), "dpm++", 4), vae)
    pipe.set_progress_bar_config(disable=True)

    def draw() -> Tensor:
        images: Tensor = pipe([1, 2], 4, generator=torch.Generator().manual_seed(0), output_type="pt").images
        return images

    pipe.to("cuda")
    wanted = draw()
    pipe.enable_model_cpu_offload()
    for _ in range(2):
        torch.testing.assert_close(draw(), wanted, rtol=1e-3, atol=1e-3)
    assert pipe.network.device.type == "cpu"
    pipe.enable_sequential_cpu_offload()
    torch.testing.assert_close(draw(), wanted, rtol=1e-3, atol=1e-3)
    assert pipe.network.device.type == "cuda"
