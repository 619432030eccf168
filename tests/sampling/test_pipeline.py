"""The pipeline as diffusers' users know one: saved and loaded, guided, steered, interrupted, offloaded."""

import math
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipeline import build, latents_of, seeds

from lamamba.diffusion import OBJECTIVES
from lamamba.errors import CheckpointError, ConfigError
from lamamba.model import LaMambaDiff
from lamamba.sampling import sample, slerp
from lamamba.sampling.pipeline import LaMambaDiffPipeline
from lamamba.sampling.schedulers import make_scheduler
from tiny_autoencoder import write_autoencoder


@pytest.mark.parametrize(
    ("objective", "sampler", "scheduler"),
    [
        ("diffusion", None, None),
        ("flow", None, None),
        ("flow", "euler", diffusers.FlowMatchEulerDiscreteScheduler),
        ("flow", "heun", diffusers.FlowMatchHeunDiscreteScheduler),
        ("diffusion", "ancestral", None),
        ("diffusion", "ddim", None),
    ],
)
def test_it_samples_what_sample_does(objective: str, sampler: str | None, scheduler: Any) -> None:
    pipe = build(objective)
    if sampler:
        pipe.scheduler = make_scheduler(OBJECTIVES[objective], sampler, 25)
    if scheduler:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    ours = latents_of(pipe, ["Coat", 2, None], guidance_scale=3.0, generator=seeds(5, 6, 7))
    wanted = sample(
        pipe.network, OBJECTIVES[objective], [1, 2, 3], [5, 6, 7], sampler=sampler, num_steps=4, guidance_scale=3.0
    )
    assert torch.equal(ours, wanted)


def test_it_is_saved_and_loaded_with_its_names(tmp_path: Path) -> None:
    pipe = build(vae=None)
    pipe.save_pretrained(tmp_path)
    again = LaMambaDiffPipeline.from_pretrained(tmp_path, local_files_only=True)
    again.set_progress_bar_config(disable=True)
    assert again.labels == pipe.labels == {"T-shirt": 0, "Coat": 1, "Bag": 2}
    assert again.vae is None
    assert torch.equal(latents_of(again, "coat"), latents_of(pipe, "Coat"))
    half = LaMambaDiffPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16, local_files_only=True)
    half.set_progress_bar_config(disable=True)
    assert half.network.patch_projection.weight.dtype == torch.bfloat16
    assert latents_of(half, "Coat").dtype == torch.float32


@pytest.mark.parametrize(("name", "steps"), [("nano", 6), ("nano-4-steps", 4)])
def test_shipped_weights_draw_what_they_are_asked_for(name: str, steps: int) -> None:
    pipe = LaMambaDiffPipeline.from_checkpoint(name)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(["Trouser", "Bag"], steps, generator=torch.Generator().manual_seed(1)).images
    assert [(image.mode, image.size) for image in images] == [("L", (32, 32))] * 2
    trouser, bag = (np.asarray(image, dtype=float) for image in images)
    assert trouser[4:, 15:17].mean() > 30, "trousers are in the middle"
    assert bag[20:, 4:8].mean() > trouser[20:, 4:8].mean() + 30, "bags are wide"


