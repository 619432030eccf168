"""The pipeline for users of diffusers. It prepares the inputs of `lamamba.sampling.sample` and converts its output."""

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from lamamba.checkpoints.checkpoint import Distilled, load_checkpoint, locate
from lamamba.checkpoints.hub import fetch
from lamamba.config import GuidanceOptions
from lamamba.config.checks import MAX_SIDE, check, is_number, is_whole
from lamamba.config.sampling import DEFAULT_STEPS
from lamamba.data.decoding import convert_given
from lamamba.data.latents import IMAGE_CHANNELS, Latents, Pixels, check_autoencoder, in_parts
from lamamba.diffusion import NUM_TIMESTEPS, OBJECTIVES, Denoiser
from lamamba.errors import CheckpointError, ConfigError
from lamamba.files import utf8_path
from lamamba.files.weights import PIPELINE_INDEX
from lamamba.model import LaMambaDiff
from lamamba.sampling import Start, Step, check_strength, interpolate, sample, seeded_noise
from lamamba.sampling.captured import CapturedNetwork, capture, device_of
from lamamba.sampling.labels import Labels, check_no_label, choose_guidance, why_unguided
from lamamba.sampling.schedulers import check_scheduler, is_sampler, make_scheduler, open_scheduler

Label = str | int | Mapping[str | int, float] | Tensor | None
_MAX_IMAGES = 10_000  # per label in one call, which keeps all images in memory
_MOVING = threading.RLock()  # held while models move between devices during a call


