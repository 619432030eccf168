"""Sampling: an image depends on its seed and its label alone, and what cannot work is refused by name."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from lamamba.config import GuidanceOptions
from lamamba.diffusion import OBJECTIVES, Diffusion
from lamamba.errors import ConfigError
from lamamba.model import LaMambaDiff
from lamamba.sampling import Start, Step, choose_device, make_grid, sample
from lamamba.sampling.labels import choose_guidance
from lamamba.sampling.schedulers import check_scheduler, make_scheduler

KINDS = [name for name in OBJECTIVES if name != "diffusion-v"]  # whose samplers have the steps of "diffusion"
LABELS, SEEDS = [0, 1, 2, 0, 1, 2, 3, 1], [5, 6, 7, 8, 9, 10, 11, 12]


def make_network(num_classes: int = 3, seed: int = 0) -> LaMambaDiff:
    """Build a tiny network whose output depends on everything; a fresh one ignores its label."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = LaMambaDiff(
            in_channels=1, sample_size=8, num_classes=num_classes, embed_dim=8, num_heads=2, depths=(1, 1, 1, 1),
            bottleneck_depth=1, decoder_extra_depth=0, window_size=4,
        )  # fmt: skip
        for parameter in network.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return network.eval()


@pytest.fixture(scope="module")
def network() -> LaMambaDiff:
    return make_network()


def sample_in_batches(network: LaMambaDiff, batch_sizes: list[int], objective: str, sampler: str) -> Tensor:
    parts = [slice(end - size, end) for size, end in zip(batch_sizes, itertools.accumulate(batch_sizes), strict=True)]
    return torch.cat(
        [
            sample(
                network, OBJECTIVES[objective], LABELS[part], SEEDS[part], sampler=sampler, num_steps=5,
                guidance_scale=2.0, guidance_options=GuidanceOptions((0.0, 50.0), cosine_power=0.5, rescale=0.5),
            )
            for part in parts
        ]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("objective", "sampler"), [(name, sampler) for name in KINDS for sampler in OBJECTIVES[name].samplers]
)
def test_an_image_does_not_depend_on_its_neighbours(network: LaMambaDiff, objective: str, sampler: str) -> None:
    together = sample_in_batches(network, [8], objective, sampler)
    assert together.shape == (8, 1, 8, 8)
    assert together.dtype == torch.float32
    rounding = 1e-3 if objective == "flow-x" else 1e-4  # which an untrained network's x amplifies
    difference = (sample_in_batches(network, [1, 4, 3], objective, sampler) - together).abs().max()
    assert float(difference) < rounding * max(1.0, float(together.abs().max()))


def test_an_image_depends_on_its_seed_and_its_label(network: LaMambaDiff) -> None:
    x = sample(network, Diffusion(), [0, 0, 1, 3], [4, 5, 4, 4], num_steps=5)
    for first in range(4):
        for second in range(first):
            assert float((x[first] - x[second]).abs().max()) > 1e-3
    assert torch.equal(x, sample(network, Diffusion(), [0, 0, 1, 3], [4, 5, 4, 4], num_steps=5))


