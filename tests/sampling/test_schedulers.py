"""Every scheduler of diffusers samples known data right, from noise and from an image, or is refused in one line."""

import copy
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import diffusers
import diffusers.schedulers
import pytest
import torch
from torch import Tensor

from known_data import KnownDenoiser, mixture
from lamamba.diffusion import OBJECTIVES, Diffusion
from lamamba.errors import ConfigError
from lamamba.model import LaMambaDiff
from lamamba.sampling.pipeline import LaMambaDiffPipeline
from lamamba.sampling.schedulers import Steps, check_scheduler, make_scheduler
from small_network import TINY_CONFIG

DATA = mixture([0.4, 0.6], [-0.4, 0.4], [0.12, 0.15])  # within -1 and 1
NUM_IMAGES, NUM_STEPS = 32, 50


@pytest.fixture(scope="module", params=["diffusion", "flow", "flow-x"])
def known(request: pytest.FixtureRequest) -> LaMambaDiffPipeline:
    """A pipeline whose network is perfectly trained on `DATA`."""
    return build(request.param, KnownDenoiser(OBJECTIVES[request.param], DATA))


def build(objective: str, forward: Callable[[Tensor, Tensor, Tensor], Tensor]) -> LaMambaDiffPipeline:
    network = LaMambaDiff(in_channels=1, sample_size=8, num_classes=0, **TINY_CONFIG)
    network.forward = forward  # type: ignore[method-assign, assignment]
    kind = OBJECTIVES[objective]
    pipe = LaMambaDiffPipeline(
        network, make_scheduler(kind, kind.default_sampler, 25, clip_sample=True), objective=objective
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: LaMambaDiffPipeline, num_steps: int = NUM_STEPS, **options: Any) -> Tensor:
    out: Tensor = pipe(
        num_images_per_label=NUM_IMAGES, num_inference_steps=num_steps, output_type="latent",
        generator=torch.Generator().manual_seed(1), **options,
    ).images  # fmt: skip
    return out


