"""Check the shapes of an operation's inputs."""

from collections.abc import Mapping, Sequence

from torch import Tensor


def check_dimensions(operation: str, name: str, x: Tensor, dimensions: str) -> None:
    """Raise ValueError unless a tensor has as many dimensions as this text names, such as "b h w c", none of them 0."""
    names = dimensions.split()
    if x.ndim != len(names) or 0 in x.shape:
        raise ValueError(f"{operation}: {name} is {tuple(x.shape)}: give ({', '.join(names)}), none of them 0")


def check_shapes(operation: str, given: str, wanted: Mapping[str, tuple[Tensor | None, Sequence[int]]]) -> None:
    """Raise ValueError unless tensors have the shapes that follow from what is `given`; None is accepted."""
    for name, (x, shape) in wanted.items():
        if x is not None and tuple(x.shape) != tuple(shape):
            raise ValueError(f"{operation}: {name} is {tuple(x.shape)}: with {given} it must be {tuple(shape)}")