class LaMambaDiffPipeline(DiffusionPipeline):
    """A diffusers pipeline from labels to images.

        pipe = LaMambaDiffPipeline.from_checkpoint("nano")
        pipe(class_labels=["Ankle boot", 3], num_inference_steps=20, guidance_scale=2.0).images[0]

    Args:
        network: the denoiser.
        scheduler: any scheduler of diffusers for what the network predicts: noise with the schedule of `Diffusion`, or
            the velocity of `FlowMatching`, for example. Replace it as in any pipeline:
            `pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)`.
        vae: decodes latents; None for a network of pixels.
        id2label: a name for each label; none are needed.
        objective: what the network was trained with, a name in `lamamba.diffusion.OBJECTIVES`.
        images_seen: number of images seen in training; 0 if unknown.
        distilled: steps, sampler and guidance of a distilled network (`Distilled`); None for any other.
    """

    model_cpu_offload_seq = "network->vae"
    # Operations of the network read weights of several modules at once, so all of it must be on one device.
    _exclude_from_cpu_offload = ["network"]  # noqa: RUF012
    _optional_components = ["vae"]  # noqa: RUF012 - as diffusers wants it
    _callback_tensor_inputs = ["latents", "x_0"]  # noqa: RUF012

    def __init__(
        self,
        network: LaMambaDiff,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None = None,
        id2label: Mapping[Any, str] | None = None,
        objective: str = "diffusion",
        images_seen: int = 0,
        distilled: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(network=network, scheduler=scheduler, vae=vae)
        named = {str(label): name for label, name in (id2label or {}).items()}  # as JSON has it
        self.register_to_config(id2label=named, objective=objective, images_seen=images_seen, distilled=distilled)
        self._interrupted: dict[int, bool] = {}  # by thread, while a call runs in it
        self._captured: list[CapturedNetwork] = []

    @classmethod
    def from_checkpoint(cls, name: str | Path, vae: str | Path | None = None) -> Self:
        """Build a pipeline of averaged weights, on the CPU in float32.

        Args:
            name: a run folder (its newest checkpoint), a checkpoint folder, shipped weights by their name; or a
                saved pipeline, here or on the Hugging Face hub, whose scheduler is kept.
            vae: AutoencoderKL folder; the default is the one that the network was trained with.

        Raises:
            CheckpointError: there is nothing to load.
        """
        loaded = load_checkpoint(name)
        if not isinstance(loaded.network, LaMambaDiff):
            raise CheckpointError(
                f"{name} holds a {type(loaded.network).__name__}, and this pipeline a LaMambaDiff: use lamamba.sample"
            )
        folder = vae or loaded.info.vae
        autoencoder = None
        if folder is not None:
            space = Latents.open(Path(folder), torch.device("cpu"))
            space.check_network(loaded.network.config.in_channels)
            autoencoder = space.autoencoder
            autoencoder.requires_grad_(True)  # as `from_pretrained` leaves it: convolutions round otherwise without
        objective = OBJECTIVES[loaded.info.objective]
        pixels = autoencoder is None and loaded.network.config.in_channels in IMAGE_CHANNELS
        own = loaded.info.distilled
        sampler, steps = (own.sampler, own.steps) if own else (objective.default_sampler, DEFAULT_STEPS)
        scheduler = make_scheduler(objective, sampler, steps, clip_sample=pixels)
        if (loaded.path / PIPELINE_INDEX).is_file():
            scheduler = open_scheduler(loaded.path)
        names = dict(enumerate(loaded.info.class_names))
        how = asdict(own) if own else None
        return cls(loaded.network, scheduler, autoencoder, names, objective.name, loaded.info.images, how)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **options: Any) -> Self:
        """Load what `save_pretrained` wrote, or `push_to_hub` sent; options as in diffusers.

        Raises:
            CheckpointError: there is no such pipeline, a value of its files is wrong, or weights are missing,
                unexpected, misshaped or not finite.
        """
        options.setdefault("low_cpu_mem_usage", False)  # which needs accelerate, and diffusers warns without it
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            folder = Path(cls.download(pretrained_model_name_or_path, **options))
        _, info = locate(folder)  # the network is checked by its own `from_pretrained`
        if "vae" not in options and info.vae is not None:
            check_autoencoder(Path(info.vae), options.get("variant"))
        if "scheduler" not in options and (folder / PIPELINE_INDEX).is_file():
            options["scheduler"] = open_scheduler(folder)
        return super().from_pretrained(utf8_path(folder), **options)

    @classmethod
    def download(cls, pretrained_model_name: Any, **options: Any) -> str:
        """Fetch a pipeline from the Hugging Face hub for `from_pretrained`, and return its folder in the cache.

        diffusers' own would look for the code of the network, whose class is not diffusers', in the repository. Options
        are revision, token, cache_dir, force_download and local_files_only; others change nothing of what is fetched.

        Raises:
            CheckpointError: there is no such pipeline, or the hub cannot be asked.
        """
        passed = ("revision", "token", "cache_dir", "force_download", "local_files_only")
        given = {name: options[name] for name in passed if options.get(name) is not None}
        return str(fetch(pretrained_model_name, "*.json", "*.safetensors", "*.bin", **given))

    @property
    def _execution_device(self) -> torch.device:
        """Where the network computes, which may not be where its weights are (`enable_model_cpu_offload`)."""
        return device_of(self.network)

    @property
    def labels(self) -> dict[str, int]:
        """The label of each name."""
        return {name: int(label) for label, name in self.config.id2label.items()}

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Label | Sequence[Label] | np.ndarray = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        *,
        guidance_interval: tuple[float, float] | None = None,
        guidance_cosine_power: float = 0.0,
        guidance_rescale: float = 0.0,
        weaker_network: LaMambaDiff | None = None,
        num_images_per_label: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        image: Any = None,
        strength: float = 0.6,
        mask_image: Any = None,
        max_batch_size: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., Mapping[str, Tensor] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample images.

        Each image has a random generator of its own, so that it does not depend on how many are sampled at once.
        Several threads may call one pipeline: each call works on its own copy of the scheduler.

        Args:
            class_labels: one label or several. A label is a name, a number, None for "no label", or a mixture such as
                {"Coat": 0.5, "Shirt": 0.5}, whose embeddings are averaged. Numbers may also be a tensor or an array. A
                tensor of floats (num_classes + 1,), or (b, num_classes + 1), gives the weights of the embeddings, "no
                label" last.
            num_inference_steps: number of steps of the scheduler. The default is 25, or the steps that a distilled
                network takes.
            guidance_scale: 1 is no guidance. The default is 2, or 1 for a network trained with label_dropout 0, which
                cannot be guided, and for a distilled one, which includes it; an unconditional network ignores it.
            guidance_interval: two noise levels, see `lamamba.guide`.
            guidance_cosine_power: see `lamamba.guide`.
            guidance_rescale: see `lamamba.guide`.
            weaker_network: a network to guide away from, with the same label; None is the network without a label.
            num_images_per_label: number of images of each label.
            generator: one for all images, or one for each. An image is the same on every device.
            latents: (b, c, h, w) standard normal noise to begin with; the default draws it from the generators.
            height: height in pixels; the default is the training size.
            width: width in pixels; the default is the training size.
            image: an image to start from, or one for each label. PIL images of any mode, and arrays and tensors of
                uint8 or uint16, are decoded as in training: upright, with transparency on white. Floats go from 0 to 1,
                as in diffusers: arrays (h, w, c), tensors (c, h, w).
            strength: how much noise the image starts with, more than 0, up to 1 (SDEdit, Meng et al. 2021, arXiv
                2108.01073).
            mask_image: white where the image is repainted. Where it is black or transparent, the image is put back at
                the noise level of each step (Lugmayr et al. 2022, arXiv 2201.09865, eq. 8).
            max_batch_size: number of images sampled at once. The default is all; it is halved if memory runs out.
            output_type: "pil"; "np", (b, h, w, c) from 0 to 1; "pt", (b, c, h, w) from 0 to 1; or "latent".
            return_dict: return an `ImagePipelineOutput`, or a tuple.
            callback_on_step_end: called after each step with the pipeline, the step's number, its timestep and a dict
                of tensors. It returns None, or a dict whose `latents` replace those of the step. Setting
                `pipe._interrupt` in it ends this call early; from another thread it ends all calls.
            callback_on_step_end_tensor_inputs: names in that dict: "latents", and "x_0", the clean images that the
                step's prediction implies.

        Raises:
            ConfigError: a label, a size or an option is wrong, or the scheduler does not suit the network.
        """
        is_function = callback_on_step_end is None or callable(callback_on_step_end)
        check(is_function, "callback_on_step_end", callback_on_step_end, "a function")
        wanted = callback_on_step_end_tensor_inputs
        check(isinstance(wanted, list | tuple), "callback_on_step_end_tensor_inputs", wanted, "a list of names")
        if not set(callback_on_step_end_tensor_inputs) <= set(self._callback_tensor_inputs):
            raise ConfigError(
                f"callback_on_step_end_tensor_inputs {list(callback_on_step_end_tensor_inputs)}: only "
                f"{self._callback_tensor_inputs} can be given"
            )
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ConfigError(f"output_type {output_type!r} is unknown: give pil, np, pt or latent")
        own = Distilled(**self.config.distilled) if self.config.distilled else None
        if num_inference_steps is None:
            num_inference_steps = own.steps if own else DEFAULT_STEPS
        _check_whole("num_inference_steps", num_inference_steps, NUM_TIMESTEPS)
        _check_whole("num_images_per_label", num_images_per_label, _MAX_IMAGES)
        limits = {"max_batch_size": (max_batch_size, None), "height": (height, MAX_SIDE), "width": (width, MAX_SIDE)}
        for name, (value, most) in limits.items():
            if value is not None:
                _check_whole(name, value, most)
        is_scale = guidance_scale is None or is_number(guidance_scale)
        check(is_scale, "guidance_scale", guidance_scale, "a number, 1 for no guidance")
        if mask_image is not None and image is None:
            raise ConfigError("mask_image needs the image that it is a mask of: give image")
        if image is not None:
            check_strength(strength)
        objective, channels = OBJECTIVES[self.config.objective], self._config_of_network("in_channels")
        pixels = self.vae is None and channels in IMAGE_CHANNELS
        sampler: Any = self.scheduler
        if own and is_sampler(self.scheduler, own.sampler, objective, pixels):
            sampler = own.sampler
        else:  # before an image is encoded; and None would be the default sampler for `sample`
            check_scheduler(
                sampler, objective, channels, pixels, num_inference_steps, 1.0 if image is None else strength
            )
        name = sampler if isinstance(sampler, str) else type(sampler).__name__
        if own and (objection := own.why_unsuited(name, num_inference_steps)):
            warnings.warn(objection, stacklevel=3)
        rows = [row for row in self._conditions(class_labels) for _ in range(num_images_per_label)]
        why = why_unguided(self.network.config) if weaker_network is None and own is None else None
        if why and guidance_scale is None and self._config_of_network("num_classes"):
            warnings.warn(f"guidance is off: {why}", stacklevel=3)
        if not self._config_of_network("num_classes") and weaker_network is None:
            guidance_scale = None
        guidance_scale = choose_guidance(self.network.config, guidance_scale, weaker_network is not None, own)
        size = self._grid_size(height, width)
        shape = (channels, *size)
        if latents is not None and not (isinstance(latents, Tensor) and latents.shape == (len(rows), *shape)):
            given = tuple(latents.shape) if isinstance(latents, Tensor) else f"a {type(latents).__name__}"
            raise ConfigError(f"latents are {given}: give a tensor {(len(rows), *shape)}")
        generators = self._generators(generator, len(rows))
        options = GuidanceOptions(guidance_interval, guidance_cosine_power, guidance_rescale)
        labels = torch.tensor(rows)
        network, weaker = self._captures(self.network), weaker_network and self._captures(weaker_network)

        with self._call():
            noise = seeded_noise(generators, shape) if latents is None else latents
            start = None
            if image is not None:
                mask = None if mask_image is None else self._encode_mask(mask_image, size, len(rows))
                start = Start(self._encode(image, size, len(rows)), strength, mask)

            def draw(part: slice) -> Tensor:
                if self._interrupt:
                    return noise[part].to(self._execution_device, torch.float32)
                with self.progress_bar(total=num_inference_steps) as bar:

                    def after(step: Step) -> None:
                        if callback_on_step_end is not None:
                            names = callback_on_step_end_tensor_inputs
                            step.x = self._call_back(callback_on_step_end, names, step)
                        bar.total = step.num_steps
                        bar.update()
                        step.ends = self._interrupt

                    return sample(
                        network, objective, labels[part], generators[part], sampler=sampler,
                        num_steps=num_inference_steps, guidance_scale=guidance_scale, guidance_options=options,
                        weaker=weaker, size=size, clip_sample=pixels,
                        noise=noise[part], start=start and start[part], callback=after,
                    )  # fmt: skip

            drawn = in_parts(draw, len(rows), max_batch_size or len(rows))
            images = torch.cat([x if output_type == "latent" else self._decode(x) for x in drawn])
            if output_type != "latent":
                images = self._image_processor().postprocess(images, output_type, [False] * len(images))
            self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @contextmanager
    def _call(self) -> Iterator[None]:
        """Register a call for `_interrupt`. If models move between devices, calls wait for each other."""
        here = threading.get_ident()
        outer = self._interrupted.get(here)  # a callback may call the pipeline again
        with _MOVING if hasattr(self.network, "_hf_hook") else nullcontext():
            self._interrupted[here] = False
            try:
                yield
            finally:
                del self._interrupted[here]
                if outer is not None:
                    self._interrupted[here] = outer

    @property
    def _interrupt(self) -> bool:
        """Whether the call that runs in this thread ends early."""
        return self._interrupted.get(threading.get_ident(), False)

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        here = threading.get_ident()
        for thread in [here] if here in self._interrupted else list(self._interrupted):
            self._interrupted[thread] = value

    def interpolate(
        self,
        class_labels: tuple[Label, Label],
        seeds: tuple[int, int],
        num_images: int = 8,
        *,
        height: int | None = None,
        width: int | None = None,
        **options: Any,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample images on the way from one label and seed to another, both interpolated spherically.

        Args:
            class_labels: labels of the first and the last image, which may be the same.
            seeds: seeds of the first and the last image. A sampler that adds noise adds that of the first seed to all.
            num_images: number of images with both ends, 2 or more.
            height: height in pixels; the default is the training size.
            width: width in pixels; the default is the training size.
            options: other arguments of a call, such as `num_inference_steps` and `guidance_scale`.

        Raises:
            ConfigError: as for a call; or there are fewer than two images.
        """
        _check_whole("num_images", num_images, _MAX_IMAGES)
        if num_images < 2:
            raise ConfigError(f"num_images is {num_images}: the first and the last make two")
        conditions = self._conditions(class_labels)
        if len(conditions) != 2 or not hasattr(seeds, "__len__") or len(seeds) != 2:
            raise ConfigError(
                f"there are {len(conditions)} class_labels, and seeds {seeds!r}: give two of each, of the first and "
                "the last image"
            )
        size = self._grid_size(height, width)
        labels, noise, generators = interpolate(self.network, torch.tensor(conditions), seeds, num_images, size)
        return self(list(labels), generator=generators, latents=noise, height=height, width=width, **options)

    def _call_back(
        self, callback: Callable[..., Mapping[str, Tensor] | None], names: Sequence[str], step: Step
    ) -> Tensor:
        """Call the user's callback, and return the latents to continue with."""
        values = {name: step.x_0 if name == "x_0" else step.x for name in names}
        changed = callback(self, step.index, step.t, values)
        if changed is not None and not isinstance(changed, Mapping):
            raise ConfigError(
                f"callback_on_step_end returned {type(changed).__name__}: it must return a dict such as "
                '{"latents": latents}, or None'
            )
        x = (changed or {}).get("latents", step.x)
        if not isinstance(x, Tensor) or x.shape != step.x.shape:
            given = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ConfigError(f"callback_on_step_end returned latents {given}: return a tensor {tuple(step.x.shape)}")
        return x

    def _captures(self, network: Denoiser) -> Denoiser:
        """Record a network's passes on CUDA where that works, and keep the graphs for the next call."""
        captured = capture(network)
        if not isinstance(captured, CapturedNetwork):
            return network
        captured = next((known for known in self._captured if known.network is network), captured)
        self._captured = [captured, *(known for known in self._captured if known is not captured)][:2]
        return captured

    def _config_of_network(self, name: str) -> int:
        return int(self.network.config[name])

    def _conditions(self, labels: Label | Sequence[Label] | np.ndarray) -> list[list[float]]:
        """Return the weights of all labels for each image, "no label" last."""
        if isinstance(labels, np.ndarray):
            labels = torch.from_numpy(labels) if labels.dtype.kind in "iuf" else labels.tolist()
        if isinstance(labels, Tensor) and labels.dim() == (2 if labels.is_floating_point() else 1):
            labels = list(labels)
        several = labels if isinstance(labels, Sequence) and not isinstance(labels, str) else [labels]
        if not several:
            raise ConfigError("class_labels is empty: give one or more, or None for no label")
        known = Labels(
            self._config_of_network("num_classes"), {int(k): name for k, name in self.config.id2label.items()}
        )
        conditions = [known.weights(label) for label in several]
        if any(row[-1] for row in conditions):
            check_no_label(self.network.config)
        return conditions

    def _generators(
        self, generator: torch.Generator | Sequence[torch.Generator] | None, number: int
    ) -> list[torch.Generator]:
        given = list(generator) if isinstance(generator, Sequence) else [] if generator is None else [generator]
        for one in given:
            if not isinstance(one, torch.Generator):
                raise ConfigError(f"generator is {one!r}: give torch.Generator().manual_seed(seed), or one for each")
        if isinstance(generator, Sequence):
            if len(given) != number:
                raise ConfigError(f"{len(given)} generators for {number} images: give one, or one for each")
            return given
        only = given[0] if given else None
        device = "cpu" if only is None else only.device
        seeds = torch.randint(2**63 - 1, (number,), generator=only, device=device)
        return [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]

    def _space(self) -> Pixels | Latents:
        return Pixels() if self.vae is None else Latents(self.vae)

    def _grid_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        default = self._config_of_network("sample_size")
        space = self._space()
        return (
            default if height is None else space.grid_size(height),
            default if width is None else space.grid_size(width),
        )

    def _image_processor(self, **options: Any) -> VaeImageProcessor:
        return VaeImageProcessor(vae_scale_factor=2 * self._space().factor, **options)

    def _encode(self, image: Any, size: tuple[int, int], number: int) -> Tensor:
        channels: int = self._config_of_network("in_channels") if self.vae is None else Latents(self.vae).image_channels
        if channels in IMAGE_CHANNELS:
            image = convert_given("image", image, channels)
        processor = self._image_processor(do_convert_grayscale=channels == 1)
        factor = self._space().factor
        pixels = processor.preprocess(image, size[0] * factor, size[1] * factor)
        if pixels.shape[1] != channels:
            raise ConfigError(f"image has {pixels.shape[1]} channels: give {channels}, or PIL images")
        if not pixels.abs().max() <= 1 and channels in IMAGE_CHANNELS:
            raise ConfigError("image has values outside of 0 to 1: divide them by their largest, or give uint8")
        pixels = self._space().encode_float(pixels.to(self._execution_device)).cpu()
        return _one_each("image", pixels, number)

    def _encode_mask(self, mask: Any, size: tuple[int, int], number: int) -> Tensor:
        processor = VaeImageProcessor(
            vae_scale_factor=1, do_normalize=False, do_binarize=True, do_convert_grayscale=True, resample="nearest"
        )
        # Transparent pixels keep the image: strokes on a transparent layer paint only where they are.
        if isinstance(mask, np.ndarray | Tensor):
            mask = mask if "float" in str(mask.dtype) else (mask != 0) * 1.0  # 255 and 1 are both white
        mask = convert_given("mask_image", mask, 1, background="black")
        return _one_each("mask_image", processor.preprocess(mask, *size).float(), number)

    def _decode(self, x: Tensor) -> Tensor:
        """Decode to images from 0 to 1, on the CPU."""
        return (self._space().decode_float(x) / 2 + 0.5).clamp(0, 1).cpu()


def _check_whole(name: str, value: Any, most: int | None = None) -> None:
    """Raise ConfigError unless a value is a whole number from 1 up."""
    check(is_whole(value), name, value, "a whole number")
    check(value >= 1, name, value, "1 or more")
    check(most is None or value <= most, name, value, f"{most} or less")


def _one_each(name: str, tensors: Tensor, number: int) -> Tensor:
    if len(tensors) not in (1, number):
        raise ConfigError(f"{name} has {len(tensors)} for {number} images: give one, or one for each")
    return tensors.expand(number, *tensors.shape[1:])
