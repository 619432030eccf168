"""Measure exported ONNX files against PyTorch on a CPU: largest difference, and time of a step.

    python benchmarks/export.py                             # prints a table; 10 minutes
    python benchmarks/export.py nano --threads 2 --batch 4

Both run in turn, so that both see the same load. Presets get random weights; their gates, which start at 0, do too.
"""

import argparse
import statistics
import time

import numpy as np
import onnxruntime
import torch

from lamamba.checkpoints.checkpoint import load_checkpoint, shipped_weights
from lamamba.commands.export import example_inputs
from lamamba.commands.onnx_graph import build
from lamamba.model import LaMambaDiff

NETWORKS = ("nano", "emoji-64", "s-256", "s-256 raster", "s-256-16-states", "s-256-16-states raster")


def load(name: str) -> LaMambaDiff:
    if name in shipped_weights():
        return load_checkpoint(name).network.requires_grad_(False)
    preset, *scan = name.split()
    torch.manual_seed(0)
    network = LaMambaDiff.from_preset(preset, **({"scan": scan[0]} if scan else {})).eval().requires_grad_(False)
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return network


def measure(name: str, batch: int, threads: int, repetitions: int) -> str:
    network = load(name)
    size = (network.config.sample_size,) * 2
    inputs = example_inputs(network, size, guided=False, batch=batch)
    start = time.perf_counter()
    model = build(network, size, guided=False, stored="float32", computed="float32", metadata={})
    export_s = time.perf_counter() - start
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    arrays = {key: value.numpy() for key, value in inputs.items()}
    times: tuple[list[float], list[float]] = ([], [])
    with torch.inference_mode():
        wanted = network(**inputs).numpy()
        error = np.abs(session.run(None, arrays)[0] - wanted).max()
        for _ in range(repetitions):
            marks = [time.perf_counter()]
            network(**inputs)
            marks.append(time.perf_counter())
            session.run(None, arrays)
            marks.append(time.perf_counter())
            times[0].append(1000 * (marks[1] - marks[0]))
            times[1].append(1000 * (marks[2] - marks[1]))
    medians = [statistics.median(measured) for measured in times]
    least = [min(measured) for measured in times]
    return (
        f"{name:24}{batch:6}{threads:8}{len(model.graph.node):7}{export_s:9.1f}{error:10.1e}{np.abs(wanted).max():8.1f}"
        f"{medians[0]:9.0f}{medians[1]:9.0f}{medians[1] / medians[0]:8.2f}{least[1] / least[0]:8.2f}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}; times in ms, ratio of medians and of minima"
    )
    print("network                  batch threads  nodes  build s   differs  largest  PyTorch     ONNX  ratio  minima")
    for network in arguments.networks:
        print(measure(network, arguments.batch, arguments.threads, arguments.repetitions), flush=True)
