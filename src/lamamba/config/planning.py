"""Options of `lamamba info` and `lamamba plan`."""

import math
from dataclasses import dataclass
from typing import Annotated

from lamamba.config.checks import MAX_IMAGES, check_option, check_range, check_size
from lamamba.config.options import Option


@dataclass(frozen=True)
class InfoConfig:
    """Count parameters and multiply-adds, stage by stage."""

    network: Annotated[str, Option(positional=True)]
    """A preset, a run folder, a checkpoint folder, shipped weights (nano, emoji-64), a pipeline folder, or user/name on
    the hub."""
    size: tuple[int, int] | None = None
    """Height and width of the network's input, in latents or pixels; the default is the training size."""
    ssm_state_size: int | None = None
    """States of each channel of the scan, for a preset; the default is the preset's."""

    def __post_init__(self) -> None:
        check_size("size", self.size, most=4096)  # for larger sizes, the scan order alone takes gigabytes


@dataclass(frozen=True)
class PlanConfig:
    """Predict the speed, duration and memory of training on a cluster, from measurements on one and two GPUs."""

    preset: Annotated[str, Option(positional=True)]
    """The network: nano, or s, b, l or xl with -256 or -512, and 16 states if -16-states follows."""
    gpus: int = 8
    """Total number of GPUs."""
    gpus_per_host: int = 8
    """GPUs in a host, connected by NVLink."""
    batch_size: int | None = None
    """Images per optimizer step over all GPUs; the default is 32 per GPU."""
    num_images: int = 400_000_000
    """Length of the training, in images seen."""
    shard: bool = False
    """Shard weights, optimizer state and EMAs across all GPUs."""
    power_averages: int = 0
    """Number of EMAs that train --power-averages keeps."""
    gpu: str = "H100"
    """Part of the GPU's name. For other GPUs than the measured one, times are scaled by peak TFLOP/s."""
    gpu_memory_gib: float = 79.0
    """Memory of a GPU; an 80 GB H100 has 79 GiB."""
    images_per_s: float | None = None
    """Measured speed of one such GPU with its share of the batch; the default is predicted."""
    link_gbytes_per_s: float | None = None
    """Bandwidth from a GPU to others in its host, in GB/s; the default was measured between two GPUs."""
    network_gbytes_per_s: float = 40.0
    """Bandwidth from a GPU to other hosts, in GB/s; 40 is four fifths of one 400 Gbit/s card per GPU."""
    data_gbytes_per_s: float | None = None
    """Bandwidth of a host's disk or network storage, in GB/s; by default reading is never the limit."""

    def __post_init__(self) -> None:
        check_range(self, 1, 1_000_000, "gpus", "gpus_per_host")
        check_range(self, 1, MAX_IMAGES, "num_images")
        check_range(self, 0, math.inf, "power_averages")
        speeds = ("images_per_s", "link_gbytes_per_s", "network_gbytes_per_s", "data_gbytes_per_s")
        for name in ("gpu_memory_gib", *speeds):
            check_option(self, name, getattr(self, name) is None or getattr(self, name) > 0, "more than 0")
        fills_hosts = self.gpus <= self.gpus_per_host or self.gpus % self.gpus_per_host == 0
        check_option(self, "gpus", fills_hosts, f"a multiple of gpus_per_host {self.gpus_per_host}, or less than it")
        if self.batch_size is not None:
            below = max(1, self.batch_size // self.gpus) * self.gpus
            wanted = f"a multiple of the {self.gpus} gpus: {below} or {below + self.gpus}"
            check_option(self, "batch_size", self.batch_size > 0 and self.batch_size % self.gpus == 0, wanted)

    @property
    def images_of_a_gpu(self) -> int:
        """Images per GPU in a step."""
        return 32 if self.batch_size is None else self.batch_size // self.gpus

    @property
    def hosts(self) -> int:
        """Number of hosts."""
        return max(1, self.gpus // self.gpus_per_host)

    @property
    def gpus_in_host(self) -> int:
        """GPUs used in each host."""
        return self.gpus // self.hosts
