"""Compile the scan's kernels for a GPU that need not be there: `compile_scan_kernels.py CAPABILITY`."""

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lamamba.ops.selective_scan import kernels


def compile_kernel(kernel: Any, constants: dict[str, Any], capability: int) -> None:
    half = {"p_x", "p_u", "p_low", "p_weight", "p_y", "p_grad_y", "p_grad_x", "p_grad_z"}
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.startswith("p_"):
            signature[name] = "*bf16" if name in half else "*fp32"
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 1})
    assert compiled.asm["cubin"]
    print("compiled", kernel.__name__)


def main() -> None:
    capability = int(sys.argv[1])
    geometry = {"HEIGHT": 32, "WIDTH": 32, "CONTINUOUS": True, "TILE": 16, "RUN": 16, "CHANNELS": 640, "RANK": 20}
    constants = {**geometry, "STATES": 1, "STATES_BLOCK": 1, "BLOCK": 64, "PRECISE": False}
    compile_kernel(kernels.forward_kernel, {**constants, "SAVE": True}, capability)
    compile_kernel(kernels.backward_kernel, constants, capability)
    compile_kernel(kernels.summary_kernel, {**constants, "BACKWARD": False}, capability)
    compile_kernel(kernels.summary_kernel, {**constants, "BACKWARD": True}, capability)


if __name__ == "__main__":
    main()
