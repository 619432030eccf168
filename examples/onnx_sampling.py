"""Sample an exported network with onnxruntime and NumPy alone.

    lamamba export nano --format onnx --guidance --out exported
    python examples/onnx_sampling.py exported/network.onnx --label 5 --out sandals.pgm

From the same noise, it makes the same images as `lamamba sample` with the default sampler: UniPC of second order (arXiv
2302.04867) for flow matching; DPM-Solver++(2M) (arXiv 2211.01095), which is UniPC without its corrector, with Karras'
spacing of the steps (arXiv 2206.00364, eq. 5) for noise prediction. It is for networks of pixels, exported with
--guidance. It also samples students of `lamamba distill` in their own steps; they are exported without --guidance.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime


def noise_levels(properties: dict, num_steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the timesteps, and the shares of the clean image and of noise before each step and after the last."""
    if properties["objective"] == "flow":
        noise_shares = np.linspace(1, 1 / properties["num_timesteps"], num_steps + 1)
        noise_shares[0] -= 1e-6  # a signal of 0 has no logarithm
        noise_shares = noise_shares.astype(np.float32)  # as in diffusers: matters for the signal of 1e-6
        noise_shares[-1] = 0
        return noise_shares[:-1] * properties["num_timesteps"], 1 - noise_shares, noise_shares
    alpha_bar = np.cumprod(1 - training_betas(properties["schedule"]))
    known = np.sqrt(1 / alpha_bar - 1)
    sigmas = np.linspace(known[-1] ** (1 / 7), known[0] ** (1 / 7), num_steps) ** 7
    timesteps = np.interp(np.log(sigmas), np.log(known), np.arange(len(known))).round()
    signals = (1 + np.append(sigmas, 0) ** 2) ** -0.5
    return timesteps, signals, np.append(sigmas, 0) * signals


def training_betas(schedule: dict) -> np.ndarray:
    return np.linspace(schedule["beta_start"], schedule["beta_end"], schedule["num_train_timesteps"])


def sample(
    session: onnxruntime.InferenceSession,
    labels: list[int],
    noise: np.ndarray,
    num_steps: int,
    guidance: float,
    draw: Callable[[tuple[int, ...]], np.ndarray],
) -> np.ndarray:
    """Turn noise (b, c, h, w) into images from -1 to 1; `draw` draws the noise of a student's step."""
    properties = json.loads(session.get_modelmeta().custom_metadata_map["lamamba"])
    if "timesteps" in properties:
        return sample_student(session, properties, labels, noise, draw)
    assert (properties["data"]["kind"], properties["guided"]) == ("pixels", True)
    assert properties["objective"] in ("flow", "diffusion")
    is_flow = properties["objective"] == "flow"
    timesteps, signals, noise_shares = noise_levels(properties, num_steps)
    with np.errstate(divide="ignore"):
        logs = np.log(signals / noise_shares)
    x = start = noise.astype(np.float32)  # start: x before the step that led to x
    images: list[np.ndarray] = []
    for i, t in enumerate(timesteps):
        inputs = {"x_t": x, "t": np.full(len(x), t, np.float32), "y": np.array(labels, np.int64)}
        out = session.run(None, inputs | {"guidance": np.array(guidance, np.float32)})[0][:, : x.shape[1]]
        x_0 = x - noise_shares[i] * out if is_flow else (x - noise_shares[i] * out) / signals[i]
        images.append(np.clip(x_0, -1, 1))
        if i == num_steps - 1:
            break
        start = take_step(start, i - 1, signals, noise_shares, logs, images) if is_flow and i else x
        x = take_step(start, i, signals, noise_shares, logs, images).astype(np.float32)
    return images[-1]


