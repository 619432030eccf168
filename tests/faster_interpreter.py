"""Make Triton's interpreter more than twice as fast when this module is imported.

The interpreter spends most of its time describing blocks, not computing with them: every operation checks and wraps the
same shapes again. For every function that a kernel calls, it replaces the functions of `triton.language` again. It also
computes conditions of assertions that it then skips. Leaving out this work changes no result.
"""

from typing import Any

import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction

call, describe_block, make_tensor = InterpretedFunction.__call__, tl.block_type.__init__, tl.tensor.__init__
make_tuple, broadcast, numpy_type = tl.tuple.__init__, TritonSemantic.broadcast_impl_value, interpreter._get_np_dtype
check_overflow = TritonSemantic.binary_op_sanitize_overflow_impl
blocks: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}
shapes: dict[tuple[int, ...], dict[str, Any]] = {}
numpy_types: dict[str, Any] = {}


def call_once_replaced(function: Any, *arguments: Any, **options: Any) -> Any:
    """Replace functions with their NumPy versions only when a kernel is launched."""
    modules = [module for module in function.fn.__globals__.values() if module is tl or module is tl.core]
    if all(getattr(module.static_range, "__name__", None) == "_new_range" for module in modules):
        return function.rewrite()(*arguments, **options)
    return call(function, *arguments, **options)


def sizes_of(shape: Any) -> tuple[int, ...]:
    return tuple([size.value if isinstance(size, tl.constexpr) else size for size in shape])


def describe_block_once(block: Any, element_ty: Any, shape: Any) -> None:
    key = element_ty.name, sizes_of(shape)
    if key not in blocks:
        describe_block(block, element_ty, shape)
        blocks[key] = dict(vars(block))
    vars(block).update(blocks[key], element_ty=element_ty)


def make_tensor_of_known_shape(tensor: Any, handle: Any, type: Any) -> None:
    key = sizes_of(type.shape) if type.is_block() else ()
    if key not in shapes:
        make_tensor(tensor, handle, type)
        shapes[key] = dict(vars(tensor))
    vars(tensor).update(shapes[key], handle=handle, type=type, dtype=type.scalar)


class LazyType:
    """The type of a tuple, computed only when it is read, which is rare: it combines the types of all elements."""

    def __get__(self, values: Any, owner: Any) -> Any:
        if values is None:
            return self
        found = vars(values).get("type")
        return tl.core._type_for_tuple_values(values.values) if found is None else found

    def __set__(self, values: Any, value: Any) -> None:
        vars(values)["type"] = value


def make_tuple_without_type(values: Any, args: Any, type: Any = None) -> None:
    if type is None:
        values.values, values.type = list(args), None
    else:
        make_tuple(values, args, type)


def broadcast_unless_same(semantic: Any, left: Any, right: Any) -> Any:
    if left.type.is_block() and right.type.is_block() and sizes_of(left.type.shape) == sizes_of(right.type.shape):
        return left, right
    return broadcast(semantic, left, right)


def check_overflow_if_asked(semantic: Any, *arguments: Any) -> None:
    if semantic.builder.options.debug:  # otherwise, `device_assert` ignores what this computes
        check_overflow(semantic, *arguments)


def numpy_type_once(type: Any) -> Any:
    element_ty = type.element_ty if isinstance(type, tl.block_type) else type
    if element_ty.name not in numpy_types:
        numpy_types[element_ty.name] = numpy_type(element_ty)
    return numpy_types[element_ty.name]


InterpretedFunction.__call__ = call_once_replaced
tl.block_type.__init__ = describe_block_once
tl.tensor.__init__ = make_tensor_of_known_shape
tl.tuple.__init__, tl.tuple.type = make_tuple_without_type, LazyType()
TritonSemantic.broadcast_impl_value = broadcast_unless_same
TritonSemantic.binary_op_sanitize_overflow_impl = check_overflow_if_asked
interpreter._get_np_dtype = numpy_type_once
