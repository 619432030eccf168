"""Sample an exported network with onnxruntime and NumPy alone.

    lamamba export nano --format onnx --guidance --out exported
    python examples/onnx_sampling.py exported/network.onnx --label 5 --out sandals.pgm

From the same noise, it makes the same images as `lamamba sample`, by DPM-Solver++(2M) (arXiv 2211.01095) with Karras'
spacing of the steps (arXiv 2206.00364, eq. 5). It is for networks of pixels with noise prediction, exported with
--guidance. It also samples students of `lamamba distill` in their own steps; they are exported without --guidance.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime


def noise_levels(schedule: dict, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the timesteps, and the noise over signal before and after each step."""
    beta = np.linspace(schedule["beta_start"], schedule["beta_end"], schedule["num_train_timesteps"])
    alpha_bar = np.cumprod(1 - beta)
    known = np.sqrt(1 / alpha_bar - 1)
    roots = np.linspace(known[-1] ** (1 / 7), known[0] ** (1 / 7), num_steps)
    timesteps = np.interp(np.log(roots**7), np.log(known), np.arange(len(known))).round()
    return timesteps, np.append(roots**7, 0)


def sample(
    session: onnxruntime.InferenceSession, labels: list[int], noise: np.ndarray, num_steps: int, guidance: float
) -> np.ndarray:
    """Turn noise (b, c, h, w) into images from -1 to 1."""
    properties = json.loads(session.get_modelmeta().custom_metadata_map["lamamba"])
    if "timesteps" in properties:
        return sample_student(session, properties, labels, noise)
    assert (properties["objective"], properties["data"]["kind"], properties["guided"]) == ("diffusion", "pixels", True)
    timesteps, sigmas = noise_levels(properties["schedule"], num_steps)
    x, before, step_before = noise.astype(np.float32), None, 0.0
    for t, sigma, next_sigma in zip(timesteps, sigmas[:-1], sigmas[1:], strict=True):
        inputs = {"x_t": x, "t": np.full(len(x), t, np.float32), "y": np.array(labels, np.int64)}
        out = session.run(None, inputs | {"guidance": np.array(guidance, np.float32)})[0]
        signal, next_signal = (1 + sigma**2) ** -0.5, (1 + next_sigma**2) ** -0.5
        x_0 = np.clip(x / signal - sigma * out[:, : x.shape[1]], -1, 1)
        if next_sigma == 0:
            return x_0
        step = np.log(sigma / next_sigma)
        # The second order extrapolates from the clean image of the step before.
        extrapolated = x_0 if before is None else x_0 + step / (2 * step_before) * (x_0 - before)
        ratio = next_sigma * next_signal / (sigma * signal)
        x = (ratio * x + next_signal * (1 - next_sigma / sigma) * extrapolated).astype(np.float32)
        before, step_before = x_0, step
    return x


def sample_student(
    session: onnxruntime.InferenceSession, properties: dict, labels: list[int], noise: np.ndarray
) -> np.ndarray:
    """Take the steps that a network was distilled for: Euler for flow matching, DDIM for v-prediction."""
    assert properties["objective"] in ("flow", "diffusion-v")
    assert properties["data"]["kind"] == "pixels"
    timesteps, is_flow = np.array(properties["timesteps"]), properties["objective"] == "flow"
    if is_flow:
        noise_shares = timesteps / properties["num_timesteps"]
        signals = 1 - noise_shares
    else:
        schedule = properties["schedule"]
        beta = np.linspace(schedule["beta_start"], schedule["beta_end"], schedule["num_train_timesteps"])
        alpha_bar = np.cumprod(1 - beta)[timesteps]
        signals, noise_shares = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    signals, noise_shares = np.append(signals, 1), np.append(noise_shares, 0)  # the last step removes all noise
    x = noise.astype(np.float32)
    for index, t in enumerate(timesteps):
        inputs = {"x_t": x, "t": np.full(len(x), t, np.float32), "y": np.array(labels, np.int64)}
        predicted = session.run(None, inputs)[0][:, : x.shape[1]]
        signal, noise_share = signals[index], noise_shares[index]
        if is_flow:
            x = x + (noise_shares[index + 1] - noise_share) * predicted
        else:
            x_0 = np.clip(signal * x - noise_share * predicted, -1, 1)
            x = signals[index + 1] * x_0 + noise_shares[index + 1] / noise_share * (x - signal * x_0)
        x = x.astype(np.float32)
    return np.clip(x, -1, 1)


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
    noise = np.random.default_rng(arguments.seed).standard_normal(shape)
    images = sample(session, [arguments.label] * arguments.number, noise, arguments.steps, arguments.guidance)
    row = np.concatenate(list(images), axis=2).transpose(1, 2, 0)
    kind = b"P5" if shape[1] == 1 else b"P6"
    header = b"%s %d %d 255\n" % (kind, row.shape[1], row.shape[0])
    arguments.out.write_bytes(header + ((row + 1) * 127.5).round().astype(np.uint8).tobytes())
