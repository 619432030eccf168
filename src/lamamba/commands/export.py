"""The command `lamamba export`: write a network for other runtimes, as ONNX and as a torch.export program.

The batch is dynamic. Height and width are fixed in each file, because the paths of the scan depend on them.
"""

import json
import statistics
import warnings
from importlib import import_module
from pathlib import Path
from timeit import repeat
from typing import Any

import numpy as np
import torch
from huggingface_hub import ModelCard
from torch import Tensor, nn

from lamamba import __version__
from lamamba.checkpoints.checkpoint import CheckpointInfo, LoadedCheckpoint, load_checkpoint
from lamamba.config import ExportConfig
from lamamba.data.latents import IMAGE_CHANNELS
from lamamba.diffusion import NUM_TIMESTEPS, OBJECTIVES, Objective
from lamamba.errors import CheckpointError, ConfigError, reading
from lamamba.files import atomic_write
from lamamba.files.records import AutoencoderRecord, read_record
from lamamba.files.weights import CONFIG
from lamamba.model import LaMambaDiff, convert_parameters
from lamamba.ops.backend import use_backend
from lamamba.sampling.labels import choose_guidance, why_unguided
from lamamba.sampling.schedulers import make_scheduler
from lamamba.terminal.output import say

ONNX, PROGRAM = "network.onnx", "network.pt2"
METADATA = "lamamba"  # key of the metadata, JSON, in both files
_LARGEST_ONNX = 2**31 - 2**24  # bytes: protobuf's limit, less space for the nodes
_EXAMPLE_BATCH = 3  # torch.export would take a batch of 1 as a constant
_TOLERANCE = 1e-4


def export(config: ExportConfig) -> None:
    """Write the files, and compare what onnxruntime computes with PyTorch if onnxruntime is installed.

    Raises:
        LamambaError: the checkpoint or an option is wrong, a package is missing, or a file cannot be written.
    """
    if config.format != "onnx" and config.precision == "float16-weights":
        raise ConfigError("precision float16-weights is for ONNX only: add --format onnx")
    loaded = load_checkpoint(config.checkpoint)
    if not isinstance(loaded.network, LaMambaDiff):
        kind = type(loaded.network).__name__
        raise ConfigError(f"{config.checkpoint} holds a {kind}: only LaMambaDiff networks can be exported")
    network = loaded.network.requires_grad_(False)
    side = int(network.config.sample_size)
    size = config.size or (side, side)
    if any(length % 2 or length < 4 for length in size):
        raise ConfigError(f"size {size} has an odd side, or one below 4: give even numbers from 4 up")
    if config.guidance and (why := why_unguided(network.config, loaded.info.distilled)):
        raise ConfigError(f"{why}: leave --guidance out")
    text = json.dumps(describe(loaded, config, size))
    if config.format != "pt2":
        with atomic_write(config.out / ONNX) as temporary:
            temporary.write_bytes(_as_onnx(network, config, size, text))
        say(f"wrote {config.out / ONNX}")
        _compare(network, config, size)
    if config.format != "onnx":
        with atomic_write(config.out / PROGRAM) as temporary:
            if config.precision == "float16":
                convert_parameters(network, torch.float16)
            program = as_program(network, size, guided=config.guidance)
            renamed = temporary.with_suffix(".pt2")  # torch refuses other suffixes
            torch.export.save(program, renamed, extra_files={METADATA: text})
            renamed.replace(temporary)
        say(f"wrote {config.out / PROGRAM}")


def describe(loaded: LoadedCheckpoint, config: ExportConfig, size: tuple[int, int]) -> dict[str, Any]:
    """Collect what a program needs to sample from the network, for the metadata of the files."""
    network, info = loaded.network.config, loaded.info
    objective = OBJECTIVES[info.objective]
    unguided = why_unguided(network)
    return {
        "format": 1,
        "lamamba": __version__,
        "images_seen": info.images,
        "license": _license(loaded.path),
        "objective": info.objective,
        "schedule": dict(objective.scheduler_options),
        "num_timesteps": NUM_TIMESTEPS,
        **_describe_sampling(info, objective),
        "labels": list(info.class_names) or [str(label) for label in range(network.num_classes)],
        "null_label": None if unguided else network.num_classes,
        "guidance_scale": choose_guidance(network, None, distilled=info.distilled),
        "guided": config.guidance,
        "precision": config.precision,
        "channels": network.in_channels,
        "size": list(size),
        "data": _data(network.in_channels, info.vae),
    }


def _describe_sampling(info: CheckpointInfo, objective: Objective) -> dict[str, Any]:
    """Name the sampler; for a distilled network also its timesteps and the guidance that it includes."""
    own = info.distilled
    if own is None:
        return {"sampler": objective.default_sampler}
    timesteps = make_scheduler(objective, own.sampler, own.steps).timesteps.tolist()
    return {"sampler": own.sampler, "timesteps": timesteps, "guidance_included": own.guidance}


def _data(channels: int, vae: str | None) -> dict[str, Any]:
    """Describe what the network samples: pixels, or latents = (an autoencoder's - shift) * scale."""
    if vae is None and channels in IMAGE_CHANNELS:
        return {"kind": "pixels", "black": -1.0, "white": 1.0}
    record: AutoencoderRecord = {} if vae is None else read_record(Path(vae) / CONFIG, AutoencoderRecord)
    return {"kind": "latents", "scale": record.get("scaling_factor"), "shift": record.get("shift_factor") or 0.0}


