"""Make Triton's interpreter a third faster: importing this does.

The interpreter replaces the functions of `triton.language` by versions for NumPy when a kernel is launched. It does so
again for every function that the kernel calls, which changes nothing and takes longer than most of these functions.
"""

from typing import Any

import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

call = InterpretedFunction.__call__


def call_once_replaced(function: Any, *arguments: Any, **options: Any) -> Any:
    modules = [module for module in function.fn.__globals__.values() if module is tl or module is tl.core]
    if all(getattr(module.static_range, "__name__", None) == "_new_range" for module in modules):
        return function.rewrite()(*arguments, **options)
    return call(function, *arguments, **options)


InterpretedFunction.__call__ = call_once_replaced
