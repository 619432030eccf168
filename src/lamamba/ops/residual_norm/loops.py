"""The gated residual and the norm on a CPU, in one pass, as loops over channels that numba compiles to vector code.

The modulated norm is computed as xhat slope + offset. `moved` is gate times the bias of the branch. Arguments are
contiguous:

    x, branch, x_new, normed, grad_*   (b, h, w, c)        gate, moved, slope, offset   (b, c)        sums   (b, 4, c)
"""

import numpy as np

from lamamba.ops.compiled import compiled, f32, moments


@compiled
def residual_norm_forward(x, branch, gate, moved, slope, offset, eps, x_new, normed):
    """Compute x_new and normed."""
    batch, height, width, channels = x.shape
    for b in range(batch):
        gate_b, moved_b, slope_b, offset_b = gate[b], moved[b], slope[b], offset[b]
        for i in range(height):
            for j in range(width):
                x_p, branch_p, x_new_p, normed_p = x[b, i, j], branch[b, i, j], x_new[b, i, j], normed[b, i, j]
                for c in range(channels):
                    x_new_p[c] = x_p[c] + gate_b[c] * branch_p[c] + moved_b[c]
                mean, rstd = moments(x_new_p, eps)
                for c in range(channels):
                    normed_p[c] = (x_new_p[c] - mean) * rstd * slope_b[c] + offset_b[c]


def residual_norm_backward(grad_new, grad_normed, x_new, branch, gate, slope, eps, grad_x, grad_branch, sums):
    """Compute the gradients of x and branch, and, as sums over pixels, of gate, moved, slope and offset."""
    of_row = np.empty((4, x_new.shape[3]), f32)
    _backward(grad_new, grad_normed, x_new, branch, gate, slope, eps, grad_x, grad_branch, sums, of_row)


@compiled
def _backward(grad_new, grad_normed, x_new, branch, gate, slope, eps, grad_x, grad_branch, sums, of_row):
    """Add up the pixels of a row first, then rows: shorter sums have smaller rounding errors."""
    batch, height, width, channels = x_new.shape
    grad_gate, grad_moved, grad_slope, grad_offset = of_row[0], of_row[1], of_row[2], of_row[3]
    for b in range(batch):
        gate_b, slope_b = gate[b], slope[b]
        sums[b] = 0
        for i in range(height):
            of_row[:] = 0
            for j in range(width):
                x_p, branch_p, grad_new_p, grad_normed_p = (
                    x_new[b, i, j],
                    branch[b, i, j],
                    grad_new[b, i, j],
                    grad_normed[b, i, j],
                )
                grad_x_p, grad_branch_p = grad_x[b, i, j], grad_branch[b, i, j]
                mean, rstd = moments(x_p, eps)
                along_1, along_xhat = f32(0), f32(0)
                for c in range(channels):
                    grad_xhat = grad_normed_p[c] * slope_b[c]
                    along_1 += grad_xhat
                    along_xhat += grad_xhat * (x_p[c] - mean)
                along_1 /= f32(channels)
                along_xhat *= rstd * rstd / f32(channels)
                for c in range(channels):
                    grad_xhat = grad_normed_p[c] * slope_b[c] - along_1 - (x_p[c] - mean) * along_xhat
                    grad_x_p[c] = grad_new_p[c] + rstd * grad_xhat
                    grad_branch_p[c] = gate_b[c] * grad_x_p[c]
                    grad_gate[c] += branch_p[c] * grad_x_p[c]
                    grad_moved[c] += grad_x_p[c]
                    grad_slope[c] += grad_normed_p[c] * ((x_p[c] - mean) * rstd)
                    grad_offset[c] += grad_normed_p[c]
            for k in range(4):
                for c in range(channels):
                    sums[b, k, c] += of_row[k, c]