def test_output_types_agree() -> None:
    pipe = build()
    outs = {
        kind: pipe(["Bag", 0], 4, generator=torch.Generator().manual_seed(7), output_type=kind).images
        for kind in ("pil", "np", "pt", "latent")
    }
    assert outs["np"].shape == (2, 8, 8, 1)
    assert outs["pt"].shape == (2, 1, 8, 8)
    wanted = (outs["latent"] / 2 + 0.5).clamp(0, 1)
    assert torch.equal(outs["pt"], wanted)
    np.testing.assert_array_equal(outs["np"], wanted.permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(
        np.stack([np.asarray(image) for image in outs["pil"]]), (wanted[:, 0] * 255).round().byte().numpy()
    )
    (images,) = pipe(["Bag", 0], 4, generator=torch.Generator().manual_seed(7), output_type="pt", return_dict=False)
    assert torch.equal(images, wanted)


def test_an_image_does_not_depend_on_its_neighbours_nor_on_how_many_are_sampled_at_once() -> None:
    pipe = build()
    pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    labels = ["Coat", "Bag", 0, None]
    together = latents_of(pipe, labels)
    torch.testing.assert_close(latents_of(pipe, labels, max_batch_size=3), together, rtol=1e-3, atol=1e-3)
    alone = latents_of(pipe, "Bag", generator=seeds(11))
    beside = latents_of(pipe, ["Bag", "Coat"], generator=seeds(11, 12))[:1]
    torch.testing.assert_close(beside, alone, rtol=1e-3, atol=1e-3)
    others = latents_of(pipe, labels, generator=torch.Generator().manual_seed(8))
    assert (others - together).flatten(1).norm(dim=1).min() > 1


def test_where_memory_does_not_do_half_as_many_are_sampled_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = build()
    wanted = latents_of(pipe, [0, 1, 2, 0, 1])
    forward, seen = LaMambaDiff.forward, []

    def forward_in_little_memory(network: LaMambaDiff, x_t: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        if len(x_t) > 4:  # two images, each with and without its label
            raise torch.OutOfMemoryError("no more")
        seen.append(len(x_t))
        return forward(network, x_t, *others)

    monkeypatch.setattr(LaMambaDiff, "forward", forward_in_little_memory)
    torch.testing.assert_close(latents_of(pipe, [0, 1, 2, 0, 1]), wanted, rtol=1e-3, atol=1e-3)
    assert max(seen) == 4
    monkeypatch.setattr(LaMambaDiff, "forward", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("none")))
    with pytest.raises(torch.OutOfMemoryError):
        latents_of(pipe, 0)


def test_mixtures_and_guidance_change_the_image() -> None:
    pipe = build()
    weaker = build(decoder_extra_depth=0).network
    coat, bag = latents_of(pipe, "Coat"), latents_of(pipe, "Bag")
    assert torch.allclose(latents_of(pipe, {"Coat": 2.0}), coat, atol=1e-5)
    mixed = latents_of(pipe, {"Coat": 1.0, 2: 1.0})
    assert torch.equal(mixed, latents_of(pipe, {"Coat": 0.5, "Bag": 0.5}))
    ways: list[dict[str, Any]] = [
        {}, {"guidance_scale": 1.0}, {"guidance_interval": (0.1, 10.0)}, {"guidance_cosine_power": 2.0},
        {"guidance_rescale": 0.7}, {"weaker_network": weaker},
    ]  # fmt: skip
    images = [latents_of(pipe, "Coat", **options) for options in ways]
    images += [mixed, bag, latents_of(pipe, None)]
    for index, image in enumerate(images):
        for other in images[:index]:
            assert not torch.allclose(image, other, atol=1e-4)
    assert torch.equal(images[0], coat)
    assert len(latents_of(pipe, ["Coat", "Bag"], num_images_per_label=3)) == 6


def test_sizes_may_be_others_and_not_square() -> None:
    pipe = build()
    assert latents_of(pipe, "Coat", height=12, width=6).shape == (1, 1, 12, 6)
    with pytest.raises(ConfigError, match="image size 7 is not an even number"):
        pipe("Coat", 4, height=7)


def test_noise_can_be_given() -> None:
    pipe = build()
    noise = torch.stack([torch.randn(1, 8, 8, generator=generator) for generator in seeds(3)])
    assert torch.equal(latents_of(pipe, "Coat", latents=noise), latents_of(pipe, "Coat", generator=seeds(3)))
    with pytest.raises(ConfigError, match=r"latents are \(1, 1, 4, 4\): give a tensor \(1, 1, 8, 8\)"):
        pipe("Coat", 4, latents=torch.randn(1, 1, 4, 4))


def test_steps_are_called_back_and_can_be_changed_or_ended() -> None:
    pipe = build()
    seen: list[tuple[int, float]] = []

    def note(pipe: LaMambaDiffPipeline, index: int, t: torch.Tensor, values: dict[str, torch.Tensor]) -> None:
        seen.append((index, float(values["latents"].std())))

    wanted = latents_of(pipe, "Coat")
    assert torch.equal(latents_of(pipe, "Coat", callback_on_step_end=note), wanted)
    assert [index for index, _ in seen] == [0, 1, 2, 3]
    expected: list[torch.Tensor] = []
    latents_of(pipe, "Coat", callback_on_step_end_tensor_inputs=["x_0"],
               callback_on_step_end=lambda *given: expected.append(given[-1]["x_0"]))  # fmt: skip
    torch.testing.assert_close(expected[-1], wanted, atol=1e-3, rtol=1e-3)  # the last step goes to what is expected

    def empty(pipe: Any, index: int, t: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"latents": values["latents"] * 0} if index == 3 else values

    assert not latents_of(pipe, "Coat", callback_on_step_end=empty).any()

    def end(pipe: LaMambaDiffPipeline, index: int, t: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append((index, 0.0))
        pipe._interrupt = index == 1
        return values

    seen.clear()
    latents_of(pipe, "Coat", callback_on_step_end=end)
    assert len(seen) == 2
    with pytest.raises(ConfigError, match="only"):
        pipe("Coat", 4, callback_on_step_end=note, callback_on_step_end_tensor_inputs=["prompt_embeds"])


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        (["Cote"], {}, "no class is named 'Cote': did you mean coat?"),
        ([9], {}, "label 9 is out of range: use 0 to 2, or 3 for no label"),
        ([[]], {}, "class_labels is empty"),
        ([{"Coat": -1.0}], {}, "has no weights"),
        (["Coat"], {"generator": []}, "0 generators for 1 images"),
        (["Coat"], {"output_type": "jpeg"}, "output_type 'jpeg' is unknown: give pil, np, pt or latent"),
        (["Coat"], {"num_inference_steps": 0}, "num_inference_steps is 0: it must be 1 or more"),
        (["Coat"], {"guidance_scale": float("nan")}, "guidance_scale is nan: give a number"),
        (["Coat"], {"mask_image": Image.new("L", (8, 8))}, "mask_image needs the image"),
        (["Coat"], {"image": Image.new("L", (8, 8)), "strength": 0.0}, "strength 0.0 is out of range"),
        (["Coat"], {"image": [Image.new("L", (8, 8))] * 2}, "image has 2 for 1 images: give one, or one for each"),
        ([8.5], {}, "label 8.5 is neither a name nor a whole number"),
        ([True], {}, "label True is neither a name nor a whole number"),
        ([[0, torch.tensor(1.5)]], {}, "label tensor(1.5000) is neither a name nor a whole number"),
        ([np.array([0.0, 1.0])], {}, "a label's weights are (2,): give (4,) finite ones, or labels as whole numbers"),
        ([torch.tensor([0.0, 1.0, 0.0, float("nan")])], {}, "give (4,) finite ones"),
        ([torch.tensor([0, 7])], {}, "label 7 is out of range"),
        ([np.array([])], {}, "give (4,)"),
        ([torch.zeros(0, dtype=torch.long)], {}, "class_labels is empty"),
        ([{"Coat": float("nan")}], {}, "has no weights"),
        ([{"Coat": "much"}], {}, "has no weights"),
        ([{"Coat": 1.0, 2: float("inf")}], {}, "has no weights"),
        (["Coat"], {"num_images_per_label": 0}, "num_images_per_label is 0: it must be 1 or more"),
        (["Coat"], {"num_images_per_label": 1.5}, "num_images_per_label is 1.5: it must be a whole number"),
        (["Coat"], {"num_inference_steps": 8.5}, "num_inference_steps is 8.5: it must be a whole number"),
        (["Coat"], {"num_inference_steps": 10**12}, "num_inference_steps is 1000000000000: it must be 1000 or less"),
        (["Coat"], {"max_batch_size": -1}, "max_batch_size is -1: it must be 1 or more"),
        (["Coat"], {"height": 8.0}, "height is 8.0: it must be a whole number"),
        (["Coat"], {"guidance_scale": "2"}, "guidance_scale is '2': it must be a number"),
        (["Coat"], {"generator": 3}, "generator is 3: give torch.Generator().manual_seed(seed)"),
        (["Coat"], {"generator": [3]}, "generator is 3: give torch.Generator().manual_seed(seed)"),
        (["Coat"], {"generator": "abc"}, "generator is 'a': give torch.Generator().manual_seed(seed)"),
        ([torch.tensor([True, False])], {}, "label tensor(True) is neither a name nor a whole number"),
        (["Coat"], {"num_images_per_label": 10**30}, "it must be 10000 or less"),
        (["Coat"], {"height": 10**20}, "it must be 16384 or less"),
        (["Coat"], {"latents": np.zeros((1, 1, 8, 8))}, "latents are a ndarray: give a tensor (1, 1, 8, 8)"),
        (["Coat"], {"latents": torch.zeros(1, 8, 8)}, "latents are (1, 8, 8): give a tensor (1, 1, 8, 8)"),
        (["Coat"], {"guidance_interval": (1,)}, "guidance_interval is (1,): it must be two noise levels"),
        (["Coat"], {"guidance_interval": "ab"}, "guidance_interval is 'ab': it must be two noise levels"),
        (["Coat"], {"guidance_rescale": None}, "guidance_rescale is None: it must be from 0 to 1"),
        (["Coat"], {"guidance_cosine_power": float("inf")}, "guidance_cosine_power is inf: it must be 0 or more"),
        (["Coat"], {"callback_on_step_end": 5}, "callback_on_step_end is 5: it must be a function"),
        (["Coat"], {"callback_on_step_end_tensor_inputs": "latents"}, "it must be a list of names"),
        (["Coat"], {"image": np.zeros((0, 8))}, "image holds an array of shape (0, 8)"),
        (["Coat"], {"image": Image.new("L", (8, 8)), "mask_image": np.zeros((1,) * 5)}, "mask_image holds an array of"),
        (["Coat"], {"callback_on_step_end": lambda *_: torch.ones(1)}, "callback_on_step_end returned Tensor"),
        (["Coat"], {"callback_on_step_end": lambda *_: {"latents": torch.ones(1)}}, "latents (1,): return a tensor"),
    ],
)
def test_what_cannot_be_is_refused(arguments: list[Any], options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        build()(*arguments, **options)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "labels",
    [
        np.array([1, 2]), np.array([1, 2], dtype=np.uint8), torch.tensor([1, 2]), np.array(["Coat", "Bag"]),
        range(1, 3),
        (np.int64(1), torch.tensor(2)), np.array([[0.0, 1, 0, 0], [0, 0, 1, 0]]),
        torch.tensor([[0.0, 1, 0, 0], [0, 0, 1, 0]]), [np.array([0, 1, 0, 0]), "bag"],
    ],
    ids=str,
)  # fmt: skip
def test_labels_can_be_arrays_and_tensors(labels: Any) -> None:
    pipe = build()
    torch.testing.assert_close(latents_of(pipe, labels), latents_of(pipe, ["Coat", "Bag"]), atol=1e-5, rtol=1e-5)


