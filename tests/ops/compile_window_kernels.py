"""Compile the window attention's kernels for a GPU that need not be there: `compile_window_kernels.py CAPABILITY`."""

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lamamba.ops.window_attention import kernels


def compile_kernel(kernel: Any, constants: dict[str, Any], capability: int, warps: int = 4) -> Any:
    types = {"p_bias": "*fp32", "p_grad_bias": "*fp32", "scale": "fp32"}
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = types.get(name, "*bf16" if name.startswith("p_") else "i32")
        if name.startswith("p_"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": 1}
    )
    assert compiled.asm["cubin"]
    print("compiled", kernel.__name__)
    return compiled


def main() -> None:
    windows = {"HEIGHT": 32, "WIDTH": 32, "SIDE_Y": 8, "SIDE_X": 8, "SHIFT_Y": 4, "SHIFT_X": 4, "PLACES": 64}
    constants = {**windows, "WINDOW": 8, "HEADS": 16, "CHANNELS": 20, "BLOCK": 32}
    for kernel in (kernels.forward_kernel, kernels.backward_kernel):
        compile_kernel(kernel, constants, int(sys.argv[1]))


if __name__ == "__main__":
    main()
