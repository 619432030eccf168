"""What is known before a run: `lamamba info` and `lamamba plan`."""

from dataclasses import dataclass

import tyro

from lamamba.config.checks import MAX_IMAGES, check, check_range, check_size


@dataclass(frozen=True)
class InfoConfig:
    """Count parameters and multiply-adds, stage by stage."""

    network: tyro.conf.Positional[str]
    """A preset; or a run, a checkpoint, shipped weights (nano, emoji-64), a pipeline's folder, or user/name on the
    hub."""
    size: tuple[int, int] | None = None
    """Height and width of the grid the network sees, in latents or pixels; the default is the training size."""
    ssm_state_size: int | None = None
    """Count a preset with this many states instead of its own."""

    def __post_init__(self) -> None:
        check_size("size", self.size, most=4096)  # beyond, the order of its pixels alone takes gigabytes


@dataclass(frozen=True)
class PlanConfig:
    """Predict the speed, memory and length of a training on a cluster, from what was measured on one and two GPUs."""

    preset: tyro.conf.Positional[str]
    """The network: nano, or s, b, l or xl at -256 or -512."""
    gpus: int = 8
    """GPUs in all."""
    gpus_per_host: int = 8
    """GPUs that NVLink joins."""
    batch_size: int | None = None
    """Images in a step of the optimizer, over all GPUs; the default is 32 a GPU."""
    num_images: int = 400_000_000
    """Length of the training: images seen in all."""
    shard: bool = False
    """Share parameters, moments and averages among all GPUs."""
    power_averages: int = 0
    """Averages that train --power-averages keeps."""
    gpu: str = "H100"
    """Words of the GPU's name; times are scaled by its peak TFLOP/s where it is not the measured one."""
    gpu_memory_gib: float = 79.0
    """Memory of a GPU, of which an H100 of 80 GB has 79."""
    images_per_s: float | None = None
    """Speed of one such GPU with its share of the batch, if you measured it."""
    link_gbytes_per_s: float | None = None
    """What a GPU sends to others in its host in a second; the default was measured, between two."""
    network_gbytes_per_s: float = 40.0
    """What a GPU sends to other hosts in a second; 40 is four fifths of a card of 400 Gbit/s for each GPU."""
    data_gbytes_per_s: float | None = None
    """What a host reads of its disk or network in a second; the default is enough."""

    def __post_init__(self) -> None:
        for name, most in (("gpus", 1_000_000), ("gpus_per_host", 1_000_000), ("num_images", MAX_IMAGES)):
            check_range(name, getattr(self, name), 1, most)
        check(self.power_averages >= 0, "power_averages", self.power_averages, "0 or more")
        for name in (
            "gpu_memory_gib", "images_per_s", "link_gbytes_per_s", "network_gbytes_per_s", "data_gbytes_per_s",
        ):  # fmt: skip
            check(getattr(self, name) is None or getattr(self, name) > 0, name, getattr(self, name), "more than 0")
        check(
            self.gpus <= self.gpus_per_host or self.gpus % self.gpus_per_host == 0, "gpus", self.gpus,
            f"a multiple of gpus_per_host {self.gpus_per_host}, or less than it",
        )  # fmt: skip
        if self.batch_size is not None:
            below = max(1, self.batch_size // self.gpus) * self.gpus
            check(
                self.batch_size > 0 and self.batch_size % self.gpus == 0, "batch_size", self.batch_size,
                f"a multiple of the {self.gpus} gpus: {below} or {below + self.gpus}",
            )  # fmt: skip

    @property
    def images_of_a_gpu(self) -> int:
        """Images of a step on one GPU."""
        return 32 if self.batch_size is None else self.batch_size // self.gpus

    @property
    def hosts(self) -> int:
        """Hosts that the GPUs are in."""
        return max(1, self.gpus // self.gpus_per_host)

    @property
    def gpus_in_host(self) -> int:
        """GPUs of a host that are used."""
        return self.gpus // self.hosts
