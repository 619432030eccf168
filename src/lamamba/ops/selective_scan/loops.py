"""The scans of a grid on a CPU, one step after the other: loops over channels that numba compiles to vector code.

Equations in README.md. LLVM turns a loop into vector code only if it sees that what the loop writes overlaps nothing
that it reads, and it gives up on more than a few arrays: so each loop writes one array. Every argument is contiguous:

    x, y, grad_x, grad_y   (b, l, e)           low, grad_low   (b, l, 4, r + 2 n)        order   (4, l)
    weight   (4, r, e)     bias   (4, e)       A   (4, n, e)   skip   (e,)               grad_*   (b, ...) of these
"""

import numpy as np
from numba import njit

# Sums may be split over lanes; NaN and infinity keep their meaning.
compiled = njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})
f32 = np.float32


@njit(inline="always")
def exp(x):
    """e^x for x up to 0, to a unit in the last place: 2^n e^r, with |r| below ln(2) / 2."""
    x = max(x, f32(-87))
    n = np.floor(x * f32(1.44269504) + f32(0.5))
    r = x - n * f32(0.693359375) + n * f32(2.12194440e-4)  # ln 2 in two parts: the first product is exact
    p = f32(1 / 5040)
    for coefficient in (f32(1 / 720), f32(1 / 120), f32(1 / 24), f32(1 / 6), f32(1 / 2), f32(1), f32(1)):
        p = p * r + coefficient
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(inline="always")
def softplus(z):
    """log(1 + e^z) as max(z, 0) + log(1 + u), u = e^-|z|; log(1 + u) = 2 artanh(u / (2 + u)), by its series."""
    u = exp(-abs(z))
    s = u / (u + f32(2))
    q = s * s
    p = f32(1 / 13)
    for coefficient in (f32(1 / 11), f32(1 / 9), f32(1 / 7), f32(1 / 5), f32(1 / 3), f32(1)):
        p = p * q + coefficient
    return f32(0.5) * (z + abs(z)) + f32(2) * s * p


@njit(inline="always")
def compute_delta(low, weight, bias, delta):
    """Write one step's delta, (e,)."""
    for c in range(len(delta)):
        delta[c] = bias[c]
    for j in range(len(weight)):
        for c in range(len(delta)):
            delta[c] += weight[j, c] * low[j]
    for c in range(len(delta)):
        delta[c] = softplus(delta[c])


@compiled
def scan_forward(x, low, weight, bias, A, skip, order, y):
    """Write y."""
    length, channels = x.shape[1:]
    rank, num_states = weight.shape[1], A.shape[1]
    delta, h = np.empty(channels, f32), np.empty((num_states, channels), f32)
    for b in range(len(x)):
        for pixel in range(length):
            for c in range(channels):
                y[b, pixel, c] = skip[c] * x[b, pixel, c]
        for path in range(len(order)):
            h[:] = 0
            for pixel in order[path]:
                u, low_t, y_t = x[b, pixel], low[b, pixel, path], y[b, pixel]
                compute_delta(low_t, weight[path], bias[path], delta)
                for s in range(num_states):
                    h_s, A_s, B, C = h[s], A[path, s], low_t[rank + s], low_t[rank + num_states + s]
                    for c in range(channels):
                        h_s[c] = exp(delta[c] * A_s[c]) * h_s[c] + delta[c] * B * u[c]
                    for c in range(channels):
                        y_t[c] += C * h_s[c]


@compiled
def scan_backward(
    x, low, weight, bias, A, skip, order, grad_y,
    grad_x, grad_low, grad_weight, grad_bias, grad_A, grad_skip,
):  # fmt: skip
    """Write every gradient; those of what the images share, image by image."""
    length, channels = x.shape[1:]
    rank, num_states = weight.shape[1], A.shape[1]
    delta, decay = np.empty((length, channels), f32), np.empty((length, num_states, channels), f32)
    h = np.zeros((length + 1, num_states, channels), f32)  # h[t + 1] is the state after step t
    carried = np.empty((num_states, channels), f32)
    g, grad_z, slope = np.empty((3, channels), f32)
    for b in range(len(x)):
        grad_weight[b], grad_bias[b], grad_A[b], grad_skip[b] = 0, 0, 0, 0
        for pixel in range(length):
            for c in range(channels):
                grad_x[b, pixel, c] = skip[c] * grad_y[b, pixel, c]
            for c in range(channels):
                grad_skip[b, c] += x[b, pixel, c] * grad_y[b, pixel, c]
        for path in range(len(order)):
            for t in range(length):
                u, low_t, delta_t = x[b, order[path, t]], low[b, order[path, t], path], delta[t]
                compute_delta(low_t, weight[path], bias[path], delta_t)
                for s in range(num_states):
                    h_s, past, decay_s, A_s, B = h[t + 1, s], h[t, s], decay[t, s], A[path, s], low_t[rank + s]
                    for c in range(channels):
                        decay_s[c] = exp(delta_t[c] * A_s[c])
                    for c in range(channels):
                        h_s[c] = decay_s[c] * past[c] + delta_t[c] * B * u[c]

            carried[:] = 0
            for t in range(length - 1, -1, -1):
                pixel = order[path, t]
                u, low_t, delta_t, dy = x[b, pixel], low[b, pixel, path], delta[t], grad_y[b, pixel]
                grad_u, grad_low_t = grad_x[b, pixel], grad_low[b, pixel, path]
                grad_z[:] = 0
                for s in range(num_states):
                    h_s, past, decay_s, A_s, carried_s = h[t + 1, s], h[t, s], decay[t, s], A[path, s], carried[s]
                    B, C = low_t[rank + s], low_t[rank + num_states + s]
                    grad_A_s, grad_B, grad_C = grad_A[b, path, s], f32(0), f32(0)
                    for c in range(channels):
                        g[c] = C * dy[c] + carried_s[c]
                    for c in range(channels):
                        grad_C += h_s[c] * dy[c]
                        grad_B += g[c] * delta_t[c] * u[c]
                    grad_low_t[rank + s], grad_low_t[rank + num_states + s] = grad_B, grad_C
                    for c in range(channels):
                        grad_u[c] += g[c] * delta_t[c] * B
                    for c in range(channels):
                        grad_A_s[c] += g[c] * decay_s[c] * past[c] * delta_t[c]
                    for c in range(channels):
                        grad_z[c] += g[c] * (decay_s[c] * past[c] * A_s[c] + B * u[c])
                    for c in range(channels):
                        carried_s[c] = g[c] * decay_s[c]
                # So far the gradient of delta = softplus(z), whose slope is 1 - e^-delta.
                for c in range(channels):
                    slope[c] = f32(1) - exp(-delta_t[c])
                for c in range(channels):
                    grad_z[c] *= slope[c]
                for c in range(channels):
                    grad_bias[b, path, c] += grad_z[c]
                for j in range(rank):
                    total, weight_j, grad_weight_j = f32(0), weight[path, j], grad_weight[b, path, j]
                    for c in range(channels):
                        total += grad_z[c] * weight_j[c]
                    grad_low_t[j] = total
                    for c in range(channels):
                        grad_weight_j[c] += grad_z[c] * low_t[j]
