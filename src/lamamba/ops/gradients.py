"""Connect the forward and the backward operation of a pair."""

from collections.abc import Callable
from typing import Any

from torch import Tensor


def register_gradients(
    forward: Any, backward: Callable[..., Any], num_tensors: int, saved_output: int | None = None
) -> None:
    """Let a backward operation compute the gradients of a forward operation.

    Args:
        forward: a custom operation. It takes tensors first, then options. Only the first tensor must not be None.
        backward: takes the gradients of the outputs, the saved output, the tensors and the options; returns one
            gradient for each tensor, which is converted to its dtype. The gradient for None is ignored.
        num_tensors: number of tensors among the inputs.
        saved_output: index of an output that only the backward pass reads.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = [output] if isinstance(output, Tensor) else [*output]
        saved = [] if saved_output is None else [outputs.pop(saved_output)]
        ctx.save_for_backward(*saved, *inputs[:num_tensors])
        ctx.options, ctx.shapes = inputs[num_tensors:], [tensor.shape for tensor in outputs]
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)  # it would fill a tensor with zeros for the saved output

    def gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        of_outputs = [grad for index, grad in enumerate(grads) if index != saved_output]
        saved = ctx.saved_tensors  # gradient checkpointing allows to read them once
        tensors = saved[-num_tensors:]
        if all(grad is None for grad in of_outputs):  # nothing downstream depends on the outputs
            return (None,) * (num_tensors + len(ctx.options))
        given = (
            tensors[0].new_zeros(shape) if grad is None else grad
            for grad, shape in zip(of_outputs, ctx.shapes, strict=True)
        )
        found = backward(*given, *saved, *ctx.options)
        pairs = zip(found, tensors, strict=True)
        own = (None if tensor is None else gradient.to(tensor.dtype) for gradient, tensor in pairs)
        return *own, *(None for _ in ctx.options)

    forward.register_autograd(gradients, setup_context=setup_context)
