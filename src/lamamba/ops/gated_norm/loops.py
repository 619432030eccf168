"""The gated norm on a CPU, in one pass, as loops over channels that numba compiles to vector code.

README.md has the equations. Arguments are contiguous:

    y, z, out, grad_*   (b, h, w, e)          weight, bias   (e,)          sums   (b, 2, e)
"""

import numpy as np
from numba import njit

from lamamba.ops.compiled import compiled, exp, f32, moments


@njit(inline="always")
def sigmoid(z):
    """Compute 1 / (1 + e^-z) from e^-|z|, which cannot overflow."""
    u = exp(-abs(z))
    return (f32(1) if z >= 0 else u) / (f32(1) + u)


@compiled
def gated_norm_forward(y, z, weight, bias, eps, out):
    """Compute out."""
    batch, height, width, channels = y.shape
    for b in range(batch):
        for i in range(height):
            for j in range(width):
                y_p, z_p, out_p = y[b, i, j], z[b, i, j], out[b, i, j]
                mean, rstd = moments(y_p, eps)
                for c in range(channels):
                    out_p[c] = ((y_p[c] - mean) * rstd * weight[c] + bias[c]) * z_p[c] * sigmoid(z_p[c])


def gated_norm_backward(grad, y, z, weight, bias, eps, grad_y, grad_z, sums):
    """Compute the gradients of y and z, and, as sums over the pixels of each image, of weight and bias."""
    of_row, grad_normed = np.empty(sums.shape[1:], f32), np.empty(sums.shape[2], f32)
    _backward(grad, y, z, weight, bias, eps, grad_y, grad_z, sums, of_row, grad_normed)


@compiled
def _backward(grad, y, z, weight, bias, eps, grad_y, grad_z, sums, of_row, grad_normed):
    """Add up the pixels of a row first, then rows: shorter sums have smaller rounding errors."""
    batch, height, width, channels = y.shape
    grad_weight, grad_bias = of_row[0], of_row[1]
    for b in range(batch):
        sums[b] = 0
        for i in range(height):
            of_row[:] = 0
            for j in range(width):
                y_p, z_p, grad_p = y[b, i, j], z[b, i, j], grad[b, i, j]
                grad_y_p, grad_z_p = grad_y[b, i, j], grad_z[b, i, j]
                mean, rstd = moments(y_p, eps)
                along_1, along_yhat = f32(0), f32(0)
                for c in range(channels):
                    s, yhat = sigmoid(z_p[c]), (y_p[c] - mean) * rstd
                    grad_z_p[c] = grad_p[c] * (yhat * weight[c] + bias[c]) * s * (f32(1) + z_p[c] * (f32(1) - s))
                    grad_normed[c] = grad_p[c] * z_p[c] * s
                    along_1 += grad_normed[c] * weight[c]
                    along_yhat += grad_normed[c] * weight[c] * yhat
                along_1 /= f32(channels)
                along_yhat /= f32(channels)
                for c in range(channels):
                    yhat = (y_p[c] - mean) * rstd
                    grad_y_p[c] = rstd * (grad_normed[c] * weight[c] - along_1 - yhat * along_yhat)
                    grad_weight[c] += grad_normed[c] * yhat
                    grad_bias[c] += grad_normed[c]
            for k in range(2):
                for c in range(channels):
                    sums[b, k, c] += of_row[k, c]