def draw_data() -> Tensor:
    noise = torch.randn((NUM_IMAGES, 1, 8, 8), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return DATA.destination(noise, 0, 1)


def is_right(x: Tensor) -> bool:
    """Compare mean and spread with the data's; 2048 values know both to about 0.01."""
    return abs(float(x.mean()) - DATA.mean) < 0.05 and abs(float(x.std()) / DATA.spread - 1) < 0.15


# What each scheduler can do, by default and for this network; all that is not named is refused.
EVERYTHING = {
    "diffusion": {
        "DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler",
        "SASolverScheduler", "TCDScheduler", "UniPCMultistepScheduler",
    },
    "flow": {
        "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "FlowMapEulerDiscreteScheduler",
        "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "UniPCMultistepScheduler",
    },
}  # fmt: skip
FROM_NOISE = {"diffusion": {"LMSDiscreteScheduler", "PNDMScheduler"}, "flow": {"LTXEulerAncestralRFScheduler"}}
EVERYTHING["flow-x"], FROM_NOISE["flow-x"] = EVERYTHING["flow"], FROM_NOISE["flow"]
NAMES = [name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith("Flax")]
# What some cannot be built without; SASolver has another name for what the pipeline's own scheduler is told.
NEEDED: dict[str, dict[str, Any]] = {
    "AmusedScheduler": {"mask_token_id": 0},
    "RFD4ProteinaScheduler": {"schedule_mode": "log", "noise_mode": "tan", "tsr_k": 1.0, "tsr_sigma": 1.0},
    "SASolverScheduler": {"algorithm_type": "data_prediction"},
    "UnCLIPScheduler": {"beta_schedule": "squaredcos_cap_v2"},
    "VQDiffusionScheduler": {"num_vec_classes": 4},
}


def make(name: str, pipe: LaMambaDiffPipeline, **options: Any) -> Any:
    return getattr(diffusers, name).from_config(pipe.scheduler.config, **NEEDED.get(name, {}), **options)


def copy_of(pipe: LaMambaDiffPipeline) -> LaMambaDiffPipeline:
    copied = LaMambaDiffPipeline(**pipe.components, objective=pipe.config.objective)
    copied.set_progress_bar_config(disable=True)
    return copied


@pytest.mark.parametrize("name", NAMES)
def test_each_scheduler_is_right_or_refused(known: LaMambaDiffPipeline, name: str) -> None:
    pipe = copy_of(known)
    objective = pipe.config.objective
    try:
        pipe.scheduler = make(name, pipe)
    except ImportError as error:
        pytest.skip(str(error))
    for way, options in (("noise", {}), ("image", {"image": (draw_data() / 2 + 0.5).float(), "strength": 0.5})):
        if name in EVERYTHING[objective] or (way == "noise" and name in FROM_NOISE[objective]):
            assert is_right(draw(pipe, **options)), way
            continue
        with pytest.raises(ConfigError) as refused:
            draw(pipe, **options)
        assert type(pipe.scheduler).__name__ in str(refused.value)
        assert "\n" not in str(refused.value)


RIGHT: list[tuple[str, dict[str, Any]]] = [
    ("DDIMScheduler", {"timestep_spacing": "trailing"}), ("DDIMScheduler", {"set_alpha_to_one": False}),
    ("DDIMScheduler", {"timestep_spacing": "linspace", "steps_offset": 1}), ("DDIMScheduler", {"steps_offset": 1}),
    ("DDPMScheduler", {"variance_type": "fixed_large"}), ("DDPMScheduler", {"variance_type": "learned_range"}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min", "timestep_spacing": "linspace"}),
    ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}), ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    ("HeunDiscreteScheduler", {"use_exponential_sigmas": True}), ("CogVideoXDDIMScheduler", {"snr_shift_scale": 1.0}),
    ("UniPCMultistepScheduler", {"timestep_spacing": "trailing"}),
    ("DDIMScheduler", {"trained_betas": torch.linspace(1e-4, 0.02, 1000).tolist()}),
]  # fmt: skip
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("DDIMScheduler", {"steps_offset": 900}, "cannot take 50 steps (index 1880 is out of bounds"),
    ("EulerDiscreteScheduler", {"steps_offset": 900}, "makes wrong images of what this network predicts"),
    ("DDPMScheduler", {"variance_type": "learned"}, "cannot take 50 steps"),
    ("DDIMScheduler", {"trained_betas": [0.01] * 1000}, "has other noise levels"),
    ("DDIMScheduler", {"rescale_betas_zero_snr": True}, "other noise levels than the network was trained with (resc"),
    ("EulerDiscreteScheduler", {"beta_end": 0.012}, "(beta_end 0.012)"),
    ("UniPCMultistepScheduler", {"num_train_timesteps": 500}, "(num_train_timesteps 500)"),
    ("CogVideoXDDIMScheduler", {}, "(snr_shift_scale 3.0)"),
    ("DDIMScheduler", {"prediction_type": "sample"}, "takes sample, and this network predicts noise"),
    ("LCMScheduler", {"original_inference_steps": 100}, "makes wrong images of what this network predicts"),
    ("UniPCMultistepScheduler", {"use_beta_sigmas": True, "use_karras_sigmas": False}, "makes wrong images of what"),
    ("UniPCMultistepScheduler", {"solver_type": "bh1"}, "(on known data they are not finite)"),
    ("EDMEulerScheduler", {}, "is not of the noise schedule that this network was trained with"),
]
PLAIN: dict[str, Any] = {"use_karras_sigmas": False, "timestep_spacing": "leading"}


@pytest.mark.parametrize(("name", "options"), RIGHT, ids=str)
def test_options_that_work(name: str, options: dict[str, Any]) -> None:
    pipe = build("diffusion", KnownDenoiser(Diffusion(), DATA))
    pipe.scheduler = make(name, pipe, **{**PLAIN, **options})
    assert is_right(draw(pipe))
    assert is_right(draw(pipe, image=(draw_data() / 2 + 0.5).float(), strength=0.5))


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"]
)
def test_schedulers_with_zero_terminal_snr_can_be_swapped(name: str) -> None:
    pipe = build("diffusion-v-zero-snr", KnownDenoiser(OBJECTIVES["diffusion-v-zero-snr"], DATA))
    own = pipe.scheduler.config
    assert (own.prediction_type, own.rescale_betas_zero_snr, own.timestep_spacing) == ("v_prediction", True, "trailing")
    pipe.scheduler = make(name, pipe)
    assert is_right(draw(pipe))
    pipe.scheduler = make(name, pipe, rescale_betas_zero_snr=False)
    with pytest.raises(ConfigError, match=r"other noise levels .*\(rescale_betas_zero_snr False\)"):
        draw(pipe)
    pipe.scheduler = make(name, pipe, prediction_type="epsilon")
    with pytest.raises(ConfigError, match="takes epsilon, and this network predicts v"):
        draw(pipe)


