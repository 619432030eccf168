"""Measure the time of a training step by group of operations, and compare each group with the hardware's limit.

The limit of an operation is the longer of two times: reading its inputs and writing its outputs once at the copy
bandwidth, or computing its matrix products at the measured peak. The limit of a group is the sum over its operations.
Fusing two operations would lower it.
"""

import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# The first pattern that matches an operation's name decides its group. Each operation of lamamba is its own group.
GROUPS = (
    ("optimizer", r"adam|foreach"),
    ("matrix products", r"mm$|baddbmm|linear|matmul|mm_backward"),
    ("attention", r"attention"),
    ("convolution", r"conv"),
    ("norms", r"norm"),
    ("copies and casts", r"copy|clone|contiguous|^aten::to$|^aten::cat$|fill_|zero"),
    ("sums", r"sum|mean"),
)
OVERWRITES = ("copy_", "fill_", "zero_")
MOVES_NOTHING = re.compile(r"^(empty|new_empty|detach|alias|_unsafe_view|lift)")


def group_of(names: list[str]) -> str:
    """Return the group of an operation; `names` lists the operation and its callers, innermost first."""
    for name in names:
        if name.startswith("lamamba::"):
            return name.removeprefix("lamamba::").replace("_", " ")
    operation = next((name for name in names if name.startswith("aten::")), names[0]).lower()
    return next((group for group, pattern in GROUPS if re.search(pattern, operation)), "elementwise and the rest")


def milliseconds_by_group(step: Callable[[], object]) -> dict[str, float]:
    """Profile one step: milliseconds per group on the GPU, or on the CPU if there is no GPU."""
    cuda = torch.cuda.is_available()
    step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiled:
        step()
        if cuda:
            torch.cuda.synchronize()
    total: dict[str, float] = defaultdict(float)
    on_device = 0.0
    for event in profiled.events():
        if event.device_type.name != "CPU":
            on_device += 0.0 if event.is_user_annotation else event.self_device_time_total
            continue
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        if spent > 0:
            names, caller = [], event
            while caller is not None:
                names.append(caller.name)
                caller = caller.cpu_parent
            total[group_of(names)] += spent
    unattributed = on_device - sum(total.values())  # kernels without an operation
    if unattributed > 1:
        total["elementwise and the rest"] += unattributed
    return {group: microseconds / 1e3 for group, microseconds in total.items()}


def limits_by_group(step: Callable[[], object], gb_per_s: float, tflop_per_s: float) -> dict[str, float]:
    """Count the operations of one step: milliseconds per group at the limits of the hardware."""
    count = _Limits(gb_per_s, tflop_per_s)
    with count:
        step()
    return dict(count.milliseconds)


class _Limits(TorchDispatchMode):
    def __init__(self, gb_per_s: float, tflop_per_s: float) -> None:
        super().__init__()
        self.gb_per_s, self.tflop_per_s = gb_per_s, tflop_per_s
        self.milliseconds: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name
        if func.is_view or MOVES_NOTHING.match(name.split("::")[1]):
            return out
        flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out) if _multiplies(func) else 0
        limit = max(_moved(func, args, kwargs, out) / self.gb_per_s / 1e6, flops / self.tflop_per_s / 1e9)
        self.milliseconds[group_of([name])] += limit
        return out


def _multiplies(func: Any) -> bool:
    return func._overloadpacket in flop_registry


def _moved(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Count the bytes that an operation reads and writes: each input and output once, in-place arguments twice."""
    given = list(zip(func._schema.arguments, args, strict=False))
    given += [(argument, kwargs[argument.name]) for argument in func._schema.arguments if argument.name in kwargs]
    moved = 0
    inputs = set()
    for argument, value in given:
        writes = argument.alias_info is not None and argument.alias_info.is_write
        passes = 2 if writes and argument.name != "grads" and not func._schema.name.endswith(OVERWRITES) else 1
        for tensor in tree_leaves(value):
            if isinstance(tensor, torch.Tensor):
                inputs.add(id(tensor))
                moved += passes * _size(tensor)
    moved += sum(_size(x) for x in tree_leaves(out) if isinstance(x, torch.Tensor) and id(x) not in inputs)
    return moved


def _size(tensor: torch.Tensor) -> int:
    # An expanded tensor is read only as often as it is stored.
    shape = (length for length, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    size = tensor.element_size()
    for length in shape:
        size *= length
    return size if tensor.numel() else 0
