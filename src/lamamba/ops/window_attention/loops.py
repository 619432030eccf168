"""Window attention on a CPU, one head of a window at a time, as loops over queries that numba compiles to vector code.

README.md has the equations. Logits and weights are transposed, (keys, queries), so that a softmax does not sum over
lanes. A window has p places. Its queries are padded with zeros to q, a multiple of LANES. Arguments are contiguous:

    qkv, grad_qkv   (b, l, 3, heads, c)        out, grad_out   (b, l, heads, c)
    places   (windows, p) pixel at each place of a window, -1 for padding
    added    (heads, windows or 1, p, q) bias and mask        grad_added   (parts, heads, p, q)
    parts    (parts, 2) first window of a thread, and the one after its last, counted over all images
"""

import numpy as np
from numba import njit

from lamamba.ops.compiled import compiled, exp, f32
from lamamba.ops.window_attention.cpu import LANES


@njit(inline="always")
def add_product(left, right, out):
    """Add the product of left, (j, m), and right, (m, q), to out; each pass over out handles four rows of right.

    LLVM keeps the values of a loop of known length in registers, which makes this four times as fast.
    """
    whole = left.shape[1] // 4 * 4
    for start in range(0, out.shape[1], LANES):
        stop = start + LANES
        for m in range(0, whole, 4):
            right_0, right_1, right_2, right_3 = (
                right[m, start:stop],
                right[m + 1, start:stop],
                right[m + 2, start:stop],
                right[m + 3, start:stop],
            )
            for j in range(out.shape[0]):
                left_0, left_1, left_2, left_3 = left[j, m], left[j, m + 1], left[j, m + 2], left[j, m + 3]
                out_j = out[j, start:stop]
                for q in range(LANES):
                    out_j[q] += left_0 * right_0[q] + left_1 * right_1[q] + left_2 * right_2[q] + left_3 * right_3[q]
        for m in range(whole, left.shape[1]):
            right_m = right[m, start:stop]
            for j in range(out.shape[0]):
                left_m, out_j = left[j, m], out[j, start:stop]
                for q in range(LANES):
                    out_j[q] += left_m * right_m[q]


@njit(inline="always")
def dot(left, right):
    """Compute the dot product of two rows, (q,)."""
    total = f32(0)
    for start in range(0, len(left), LANES):
        left_s, right_s = left[start : start + LANES], right[start : start + LANES]
        for q in range(LANES):
            total += left_s[q] * right_s[q]
    return total


@njit(inline="always")
def gather(x, places, rows):
    """Copy the pixels of a window from x, (l, c), to rows, (p, c), with zeros for padding."""
    for p in range(len(places)):
        pixel = places[p]
        for c in range(x.shape[1]):
            rows[p, c] = x[pixel, c] if pixel >= 0 else f32(0)


@njit(inline="always")
def gather_columns(x, places, factor, columns):
    """Copy the pixels of a window from x, (l, c), times a factor, to columns, (c, q)."""
    for p in range(len(places)):
        pixel = places[p]
        for c in range(x.shape[1]):
            columns[c, p] = factor * x[pixel, c] if pixel >= 0 else f32(0)


@njit(inline="always")
def compute_weights(key, query, added, weights, top, total):
    """Compute exp(logit - largest logit of the query), and 1 / their sum, per query."""
    for k in range(len(weights)):
        for q in range(len(top)):
            weights[k, q] = added[k, q]
    add_product(key, query, weights)
    for q in range(len(top)):
        top[q] = f32(-np.inf)
        total[q] = 0
    for k in range(len(weights)):
        weights_k = weights[k]
        for q in range(len(top)):
            top[q] = weights_k[q] if weights_k[q] > top[q] else top[q]
    for k in range(len(weights)):
        weights_k = weights[k]
        for q in range(len(top)):
            weights_k[q] = exp(weights_k[q] - top[q])
            total[q] += weights_k[q]
    for q in range(len(top)):
        total[q] = f32(1) / total[q]