def test_one_label_can_be_a_number_of_any_kind() -> None:
    pipe = build()
    for label in (np.int64(2), np.array(2), torch.tensor(2)):
        assert torch.equal(latents_of(pipe, label), latents_of(pipe, "Bag"))


def test_seeds_are_whole_numbers_of_64_bits() -> None:
    pipe = build()
    options = {"num_images": 2, "num_inference_steps": 2, "output_type": "latent"}
    assert pipe.interpolate(("Coat", "Bag"), (0, 2**64 - 1), **options).images.isfinite().all()
    for seed in (-1, 2**64, 1.5, "1"):
        with pytest.raises(
            ConfigError, match=r"seed is .*: it must be a whole number from 0 to 18,446,744,073,709,551,615"
        ):
            pipe.interpolate(("Coat", "Bag"), (0, seed), **options)
    with pytest.raises(ConfigError, match=r"there are 3 class_labels, and seeds \(0, 1\): give two of each"):
        pipe.interpolate(("Coat", "Bag", "Coat"), (0, 1), **options)


def test_an_unconditional_network_needs_no_labels() -> None:
    pipe = build(num_classes=0)
    assert latents_of(pipe, num_images_per_label=2).shape == (2, 1, 8, 8)
    assert torch.equal(latents_of(pipe, guidance_scale=5.0), latents_of(pipe, guidance_scale=1.0))