@pytest.mark.parametrize(("name", "options", "said"), WRONG, ids=str)
def test_options_that_do_not_work_are_refused(name: str, options: dict[str, Any], said: str) -> None:
    pipe = build("diffusion", KnownDenoiser(Diffusion(), DATA))
    pipe.scheduler = make(name, pipe, **{**PLAIN, **options})
    with pytest.raises(ConfigError) as refused:
        draw(pipe)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "num_steps", "options"),
    [
        ("PNDMScheduler", 3, {}), ("DEISMultistepScheduler", 1, {"use_karras_sigmas": True}),
        ("HeunDiscreteScheduler", 2, {}), ("DPMSolverMultistepScheduler", 1000, {}),
        ("FlowMatchEulerDiscreteScheduler", 20, {"invert_sigmas": True}),
        ("FlowMatchEulerDiscreteScheduler", 20, {"use_dynamic_shifting": True}),
        ("FlowMatchEulerDiscreteScheduler", 20, {"num_train_timesteps": 500}),
        ("UniPCMultistepScheduler", 20, {"use_flow_sigmas": True, "final_sigmas_type": "sigma_min"}),
    ],
)  # fmt: skip
def test_numbers_of_steps_that_do_not_work_are_refused(name: str, num_steps: int, options: dict[str, Any]) -> None:
    objective = "flow" if "Flow" in name or "use_flow_sigmas" in options else "diffusion"
    pipe = build(objective, KnownDenoiser(OBJECTIVES[objective], DATA))
    pipe.scheduler = make(name, pipe, **{**PLAIN, **options})
    with pytest.raises(ConfigError, match=name):
        draw(pipe, num_steps)


@pytest.mark.parametrize(
    ("objective", "sampler"), [(name, sampler) for name, kind in OBJECTIVES.items() for sampler in kind.samplers]
)
def test_samplers_keep_their_timesteps_for_any_number_of_steps(objective: str, sampler: str) -> None:
    kind = OBJECTIVES[objective]
    scheduler = make_scheduler(kind, sampler, 25)
    for num_steps in (2, 19, 25, 50):
        wanted = make_scheduler(kind, sampler, num_steps).timesteps
        assert torch.equal(Steps(scheduler, kind, num_steps).timesteps, wanted)
        left_out = scheduler.order * (num_steps - max(1, round(num_steps / 2)))
        assert torch.equal(Steps(scheduler, kind, num_steps, 0.5).timesteps, wanted[left_out:])


def test_the_method_that_made_schedulers_still_works() -> None:
    with pytest.warns(DeprecationWarning, match="deprecated: call lamamba.make_scheduler"):
        scheduler = Diffusion().scheduler("ddim", 20)
    assert torch.equal(scheduler.timesteps, make_scheduler(Diffusion(), "ddim", 20).timesteps)


@pytest.mark.parametrize("skip_prk_steps", [True, False])
@pytest.mark.parametrize(("num_steps", "strength"), [(10, 0.5), (50, 0.5), (100, 0.02), (50, 0.98), (1000, 0.3)])
def test_a_scheduler_with_other_first_steps_does_not_begin_with_an_image(
    skip_prk_steps: bool, num_steps: int, strength: float
) -> None:
    """PNDM repeats its first step, so that all steps would be one off if those before an image were left out."""
    scheduler = diffusers.PNDMScheduler(skip_prk_steps=skip_prk_steps, beta_schedule="linear")
    with pytest.raises(ConfigError, match="begins with steps of another kind"):
        check_scheduler(scheduler, Diffusion(), 1, pixels=True, num_steps=num_steps, strength=strength)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_scheduler_that_cuts_channels_is_refused(channels: int) -> None:
    """DPM-Solver takes the first three channels of a prediction with a learned variance, whatever it has."""
    scheduler = diffusers.DPMSolverMultistepScheduler(variance_type="learned_range")
    if channels == 3:
        check_scheduler(scheduler, Diffusion(), channels, pixels=True, num_steps=20)
    else:
        with pytest.raises(ConfigError, match="cannot take 20 steps"):
            check_scheduler(scheduler, Diffusion(), channels, pixels=True, num_steps=20)


def expected(z: Tensor, sigma: float) -> Tensor:
    """The clean image that a network expects of z = x_0 + sigma noise, if it misses a tenth of the noise.

    The data have mean 0.2 and spread 0.3. From much noise the network expects values far beyond 1, as with guidance.
    """
    x_0 = 0.2 + 0.3**2 / (0.3**2 + sigma**2) * (z - 0.2)
    return x_0 + 0.1 * (z - x_0)