def _license(path: Path) -> str | None:
    """Read the license from the model card beside the weights, if there is one."""
    card = path / "README.md"
    if not card.is_file():
        return None
    try:
        named = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict().get("license")
    except ValueError:  # its header is no YAML
        return None
    return named if isinstance(named, str) else None


def _as_onnx(network: LaMambaDiff, config: ExportConfig, size: tuple[int, int], text: str) -> bytes:
    width = 4 if config.precision == "float32" else 2
    num_bytes = width * network.num_parameters()
    if num_bytes > _LARGEST_ONNX:
        smaller = "use --precision float16-weights" if width == 4 else "export --format pt2"
        raise ConfigError(f"the weights have {num_bytes:,} bytes, and an ONNX file has less than 2 GiB: {smaller}")
    with reading("ONNX needs the package onnx", "pip install 'lamamba[export]'", ConfigError):
        graph = import_module("lamamba.commands.onnx_graph")
    model = graph.build(
        network,
        size,
        guided=config.guidance,
        metadata={METADATA: text},
        stored="float32" if config.precision == "float32" else "float16",
        computed="float16" if config.precision == "float16" else "float32",
    )
    return model.SerializeToString()


class Exported(nn.Module):
    """The network with the inputs of an exported file; see `as_program`."""

    def __init__(self, network: LaMambaDiff) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor, guidance: Tensor | None = None) -> Tensor:
        if guidance is None:
            return self.network(x_t, t, y)
        y = torch.cat([y, torch.full_like(y, self.network.null_label)])
        out = self.network(torch.cat([x_t, x_t]), torch.cat([t, t]), y)
        labelled, other = out.unflatten(0, (2, -1)).unbind()  # chunk would fix the batch
        predicted, variance = labelled.chunk(2, dim=1)
        worse = other.chunk(2, dim=1)[0]
        return torch.cat([worse + guidance * (predicted - worse), variance], dim=1)


def example_inputs(network: LaMambaDiff, size: tuple[int, int], guided: bool, batch: int) -> dict[str, Tensor]:
    """Draw inputs of an exported network: x_t, t, y and, if guided, guidance."""
    config, generator = network.config, torch.Generator().manual_seed(0)
    inputs = {
        "x_t": torch.randn(batch, config.in_channels, *size, generator=generator),
        "t": torch.linspace(0.9 * NUM_TIMESTEPS, 0.1 * NUM_TIMESTEPS, batch),
        "y": torch.arange(batch) % max(1, config.num_classes),
    }
    return inputs | ({"guidance": torch.tensor(2.0)} if guided else {})


def as_program(network: LaMambaDiff, size: tuple[int, int], *, guided: bool = False) -> torch.export.ExportedProgram:
    """Trace a network with torch.export, as plain PyTorch operations without the custom operations of this package.

    Args:
        network: on the CPU, in the dtype to compute in.
        size: height and width of the grid, even. They are fixed; the batch is dynamic.
        guided: add the input `guidance`, a scale (), and return guided predictions.

    Returns:
        A program (x_t, t, y) or (x_t, t, y, guidance) -> (b, 2c, h, w), with x_t (b, c, h, w) float32, t (b,) float32
        and y (b,) int64. `torch._inductor.aoti_compile_and_package` compiles it for C++.
    """
    inputs = example_inputs(network, size, guided, _EXAMPLE_BATCH)
    batch = torch.export.Dim("batch", min=1)
    shapes = {name: {0: batch} if value.ndim else None for name, value in inputs.items()}
    module = Exported(network).eval()
    with use_backend("portable"), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module(**inputs)  # computes the tables of paths and windows, which tracing would fill with placeholders
        return torch.export.export(module, (), inputs, dynamic_shapes=shapes)


def _compare(network: LaMambaDiff, config: ExportConfig, size: tuple[int, int]) -> None:
    """Print how far onnxruntime is from PyTorch, and its time of a step; raise CheckpointError if it is wrong."""
    try:
        runtime: Any = import_module("onnxruntime")
    except ImportError:
        say("not compared with PyTorch, because onnxruntime is not installed: pip install 'lamamba[export]'")
        return
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # it warns of float16 operations that it does not compute ahead of time
    session = runtime.InferenceSession((config.out / ONNX).read_bytes(), options, providers=["CPUExecutionProvider"])
    inputs = example_inputs(network, size, config.guidance, 1)
    arrays, module = {name: value.numpy() for name, value in inputs.items()}, Exported(network).eval()
    with torch.inference_mode():
        wanted, found = module(**inputs).numpy(), session.run(None, arrays)[0]  # also compiles and allocates
        torch_ms = 1000 * statistics.median(repeat(lambda: module(**inputs), number=1, repeat=3))
        onnx_ms = 1000 * statistics.median(repeat(lambda: session.run(None, arrays), number=1, repeat=3))
    error = float(np.abs(found - wanted).max())
    say(f"onnxruntime on this CPU: {onnx_ms:.0f} ms a step, PyTorch {torch_ms:.0f} ms; largest difference {error:.1e}")
    if config.precision == "float32" and not error <= _TOLERANCE * max(1.0, float(np.abs(wanted).max())):
        raise CheckpointError(
            f"{config.out / ONNX} differs from PyTorch by {error:.1e}: do not use it, and report this as a bug"
        )
