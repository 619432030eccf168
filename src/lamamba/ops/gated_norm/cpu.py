"""The compiled loops of `loops.py` as one differentiable operation; threads share the images."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lamamba.ops.threads import array, share_images


class GatedNorm(torch.autograd.Function):
    """Normalize and gate y, (b, h, w, e); arguments and result as in `lamamba.ops.gated_norm`, all float32."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        from lamamba.ops.gated_norm.loops import gated_norm_forward

        out = y.new_empty(y.shape)
        shared = (array(weight), array(bias), np.float32(eps))
        share_images(gated_norm_forward, (array(y), array(z)), shared, (out.numpy(),))
        ctx.save_for_backward(y, z, weight, bias)
        ctx.eps = eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from lamamba.ops.gated_norm.loops import gated_norm_backward

        y, z, weight, bias = ctx.saved_tensors
        grad_y, grad_z, sums = y.new_empty(y.shape), y.new_empty(y.shape), y.new_empty(len(y), 2, y.shape[3])
        shared = (array(weight), array(bias), np.float32(ctx.eps))
        outputs = (grad_y.numpy(), grad_z.numpy(), sums.numpy())
        share_images(gated_norm_backward, tuple(map(array, (*grads, y, z))), shared, outputs)
        return grad_y, grad_z, *sums.sum(dim=0).unbind(), None