def take_step(
    x: np.ndarray, i: int, signals: np.ndarray, noise_shares: np.ndarray, logs: np.ndarray, images: list[np.ndarray]
) -> np.ndarray:
    """Take step i by the predictor, or by the corrector if the clean image after the step is known.

    Args:
        x: x_t before the step.
        i: index of the step.
        signals, noise_shares, logs: of all steps; the last is the logarithm of signal over noise.
        images: the clean images predicted before each step so far.
    """
    length = logs[i + 1] - logs[i]
    growth = np.expm1(-length)
    image, corrects = images[i], len(images) > i + 1
    change = length / (logs[i] - logs[i - 1]) * (image - images[i - 1]) if i else np.zeros_like(image)
    if not corrects:
        extrapolated = image + change / 2
    elif not i:
        extrapolated = (image + images[1]) / 2
    else:
        first = (growth / -length - 1) / growth
        second = 2 * ((growth / -length - 1) / -length - 1 / 2) / growth
        weight = (first - second) / (1 + (logs[i] - logs[i - 1]) / length)
        extrapolated = image + weight * change + (first - weight) * (images[i + 1] - image)
    moved: np.ndarray = noise_shares[i + 1] / noise_shares[i] * x - signals[i + 1] * growth * extrapolated
    return moved


def sample_student(
    session: onnxruntime.InferenceSession,
    properties: dict,
    labels: list[int],
    noise: np.ndarray,
    draw: Callable[[tuple[int, ...]], np.ndarray],
) -> np.ndarray:
    """Take the ancestral steps that a network was distilled for; `draw` draws the noise of a step."""
    assert properties["objective"] in ("flow", "diffusion-v")
    assert (properties["data"]["kind"], properties["sampler"][:9]) == ("pixels", "ancestral")
    timesteps, is_flow = np.array(properties["timesteps"]), properties["objective"] == "flow"
    if is_flow:
        noise_shares = timesteps / properties["num_timesteps"]
        signals = 1 - noise_shares
    else:
        alpha_bar = np.cumprod(1 - training_betas(properties["schedule"]))[timesteps]
        signals, noise_shares = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    signals, noise_shares = np.append(signals, 1), np.append(noise_shares, 0)  # the last step removes all noise
    x = noise.astype(np.float32)
    for index, t in enumerate(timesteps):
        inputs = {"x_t": x, "t": np.full(len(x), t, np.float32), "y": np.array(labels, np.int64)}
        predicted = session.run(None, inputs)[0][:, : x.shape[1]]
        (signal, earlier), (noise_share, earlier_share) = (
            level[index : index + 2] for level in (signals, noise_shares)
        )
        x_0 = np.clip((1 if is_flow else signal) * x - noise_share * predicted, -1, 1)
        ratio = signal / earlier
        variance = noise_share**2 - (ratio * earlier_share) ** 2
        mean = ratio * (earlier_share / noise_share) ** 2 * x + earlier * variance / noise_share**2 * x_0
        x = (mean + np.sqrt(variance) * earlier_share / noise_share * draw(x.shape)).astype(np.float32)
    return x


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("network", type=Path)
    parser.add_argument("--label", type=int, default=0)
    parser.add_argument("--number", type=int, default=4)
    parser.add_argument("--steps", type=int, default=25, help="of networks that were not distilled")
    parser.add_argument("--guidance", type=float, default=2.0, help="of networks that were not distilled")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("images.pgm"), help=".pgm, or .ppm for color")
    arguments = parser.parse_args()
    session = onnxruntime.InferenceSession(arguments.network)
    shape = (arguments.number, *session.get_inputs()[0].shape[1:])
    draw = np.random.default_rng(arguments.seed).standard_normal  # goes on: steps need other noise than the start
    noise = draw(shape)
    images = sample(session, [arguments.label] * arguments.number, noise, arguments.steps, arguments.guidance, draw)
    row = np.concatenate(list(images), axis=2).transpose(1, 2, 0)
    kind = b"P5" if shape[1] == 1 else b"P6"
    header = b"%s %d %d 255\n" % (kind, row.shape[1], row.shape[0])
    arguments.out.write_bytes(header + ((row + 1) * 127.5).round().astype(np.uint8).tobytes())
