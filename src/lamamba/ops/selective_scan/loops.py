"""The scans of a grid on a CPU, one step after the other, as loops over channels that numba compiles to vector code.

README.md has the equations. Arguments are contiguous and do not overlap:

    x, y, grad_x, grad_y   (b, l, e)           low, grad_low   (b, l, 4, r + 2 n)        order   (4, l)
    weight   (4, r, e)     bias   (4, e)       A   (4, n, e)   skip   (e,)               grad_*   (b, ...) of these
"""

import numpy as np
from numba import njit

from lamamba.ops.compiled import compiled, exp, f32
from lamamba.ops.selective_scan.cpu import TILE


@njit(inline="always")
def softplus(z):
    """Compute log(1 + e^z) as max(z, 0) + log(1 + u), u = e^-|z|, with the series of 2 artanh(u / (2 + u))."""
    u = exp(-abs(z))
    s = u / (u + f32(2))
    q = s * s
    p = f32(1 / 13)
    for coefficient in (f32(1 / 11), f32(1 / 9), f32(1 / 7), f32(1 / 5), f32(1 / 3), f32(1)):
        p = p * q + coefficient
    return f32(0.5) * (z + abs(z)) + f32(2) * s * p


@njit(inline="always")
def copy(start, h):
    """Copy states, (n, e), from start to h."""
    for s in range(len(h)):
        for c in range(h.shape[1]):
            h[s, c] = start[s, c]


@njit(inline="always")
def compute_delta(low, weight, bias, delta):
    """Compute the delta of one step, (e,)."""
    for c in range(len(delta)):
        delta[c] = bias[c]
    for j in range(len(weight)):
        for c in range(len(delta)):
            delta[c] += weight[j, c] * low[j]
    for c in range(len(delta)):
        delta[c] = softplus(delta[c])


def scan_forward(x, low, weight, bias, A, skip, order, y, starts):
    """Compute y, and the states before each tile."""
    delta, h = np.empty(x.shape[2], f32), np.empty(A.shape[1:], f32)
    _scan_forward(x, low, weight, bias, A, skip, order, y, starts, delta, h)


@compiled
def _scan_forward(x, low, weight, bias, A, skip, order, y, starts, delta, h):
    length, channels = x.shape[1:]
    rank, num_states = weight.shape[1], A.shape[1]
    for b in range(len(x)):
        for pixel in range(length):
            for c in range(channels):
                y[b, pixel, c] = skip[c] * x[b, pixel, c]
        for path in range(len(order)):
            h[:] = 0
            for t in range(length):
                if t % TILE == 0:
                    copy(h, starts[b, path, t // TILE])
                pixel = order[path, t]
                u, low_t, y_t = x[b, pixel], low[b, pixel, path], y[b, pixel]
                compute_delta(low_t, weight[path], bias[path], delta)
                for s in range(num_states):
                    h_s, A_s, B, C = h[s], A[path, s], low_t[rank + s], low_t[rank + num_states + s]
                    for c in range(channels):
                        h_s[c] = exp(delta[c] * A_s[c]) * h_s[c] + delta[c] * B * u[c]
                        y_t[c] += C * h_s[c]


def scan_backward(
    x, low, starts, grad_y, weight, bias, A, skip, order,
    grad_x, grad_low, grad_weight, grad_bias, grad_A, grad_skip,
):
    """Compute all gradients; those of tensors that the images share, separately for each image."""
    delta, grad_z = np.empty((TILE, x.shape[2]), f32), np.empty(x.shape[2], f32)
    h, decay, carried = (np.empty((*tiles, *A.shape[1:]), f32) for tiles in ((TILE + 1,), (TILE,), ()))
    _scan_backward(
        x, low, starts, grad_y, weight, bias, A, skip, order,
        grad_x, grad_low, grad_weight, grad_bias, grad_A, grad_skip, delta, decay, h, carried, grad_z,
    )


@compiled
def _scan_backward(
    x, low, starts, grad_y, weight, bias, A, skip, order,
    grad_x, grad_low, grad_weight, grad_bias, grad_A, grad_skip, delta, decay, h, carried, grad_z,
):
    """Walk the tiles of a path backward; in each, first recompute the states: h[t + 1] is the state after step t."""
    length, channels = x.shape[1:]
    rank, num_states = weight.shape[1], A.shape[1]
    for b in range(len(x)):
        grad_weight[b], grad_bias[b], grad_A[b], grad_skip[b] = 0, 0, 0, 0
        for pixel in range(length):
            for c in range(channels):
                grad_x[b, pixel, c] = skip[c] * grad_y[b, pixel, c]
                grad_skip[b, c] += x[b, pixel, c] * grad_y[b, pixel, c]
        for path in range(len(order)):
            carried[:] = 0
            for tile in range(starts.shape[2] - 1, -1, -1):
                steps = order[path, tile * TILE : (tile + 1) * TILE]
                copy(starts[b, path, tile], h[0])
                for t in range(len(steps)):
                    u, low_t, delta_t = x[b, steps[t]], low[b, steps[t], path], delta[t]
                    compute_delta(low_t, weight[path], bias[path], delta_t)
                    for s in range(num_states):
                        h_s, past, decay_s, A_s, B = h[t + 1, s], h[t, s], decay[t, s], A[path, s], low_t[rank + s]
                        for c in range(channels):
                            decay_s[c] = exp(delta_t[c] * A_s[c])
                            h_s[c] = decay_s[c] * past[c] + delta_t[c] * B * u[c]

                for t in range(len(steps) - 1, -1, -1):
                    pixel = steps[t]
                    u, low_t, delta_t, dy = x[b, pixel], low[b, pixel, path], delta[t], grad_y[b, pixel]
                    grad_u, grad_low_t = grad_x[b, pixel], grad_low[b, pixel, path]
                    grad_z[:] = 0
                    for s in range(num_states):
                        h_s, past, decay_s, A_s, carried_s = h[t + 1, s], h[t, s], decay[t, s], A[path, s], carried[s]
                        B, C = low_t[rank + s], low_t[rank + num_states + s]
                        grad_A_s, grad_B, grad_C = grad_A[b, path, s], f32(0), f32(0)
                        for c in range(channels):
                            g = C * dy[c] + carried_s[c]
                            grad_C += h_s[c] * dy[c]
                            grad_B += g * delta_t[c] * u[c]
                            grad_u[c] += g * delta_t[c] * B
                            carried_s[c] = g * decay_s[c]
                            grad_A_s[c] += carried_s[c] * past[c] * delta_t[c]
                            grad_z[c] += carried_s[c] * past[c] * A_s[c] + g * B * u[c]
                        grad_low_t[rank + s], grad_low_t[rank + num_states + s] = grad_B, grad_C
                    # grad_z is still the gradient of delta = softplus(z), whose slope is 1 - e^-delta.
                    for c in range(channels):
                        grad_z[c] *= f32(1) - exp(-delta_t[c])
                        grad_bias[b, path, c] += grad_z[c]
                    for j in range(rank):
                        weight_j, grad_weight_j = weight[path, j], grad_weight[b, path, j]
                        total, low_j = f32(0), low_t[j]
                        for c in range(channels):
                            total += grad_z[c] * weight_j[c]
                            grad_weight_j[c] += grad_z[c] * low_j
                        grad_low_t[j] = total