def attention_forward(parts, qkv, places, added, scale, out):
    """Compute out."""
    channels, (num_places, num_lanes) = qkv.shape[4], added.shape[2:]
    columns, rows = np.zeros((2, channels, num_lanes), f32), np.empty((2, num_places, channels), f32)
    weights, ends = np.empty((num_places, num_lanes), f32), np.empty((2, num_lanes), f32)
    _forward(parts, qkv, places, added, scale, out, *columns, *rows, weights, *ends)


@compiled
def _forward(parts, qkv, places, added, scale, out, query, result, key, value, weights, top, total):
    num_places, channels = key.shape
    for part in range(len(parts)):
        for index in range(parts[part, 0], parts[part, 1]):
            b, window = index // len(places), index % len(places)
            places_w = places[window]
            for head in range(qkv.shape[3]):
                gather_columns(qkv[b, :, 0, head], places_w, scale, query)
                gather(qkv[b, :, 1, head], places_w, key)
                gather(qkv[b, :, 2, head], places_w, value)
                compute_weights(key, query, added[head, window % added.shape[1]], weights, top, total)
                result[:] = 0
                add_product(value.T, weights, result)
                for p in range(num_places):
                    pixel = places_w[p]
                    if pixel >= 0:
                        for c in range(channels):
                            out[b, pixel, head, c] = result[c, p] * total[p]


def attention_backward(parts, grad_out, qkv, places, added, scale, grad_qkv, grad_added):
    """Compute the gradients of qkv, and of `added`, summed over the windows of each part."""
    channels, (num_places, num_lanes) = qkv.shape[4], added.shape[2:]
    columns, rows = np.zeros((3, channels, num_lanes), f32), np.empty((2, num_places, channels), f32)
    squares, ends = np.empty((2, num_places, num_lanes), f32), np.empty((3, num_lanes), f32)
    _backward(parts, grad_out, qkv, places, added, scale, grad_qkv, grad_added, *columns, *rows, *squares, *ends)


@compiled
def _backward(
    parts, grad_out, qkv, places, added, scale, grad_qkv, grad_added,
    query, grad, grad_query, key, value, weights, grad_logits, top, total, along,
):
    num_places, channels = key.shape
    for part in range(len(parts)):
        grad_added[part] = 0
        for index in range(parts[part, 0], parts[part, 1]):
            b, window = index // len(places), index % len(places)
            places_w = places[window]
            for head in range(qkv.shape[3]):
                gather_columns(qkv[b, :, 0, head], places_w, scale, query)
                gather_columns(grad_out[b, :, head], places_w, f32(1), grad)
                gather(qkv[b, :, 1, head], places_w, key)
                gather(qkv[b, :, 2, head], places_w, value)
                compute_weights(key, query, added[head, window % added.shape[1]], weights, top, total)
                grad_logits[:] = 0
                add_product(value, grad, grad_logits)  # for now the gradient of the weights
                along[:] = 0
                for k in range(num_places):
                    weights_k, grad_logits_k = weights[k], grad_logits[k]
                    for q in range(len(along)):
                        weights_k[q] *= total[q]
                        along[q] += weights_k[q] * grad_logits_k[q]
                for k in range(num_places):
                    weights_k, grad_logits_k, grad_added_k = weights[k], grad_logits[k], grad_added[part, head, k]
                    for q in range(len(along)):
                        grad_logits_k[q] = weights_k[q] * (grad_logits_k[q] - along[q])
                        grad_added_k[q] += grad_logits_k[q]
                grad_query[:] = 0
                add_product(key.T, grad_logits, grad_query)
                for p in range(num_places):
                    pixel = places_w[p]
                    if pixel >= 0:
                        for c in range(channels):
                            grad_qkv[b, pixel, 0, head, c] = scale * grad_query[c, p]
                            grad_qkv[b, pixel, 1, head, c] = dot(grad_logits[p], query[c])
                            grad_qkv[b, pixel, 2, head, c] = dot(weights[p], grad[c])