def test_a_network_that_never_saw_no_label_is_not_guided(tmp_path: Path) -> None:
    pipe = build(label_dropout=0.0)
    pipe.save_pretrained(tmp_path)
    pipe = LaMambaDiffPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    with pytest.warns(UserWarning, match="guidance is off: this network was trained with label_dropout 0"):
        unguided = latents_of(pipe, ["Coat"])
    assert torch.equal(unguided, latents_of(pipe, ["Coat"], guidance_scale=1.0))
    with pytest.raises(ConfigError, match=r"label_dropout 0, .*: leave guidance_scale at 1, .*, not 2\.0"):
        latents_of(pipe, ["Coat"], guidance_scale=2.0)
    for label in (None, 3, {"Coat": 0.5, 3: 0.5}, torch.tensor([0.0, 0.9, 0.0, 0.1])):
        with pytest.raises(ConfigError, match='it has never seen "no label": give one of its 3 classes'):
            latents_of(pipe, [label], guidance_scale=1.0)
    weaker = build().network
    weaker.head.output.weight.data *= 0.5  # it has the same seed
    assert not torch.equal(latents_of(pipe, ["Coat"], guidance_scale=2.0, weaker_network=weaker), unguided)


@pytest.fixture
def decoded(autoencoder: Path) -> LaMambaDiffPipeline:
    """A pipeline that decodes latents."""
    vae = diffusers.AutoencoderKL.from_pretrained(autoencoder, low_cpu_mem_usage=False)
    return build(vae=vae, in_channels=2)


