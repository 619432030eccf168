"""The compiled loops of `loops.py` as one differentiable operation; threads share the images."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lamamba.ops.threads import array, share_images


class ResidualNorm(torch.autograd.Function):
    """Compute x_new = x + gate branch + moved, and normed = xhat slope + offset.

    x, branch, x_new, normed: (b, h, w, c); gate, moved, slope, offset: (b, c); all float32.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor, gate: Tensor, moved: Tensor, slope: Tensor, offset: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        from lamamba.ops.residual_norm.loops import residual_norm_forward

        x_new, normed = x.new_empty(x.shape), x.new_empty(x.shape)
        inputs = tuple(map(array, (x, branch, gate, moved, slope, offset)))
        share_images(residual_norm_forward, inputs, (np.float32(eps),), (x_new.numpy(), normed.numpy()))
        ctx.save_for_backward(x_new, branch, gate, slope)
        ctx.eps = eps
        return x_new, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from lamamba.ops.residual_norm.loops import residual_norm_backward

        x_new, branch, gate, slope = ctx.saved_tensors
        grad_x, grad_branch = x_new.new_empty(x_new.shape), x_new.new_empty(x_new.shape)
        sums = x_new.new_empty(len(gate), 4, gate.shape[1])
        inputs = tuple(map(array, (*grads, x_new, branch, gate, slope)))
        outputs = (grad_x.numpy(), grad_branch.numpy(), sums.numpy())
        share_images(residual_norm_backward, inputs, (np.float32(ctx.eps),), outputs)
        return grad_x, grad_branch, *sums.unbind(1), None
