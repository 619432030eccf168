"""The scan of sequences on a CPU, one step after the other, as loops over channels that numba compiles to vector code.

README.md has the equations. Arguments are contiguous and do not overlap:

    u, delta, y   (b, l, w)     B, C   (b, l, n)     A, start, last   (b, n, w)     starts   (b, tiles, n, w)

Gradients have the shapes of these.
"""

import numpy as np
from numba import njit

from lamamba.ops.compiled import compiled, exp, f32
from lamamba.ops.selective_scan.cpu import TILE
from lamamba.ops.selective_scan.loops import copy


@njit(inline="always")
def decay(delta, A):
    """Compute exp(delta A), at most e^88, which is near the largest float32."""
    x = delta * A
    return exp(f32(88) if x > f32(88) else x)


@compiled
def sequences_forward(u, delta, A, B, C, start, y, h, starts):
    """Compute y, the last states, and the states before each tile."""
    for b in range(len(u)):
        copy(start[b], h[b])
        for t in range(u.shape[1]):
            if t % TILE == 0:
                copy(h[b], starts[b, t // TILE])
            u_t, delta_t, y_t = u[b, t], delta[b, t], y[b, t]
            for c in range(len(u_t)):
                y_t[c] = 0
            for s in range(A.shape[1]):
                h_s, A_s, B_s, C_s = h[b, s], A[b, s], B[b, t, s], C[b, t, s]
                for c in range(len(u_t)):
                    h_s[c] = decay(delta_t[c], A_s[c]) * h_s[c] + delta_t[c] * B_s * u_t[c]
                    y_t[c] += C_s * h_s[c]


def sequences_backward(
    grad_y, grad_last, starts, u, delta, A, B, C, grad_u, grad_delta, grad_A, grad_B, grad_C, grad_start
):
    """Compute all gradients."""
    h, decays = (np.empty((steps, *A.shape[1:]), f32) for steps in (TILE + 1, TILE))
    of_tile = np.empty(A.shape[1:], f32)
    _sequences_backward(
        grad_y, grad_last, starts, u, delta, A, B, C,
        grad_u, grad_delta, grad_A, grad_B, grad_C, grad_start, h, decays, of_tile,
    )


@compiled
def _sequences_backward(
    grad_y, grad_last, starts, u, delta, A, B, C,
    grad_u, grad_delta, grad_A, grad_B, grad_C, grad_start, h, decays, of_tile,
):
    """Walk the tiles backward; in each, first recompute the states: h[t + 1] is the state after step t.

    The gradient of A is added up over a tile first, because a sum over thousands of steps in float32 loses digits.
    """
    length, channels = u.shape[1:]
    num_states = A.shape[1]
    for b in range(len(u)):
        grad_A[b] = 0
        carried = grad_start[b]  # the gradient of the state before the step that was walked last
        copy(grad_last[b], carried)
        for tile in range(starts.shape[1] - 1, -1, -1):
            first = tile * TILE
            steps = min(TILE, length - first)
            copy(starts[b, tile], h[0])
            of_tile[:] = 0
            for t in range(steps):
                u_t, delta_t = u[b, first + t], delta[b, first + t]
                for s in range(num_states):
                    h_s, past, decay_s, A_s, B_s = h[t + 1, s], h[t, s], decays[t, s], A[b, s], B[b, first + t, s]
                    for c in range(channels):
                        decay_s[c] = decay(delta_t[c], A_s[c])
                        h_s[c] = decay_s[c] * past[c] + delta_t[c] * B_s * u_t[c]
            for t in range(steps - 1, -1, -1):
                u_t, delta_t, dy = u[b, first + t], delta[b, first + t], grad_y[b, first + t]
                grad_u_t, grad_delta_t = grad_u[b, first + t], grad_delta[b, first + t]
                for c in range(channels):
                    grad_u_t[c], grad_delta_t[c] = 0, 0
                for s in range(num_states):
                    h_s, past, decay_s, carried_s = h[t + 1, s], h[t, s], decays[t, s], carried[s]
                    A_s, of_tile_s, B_s, C_s = A[b, s], of_tile[s], B[b, first + t, s], C[b, first + t, s]
                    total_B, total_C = f32(0), f32(0)
                    for c in range(channels):
                        g = C_s * dy[c] + carried_s[c]
                        total_C += h_s[c] * dy[c]
                        total_B += g * delta_t[c] * u_t[c]
                        grad_u_t[c] += g * delta_t[c] * B_s
                        carried_s[c] = g * decay_s[c]
                        of_tile_s[c] += carried_s[c] * past[c] * delta_t[c]
                        grad_delta_t[c] += carried_s[c] * past[c] * A_s[c] + g * B_s * u_t[c]
                    grad_B[b, first + t, s], grad_C[b, first + t, s] = total_B, total_C
            for s in range(num_states):
                grad_A_s, of_tile_s = grad_A[b, s], of_tile[s]
                for c in range(channels):
                    grad_A_s[c] += of_tile_s[c]