def images_of(pipe: LaMambaDiffPipeline) -> torch.Tensor:
    images: torch.Tensor = pipe(["Coat", "Bag"], 4, generator=torch.Generator().manual_seed(7), output_type="pt").images
    return images


@pytest.mark.slow
def test_it_is_compiled_like_any_pipeline(decoded: LaMambaDiffPipeline) -> None:
    wanted = images_of(decoded)
    decoded.network = torch.compile(decoded.network, backend="eager")
    assert torch.allclose(images_of(decoded), wanted, atol=1e-5)


@pytest.mark.parametrize("space", ["pixels", "latents"])
def test_it_is_cast_like_any_pipeline(space: str, decoded: LaMambaDiffPipeline) -> None:
    pipe = build() if space == "pixels" else decoded
    wanted = images_of(pipe)
    assert torch.equal(images_of(pipe.to("cpu")), wanted)
    for dtype, tolerance in ((torch.float16, 0.02), (torch.bfloat16, 0.1)):
        out = images_of(pipe.to(dtype))
        assert pipe.network.dtype == dtype
        assert out.dtype == torch.float32
        assert 0 < (out - wanted).norm() < tolerance * wanted.norm()
        pipe.to(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_is_loaded_in_half_precision(dtype: torch.dtype, decoded: LaMambaDiffPipeline, tmp_path: Path) -> None:
    decoded.save_pretrained(tmp_path)
    wanted = images_of(decoded)
    half = LaMambaDiffPipeline.from_pretrained(tmp_path, torch_dtype=dtype, local_files_only=True)
    half.set_progress_bar_config(disable=True)
    assert {half.network.dtype, half.vae.dtype} == {dtype}
    assert 0 < (images_of(half) - wanted).norm() < 0.1 * wanted.norm()


@pytest.mark.parametrize("space", ["pixels", "latents"])
def test_models_are_offloaded_one_by_one(space: str, decoded: LaMambaDiffPipeline) -> None:
    """Hooks move models to the device of the name "cpu:0", which is another name than that of what is not moved."""
    pipe = build() if space == "pixels" else decoded
    wanted = images_of(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):  # after an image all hooks are new
        assert pipe._execution_device == torch.device("cpu:0")
        assert torch.equal(images_of(pipe), wanted)
    pipe.remove_all_hooks()
    assert pipe._execution_device == torch.device("cpu")
    assert torch.equal(images_of(pipe), wanted)


@pytest.mark.parametrize("space", ["pixels", "latents"])
def test_modules_are_offloaded_one_by_one_but_the_network_is_kept_whole(
    space: str, decoded: LaMambaDiffPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = build() if space == "pixels" else decoded
    wanted = images_of(pipe)
    offload = accelerate.cpu_offload
    # accelerate takes a weight on "cpu" and one on "cpu:0" for two, and cannot move it from the one to the other.
    monkeypatch.setattr(accelerate, "cpu_offload", lambda model, _, **options: offload(model, "cpu", **options))
    pipe.enable_sequential_cpu_offload(device="cpu")
    assert torch.equal(images_of(pipe), wanted)
    assert pipe.network.device == torch.device("cpu")
    if pipe.vae is not None:
        assert {parameter.device.type for parameter in pipe.vae.parameters()} == {"meta"}


def test_groups_are_offloaded_but_for_the_network(decoded: LaMambaDiffPipeline, tmp_path: Path) -> None:
    wanted = images_of(decoded)
    options = {
        "onload_device": torch.device("cpu"), "offload_type": "leaf_level", "offload_to_disk_path": str(tmp_path)
    }  # fmt: skip
    with pytest.raises(ValueError, match="LaMambaDiff does not support group offloading"):
        decoded.network.enable_group_offload(**options)
    decoded.enable_group_offload(exclude_modules=["network"], **options)
    assert torch.equal(images_of(decoded), wanted)


def test_a_pipeline_of_a_checkpoint_takes_another_autoencoder_and_keeps_a_scheduler(
    decoded: LaMambaDiffPipeline, tmp_path: Path
) -> None:
    decoded.scheduler = diffusers.EulerDiscreteScheduler.from_config(decoded.scheduler.config)
    decoded.save_pretrained(tmp_path / "pipe")
    wanted = images_of(decoded)
    again = LaMambaDiffPipeline.from_checkpoint(tmp_path / "pipe")
    again.set_progress_bar_config(disable=True)
    assert type(again.scheduler) is diffusers.EulerDiscreteScheduler
    assert again.labels == decoded.labels
    assert torch.equal(images_of(again), wanted)
    other = write_autoencoder(tmp_path / "vae", scaling_factor=0.1)
    assert LaMambaDiffPipeline.from_checkpoint(tmp_path / "pipe", other).vae.config.scaling_factor == 0.1
    (tmp_path / "pipe" / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"scheduler_config.json cannot be read: No such file"):
        LaMambaDiffPipeline.from_checkpoint(tmp_path / "pipe")


def test_interpolation_begins_and_ends_with_the_images_it_goes_between() -> None:
    pipe = build()
    options = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "pt"}
    images = pipe.interpolate(("Coat", {"Bag": 0.5, 0: 0.5}), (5, 6), 4, **options).images
    noise = [torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6)]
    ends = pipe(["Coat", {"Bag": 0.5, 0: 0.5}], latents=torch.stack(noise), **options).images
    torch.testing.assert_close(images[[0, -1]], ends, atol=1e-5, rtol=1e-5)
    assert len({image.numpy().tobytes() for image in images}) == 4
    with pytest.raises(ConfigError, match="the first and the last make two"):
        pipe.interpolate(("Coat", "Bag"), (5, 6), 1)


