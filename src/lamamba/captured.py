"""Functions of tensors that CUDA launches whole."""

from collections.abc import Callable

import torch
from torch import Tensor


class Captured:
    """A function of tensors on CUDA as a CUDA graph: recorded at the first call, and from then on launched whole.

    Every call takes tensors of the shapes of the first one, and writes to the same results again: read them before the
    next. So it is with gradients that the function leaves in parameters.
    """

    def __init__(self, function: Callable[..., dict[str, Tensor]]) -> None:
        self.function = function
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        if self.graph is None:
            self._record(*inputs)
        assert self.graph is not None
        torch._foreach_copy_(self.inputs, list(inputs))
        self.graph.replay()
        return self.results

    def _record(self, *inputs: Tensor) -> None:
        self.inputs = [tensor.clone() for tensor in inputs]
        # Once as usual: kernels are compiled, and libraries allocate what they keep.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.function(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as NCCL's that watches over what it runs, may do as they like meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.results = self.function(*self.inputs)
        self.graph = graph

    def forget(self) -> None:
        """Free what was recorded."""
        if self.graph is not None:
            self.graph.reset()
            self.graph = None