@pytest.mark.parametrize("sampler", ["ancestral", "ancestral-cosine", "sde-dpm++"])
def test_sampling_neither_uses_nor_disturbs_the_global_generator(network: LaMambaDiff, sampler: str) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = sample(network, Diffusion(), [0], [4], sampler=sampler, num_steps=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(sample(network, Diffusion(), [0], [4], sampler=sampler, num_steps=3), first)


@pytest.mark.parametrize("objective", KINDS)
def test_guidance_in_an_interval(network: LaMambaDiff, objective: str) -> None:
    def draw(scale: float, interval: tuple[float, float] | None = None) -> Tensor:
        options = GuidanceOptions(interval)
        return sample(
            network, OBJECTIVES[objective], LABELS, SEEDS, num_steps=6, guidance_scale=scale, guidance_options=options
        )

    everywhere, nowhere = draw(3.0), draw(1.0)
    assert float((everywhere - nowhere).abs().max()) > 1e-2
    assert torch.equal(draw(3.0, (0.0, float("inf"))), everywhere)
    assert torch.equal(draw(3.0, (1e6, 1e7)), nowhere)
    partly = draw(3.0, (0.5, 5.0))
    assert float((partly - everywhere).abs().max()) > 1e-3
    assert float((partly - nowhere).abs().max()) > 1e-3


@pytest.mark.parametrize("objective", KINDS)
def test_every_option_of_guidance_changes_the_image(network: LaMambaDiff, objective: str) -> None:
    variants: list[dict] = [
        {},
        {"guidance_options": GuidanceOptions(interval=(0.5, 5.0))},
        {"guidance_options": GuidanceOptions(cosine_power=1.0)},
        {"guidance_options": GuidanceOptions(cosine_power=4.0)},
        {"guidance_options": GuidanceOptions(rescale=0.7)},
        {"weaker": make_network(seed=1)},
    ]
    images = [
        sample(network, OBJECTIVES[objective], [0, 1], [4, 5], num_steps=6, guidance_scale=scale, **variant)
        for scale in (3.0, 1.0)
        for variant in variants
    ]
    for first, second in itertools.combinations(images[: len(variants) + 1], 2):
        assert float((first - second).abs().max()) > 1e-3
    for image in images[len(variants) :]:  # at scale 1
        assert torch.equal(image, images[-1])


def test_autoguidance_guides_an_unconditional_network_and_needs_one_like_it() -> None:
    network, weaker = make_network(0), make_network(0, seed=1)
    plain, guided = (
        sample(network, Diffusion(), [0], [1], num_steps=4, guidance_scale=2.0, weaker=other)
        for other in (network, weaker)
    )
    torch.testing.assert_close(plain, sample(network, Diffusion(), [0], [1], num_steps=4))
    assert float((plain - guided).abs().max()) > 1e-3
    with pytest.raises(ConfigError, match="the weaker network has num_classes 3 and this one 0"):
        sample(network, Diffusion(), [0], [1], num_steps=2, guidance_scale=2.0, weaker=make_network(3))


def test_an_unconditional_network_samples_without_guidance_only() -> None:
    network = make_network(num_classes=0)
    assert bool(sample(network, Diffusion(), [0, 0], [1, 2], num_steps=2).isfinite().all())
    with pytest.raises(ConfigError, match=r"guidance needs labels.*leave guidance_scale at 1"):
        sample(network, Diffusion(), [0], [1], num_steps=2, guidance_scale=1.5)
    with pytest.raises(ConfigError, match=r"label 1 is out of range.*unconditional"):
        sample(network, Diffusion(), [1], [1], num_steps=2)


def test_a_network_that_never_saw_no_label_is_not_guided() -> None:
    network = LaMambaDiff(**{**make_network().config, "label_dropout": 0.0}).eval()
    assert choose_guidance(network.config, None) == 1.0
    assert choose_guidance(make_network().config, None) == 2.0
    assert choose_guidance(make_network(0).config, None) == 1.0
    assert choose_guidance(network.config, None, by_weaker=True) == 2.0
    assert bool(sample(network, Diffusion(), [0], [1], num_steps=2).isfinite().all())
    assert bool(
        sample(network, Diffusion(), [0], [1], num_steps=2, guidance_scale=2.0, weaker=make_network()).isfinite().all()
    )
    with pytest.raises(ConfigError, match=r"trained with label_dropout 0, .* leave guidance_scale at 1.* not 1\.5"):
        sample(network, Diffusion(), [0], [1], num_steps=2, guidance_scale=1.5)
    with pytest.raises(ConfigError, match='never seen "no label": give one of its 3 classes'):
        sample(network, Diffusion(), [0, 3], [1, 2], num_steps=2)


@pytest.mark.parametrize("label", [-1, 4])
def test_a_label_out_of_range_is_named(network: LaMambaDiff, label: int) -> None:
    with pytest.raises(ConfigError, match=rf"label {label} is out of range: use 0 to 2, or 3 for no label"):
        sample(network, Diffusion(), [0, label], [1, 2], num_steps=2)


def test_wrong_arguments_are_one_line(network: LaMambaDiff) -> None:
    for options, said in (
        ({"labels": [8.5]}, "label 8.5 is not a whole number"), ({"labels": ["a"]}, "label 'a' is not a whole number"),
        ({"labels": [True]}, "label True is not"), ({"labels": [0, 1]}, "there are 2 labels and 1 seeds"),
        ({"labels": [], "seeds": []}, "there are 0 labels"), ({"num_steps": 1.5}, "1.5 steps are out of range"),
        ({"guidance_scale": "2"}, "guidance_scale is '2'"), ({"seeds": [2**64]}, "seed is 18446744073709551616"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            sample(network, Diffusion(), **{"labels": [0], "seeds": [0], "num_steps": 1, **options})


@pytest.mark.parametrize("num_steps", [0, 1001])
def test_a_number_of_steps_out_of_range_is_named(network: LaMambaDiff, num_steps: int) -> None:
    with pytest.raises(ConfigError, match=rf"{num_steps} steps are out of range: use 1 to 1000"):
        sample(network, Diffusion(), [0], [1], num_steps=num_steps)


def test_a_sampler_that_does_not_fit_is_named(network: LaMambaDiff) -> None:
    with pytest.raises(ConfigError, match="'euler' does not go with the objective 'diffusion'"):
        sample(network, Diffusion(), [0], [1], sampler="euler", num_steps=2)


def test_other_sizes_and_progress(network: LaMambaDiff) -> None:
    seen: list[tuple[int, int]] = []
    x = sample(
        network, Diffusion(), [0, 1], [1, 2], num_steps=4, size=(6, 10),
        callback=lambda step: seen.append((step.index, step.num_steps)),
    )  # fmt: skip
    assert x.shape == (2, 1, 6, 10)
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 4)]


def test_a_callback_sees_what_is_predicted_and_can_change_or_end_the_sampling(network: LaMambaDiff) -> None:
    steps: list[Step] = []

    def change(step: Step) -> None:
        steps.append(step)
        if step.index == 2:
            step.x, step.ends = torch.full_like(step.x, 7.0), True

    x = sample(network, Diffusion(), [0, 1], [1, 2], num_steps=4, callback=change)
    assert len(steps) == 3
    assert bool((x == 7).all())
    x = sample(network, Diffusion(), [0, 1], [1, 2], num_steps=4, callback=steps.append)
    torch.testing.assert_close(steps[-1].x_0, x, atol=1e-3, rtol=1e-3)  # the last step goes to what is predicted


def test_earlier_callbacks_still_work(network: LaMambaDiff) -> None:
    counts: list[int] = []
    previews: list[Tensor] = []
    with pytest.warns(DeprecationWarning, match="on_step and on_preview are deprecated: give callback"):
        x = sample(network, Diffusion(), [0, 1], [1, 2], num_steps=2, on_step=counts.append, on_preview=previews.append)
    assert counts == [2, 2]
    torch.testing.assert_close(previews[-1], x, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("objective", KINDS)
def test_a_sampler_can_be_a_scheduler_of_diffusers(network: LaMambaDiff, objective: str) -> None:
    kind = OBJECTIVES[objective]
    for sampler in kind.samplers:
        x, wanted = (
            sample(network, kind, [0, 1], [1, 2], sampler=given, num_steps=4)
            for given in (make_scheduler(kind, sampler, 25), sampler)
        )
        assert torch.equal(x, wanted), sampler
    other = OBJECTIVES["diffusion" if objective.startswith("flow") else "flow"]
    with pytest.raises(ConfigError, match="flow"):
        sample(network, kind, [0], [1], sampler=make_scheduler(other, "unipc", 4), num_steps=4)


@pytest.mark.parametrize("objective", KINDS)
def test_every_sampler_starts_from_an_image_and_keeps_what_is_not_masked(network: LaMambaDiff, objective: str) -> None:
    kind = OBJECTIVES[objective]
    x_0 = torch.linspace(-0.9, 0.9, 64).reshape(1, 1, 8, 8).expand(2, -1, -1, -1)
    mask = torch.zeros(2, 1, 8, 8)
    mask[..., :4] = 1
    for sampler in kind.samplers:
        check_scheduler(make_scheduler(kind, sampler, 25), kind, 1, pixels=False, num_steps=50, strength=0.5)
        near = sample(network, kind, [0, 1], [1, 2], start=Start(x_0, 0.02), sampler=sampler, num_steps=50)
        options = {"sampler": sampler, "num_steps": 10}
        far = sample(network, kind, [0, 1], [1, 2], start=Start(x_0, 0.6), **options)
        if objective != "flow-x":  # an untrained network's x is far from the image at any level of noise
            most = 0.3 if objective == "diffusion-v-zero-snr" else 0.2  # whose last step begins with more noise
            assert float((near - x_0).norm()) < most * float(x_0.norm()), sampler
        assert 0.2 * float(x_0.norm()) < float((far - x_0).norm()), sampler
        painted = sample(network, kind, [0, 1], [1, 2], start=Start(x_0, 1.0, mask), **options)
        torch.testing.assert_close(painted[..., 4:], x_0[..., 4:])
        assert float((painted - x_0)[..., :4].norm()) > 0.2


@pytest.mark.parametrize("sampler", Diffusion.samplers)
def test_schedulers_that_clip_correctly_are_left_to_it(network: LaMambaDiff, sampler: str) -> None:
    scheduler = make_scheduler(Diffusion(), sampler, 5, clip_sample=True)
    generators = [torch.Generator().manual_seed(4)]
    x, options = torch.randn((1, 1, 8, 8), generator=generators[0]), {}
    if sampler in ("ancestral", "ancestral-cosine", "sde-dpm++"):
        options = {"generator": generators}
    with torch.no_grad():
        for t in scheduler.timesteps:
            out = network(x, t.expand(1), torch.tensor([1]))
            out = out if sampler == "ancestral" else out.chunk(2, dim=1)[0]  # which takes the variance too
            x = scheduler.step(out, t, x, return_dict=False, **options)[0]
    previews: list[Tensor] = []
    clipped = sample(
        network, Diffusion(), [1], [4], sampler=sampler, num_steps=5, clip_sample=True,
        callback=lambda step: previews.append(step.x_0),
    )  # fmt: skip
    assert torch.equal(clipped, x)
    assert not torch.equal(clipped, sample(network, Diffusion(), [1], [4], sampler=sampler, num_steps=5))
    assert max(float(x_0.abs().max()) for x_0 in previews) <= 1 + 1e-4


def test_weights_of_labels_are_labels_and_their_mixtures(network: LaMambaDiff) -> None:
    rows = torch.tensor([[0.0, 1, 0, 0], [0, 0, 0, 1]])
    x = sample(network, Diffusion(), rows, [1, 2], num_steps=3, guidance_scale=2.0)
    assert torch.equal(x, sample(network, Diffusion(), [1, 3], [1, 2], num_steps=3, guidance_scale=2.0))
    beside = torch.cat([rows[:1], torch.tensor([[0.5, 0.5, 0, 0]])])
    mixed = sample(network, Diffusion(), beside, [1, 2], num_steps=3, guidance_scale=2.0)
    torch.testing.assert_close(mixed[0], x[0], atol=1e-4, rtol=1e-4)
    for wrong in (torch.ones(1, 3), torch.full((1, 4), float("nan")), torch.ones(4)):
        with pytest.raises(ConfigError, match=r"weights of labels are .*: give \(b, 4\) finite ones"):
            sample(network, Diffusion(), wrong, [1], num_steps=1)


def test_a_device_that_is_not_there_is_named() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"device 'gpu' cannot be used here.*try cpu"):
        choose_device("gpu")


@pytest.mark.parametrize(("scale", "times"), [(2, 2), (None, 10)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_holds_the_images_in_rows(channels: int, scale: int | None, times: int) -> None:
    images = np.arange(5 * channels, dtype=np.uint8).reshape(5, channels, 1, 1) * np.ones((4, 6), np.uint8)
    grid = np.asarray(make_grid(images, columns=3, padding=2, scale=scale))
    assert grid.shape[:2] == (times * (2 * 6 + 2), times * (3 * 8 + 2))
    grid = grid.reshape(*grid.shape[:2], channels)[::times, ::times]
    for index, image in enumerate(images):
        top, left = 2 + 6 * (index // 3), 2 + 8 * (index % 3)
        assert np.array_equal(grid[top : top + 4, left : left + 6], image.transpose(1, 2, 0))
    assert bool((grid[8:12, 18:24] == 255).all()), "the place of the sixth image stays white"