def test_interpolated_noise_stays_as_long_as_noise_is() -> None:
    torch.manual_seed(0)
    first, last = torch.randn(2, 3, 32, 32)
    way = slerp(first, last, [0.0, 0.25, 0.5, 1.0])
    torch.testing.assert_close(way[0], first)
    torch.testing.assert_close(way[-1], last)
    assert [float(noise.std()) for noise in way] == pytest.approx([1.0] * 4, abs=0.03)
    assert float((first + last).div(2).std()) < 0.75  # as it would be along the chord
    torch.testing.assert_close(slerp(first, first, [0.5])[0], first)
    angle = torch.acos((way[1].flatten() @ first.flatten()) / (way[1].norm() * first.norm()))
    assert float(angle) == pytest.approx(math.pi / 8, abs=0.02)  # a quarter of about a right angle


def test_weights_of_labels_are_taken_as_they_are() -> None:
    pipe = build()
    plain = torch.tensor([0.0, 1.0, 0.0, 0.0])
    torch.testing.assert_close(latents_of(pipe, [plain]), latents_of(pipe, "Coat"), atol=1e-5, rtol=1e-5)
    beyond = torch.tensor([-5.0, 1.0, 0.0, 0.0])  # away from another label: no label to be looked up
    assert (latents_of(pipe, [beyond]) - latents_of(pipe, "Coat")).norm() > 1e-3 * latents_of(pipe, "Coat").norm()
    with pytest.raises(ConfigError, match=r"weights are \(3,\): give \(4,\)"):
        latents_of(pipe, [torch.ones(3)])