def flow_of_clipped(noise: Tensor, limit: float) -> Tensor:
    """Solve the probability flow of clipped predictions in small steps."""
    sigmas = torch.logspace(3, -3, 3000, dtype=torch.float64)
    z = sigmas[0] * noise.double()
    for sigma, following in itertools.pairwise(sigmas):
        x_0 = expected(z, float(sigma)).clamp(-limit, limit)
        z = x_0 + following / sigma * (z - x_0)
    return z


CLIPPING: list[tuple[str, str, dict[str, Any]]] = [
    *(("diffusion", name, {"clip_sample": True, "thresholding": False, "clip_sample_range": limit})
      for name in ("DDIMScheduler", "DDIMParallelScheduler", "HeunDiscreteScheduler") for limit in (0.8, 1.0)),
    ("diffusion", "CogVideoXDDIMScheduler", {"clip_sample": True, "snr_shift_scale": 1.0}),
    *(("diffusion", name, {"thresholding": True, "clip_sample": False})
      for name in ("DDIMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler",
                   "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler")),
    *(("flow", name, {}) for name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")),
]  # fmt: skip


@pytest.mark.parametrize(("objective", "name", "options"), CLIPPING, ids=str)
def test_noise_belongs_to_the_clipped_image(objective: str, name: str, options: dict[str, Any]) -> None:
    kind = OBJECTIVES[objective]

    def forward(x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        signal, noise = (float(level[0]) for level in kind.levels(t))
        x_0 = expected(x_t / max(signal, 1e-4), noise / max(signal, 1e-4))
        prediction = kind.move_x_0(x_t, t, torch.zeros_like(x_t), x_0)
        return torch.cat([prediction, torch.zeros_like(prediction)], dim=1)

    pipe = build(objective, forward)
    pipe.scheduler = make(name, pipe, **options)
    noise = torch.randn((NUM_IMAGES, 1, 8, 8), generator=torch.Generator().manual_seed(1))
    right = flow_of_clipped(noise, options.get("clip_sample_range", 1.0))
    assert float((flow_of_clipped(noise, 9.0) - right).square().mean().sqrt()) > 0.1, "there is much to clip"
    for num_steps, most in ((25, 0.07), (100, 0.02)):
        assert float((draw(pipe, num_steps, latents=noise) - right).square().mean().sqrt()) < most


class Meeting:
    """A callback that waits for the other thread at every step, so that the steps of both alternate."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=120)

    def __call__(self, *_: Any) -> None:
        self.barrier.wait()


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "HeunDiscreteScheduler", "PNDMScheduler"])
def test_two_threads_share_a_pipeline(name: str) -> None:
    pipe = build("diffusion", KnownDenoiser(Diffusion(), DATA))
    pipe.scheduler = make(name, pipe)
    before = copy.deepcopy(vars(pipe.scheduler))
    noises = torch.randn((2, NUM_IMAGES, 1, 8, 8), generator=torch.Generator().manual_seed(3))
    alone = [draw(pipe, 10, latents=noise) for noise in noises]
    meet = Meeting()
    with ThreadPoolExecutor(2) as threads:
        together = threads.map(lambda noise: draw(pipe, 10, latents=noise, callback_on_step_end=meet), noises)
    for first, second in zip(alone, together, strict=True):
        assert torch.equal(first, second)
    assert str(vars(pipe.scheduler)) == str(before), "calls leave nothing behind"


def test_a_callback_ends_the_call_of_its_own_thread_and_anyone_else_all() -> None:
    pipe = build("diffusion", KnownDenoiser(Diffusion(), DATA))
    barrier, seen = threading.Barrier(2, timeout=120), {"first": 0, "second": 0}

    def run(name: str, last: int) -> None:
        def note(pipe: LaMambaDiffPipeline, index: int, *_: Any) -> None:
            seen[name] += 1
            pipe._interrupt = pipe._interrupt or index == last
            if index < 2:  # while both run
                barrier.wait()

        draw(pipe, 8, callback_on_step_end=note)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(run, ("first", "second"), (1, 99)))
    assert seen == {"first": 2, "second": 8}

    started, go_on = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        seen["first"] += 1
        started.set()
        assert go_on.wait(120)

    with ThreadPoolExecutor(1) as threads:
        seen["first"] = 0
        running = threads.submit(draw, pipe, 8, callback_on_step_end=wait)
        assert started.wait(120)
        pipe._interrupt = True
        go_on.set()
        running.result()
    assert seen["first"] == 1
