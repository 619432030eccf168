"""Compile the kernels for a GPU that need not be there: `compile_kernels.py CAPABILITY`."""

import re
import sys
from collections.abc import Collection
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lamamba.ops.depthwise_convolution import kernels as convolution
from lamamba.ops.gated_norm import kernels as gated_norm
from lamamba.ops.linear_gelu import kernels as linear_gelu
from lamamba.ops.residual_norm import kernels as residual_norm
from lamamba.ops.rows import cut_rows
from lamamba.ops.selective_scan import kernels as scan
from lamamba.ops.selective_scan import product_kernels as scan_products
from lamamba.ops.selective_scan import states_kernels as states
from lamamba.ops.window_attention import kernels as window

# Activations and what is multiplied with them are bfloat16, all else that is pointed to is float32.
FLOATS = {"scale", "eps"}
HALF = {
    *("p_x", "p_u", "p_low", "p_weight", "p_y", "p_grad_y", "p_grad_x", "p_grad_z"),
    *("p_qkv", "p_out", "p_grad_out", "p_grad_qkv"),
    *("p_branch", "p_gate", "p_shift", "p_scale", "p_normed", "p_grad_normed", "p_grad_branch"),
    *("p_grad_gate", "p_grad_shift", "p_grad_scale", "p_planes", "p_z"),
}


def compile_kernel(
    kernel: Any, constants: dict[str, Any], num_warps: int, capability: int,
    carried: int | None = None, half: Collection[str] = (),
) -> None:  # fmt: skip
    """Compile, and check how many values the loop with most of them carries from turn to turn, where that is known.

    The compiler takes a variable that got the very value of another for one that did not change; the interpreter, which
    runs the tests, does not.
    """
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.startswith("p_"):
            signature[name] = "*bf16" if name in HALF or name in half else "*fp32"
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": num_warps, "num_stages": 1}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.asm["cubin"]
    if carried is not None:
        loops = re.findall(r"iter_args\((.*?)\) ->", compiled.asm["ttir"])
        assert max(loop.count("=") for loop in loops) == carried, "a loop does not carry all of its variables"
    print("compiled", kernel.__name__)


def compile_scan(capability: int) -> None:
    paths = {
        "HEIGHT": 32,
        "WIDTH": 32,
        "CONTINUOUS": True,
        "TILE": 16,
        "RUN": 16,
        "CHANNELS": 640,
        "LOW": 96,
        "RANK": 20,
    }
    constants = {**paths, "BLOCK": 64, "PRECISE": False}
    compile_kernel(scan.scan_forward_kernel, {**constants, "SAVE": True}, 1, capability)
    compile_kernel(scan.scan_backward_kernel, constants, 1, capability)
    for backward in (False, True):
        compile_kernel(scan.scan_summary_kernel, {**constants, "BACKWARD": backward}, 1, capability)
    # Two states a turn of the loop, as for 16 states, or one, as for 3: that compiles twice as fast.
    num_states, at_once = (16, 2) if capability == 90 else (3, 1)
    several = {**paths, "LOW": 224, "STATES": num_states, "AT_ONCE": at_once, "BLOCK": 32, "PRECISE": False}
    # Carried: sums at 16 steps, of y or of two gradients; of each state B and C, A, itself, backward two gradients.
    compile_kernel(states.states_forward_kernel, {**several, "SAVE": True}, 1, capability, carried=16 + at_once * 3)
    compile_kernel(states.states_backward_kernel, several, 1, capability, carried=2 * 16 + at_once * 5)
    compile_kernel(states.states_summary_kernel, {**several, "BACKWARD": True}, 1, capability)
    for kernel in (states.to_paths_kernel, states.from_paths_kernel):
        compile_kernel(kernel, {**several, "VALUES": 32, "STEPS": 64}, 4, capability, half={"p_grad_low"})
    low = {"RANK": 20, "LOW": 96, "WIDTH": 640}
    constants = {**low, "ROWS": 64, "PIECE": 128, "PIECES": 5, "RANK_BLOCK": 32}
    compile_kernel(scan_products.steps_backward_kernel, constants, 4, capability, half={"p_grad_low"})
    constants = {"PROJECTED": 96, "WIDTH": 640, "ROWS": 64, "BLOCK": 64, "LOW": 64}
    compile_kernel(scan_products.sum_and_project_kernel, constants, 4, capability, half={"p_grad_low"})


def compile_window(capability: int) -> None:
    windows = {"HEIGHT": 32, "WIDTH": 32, "SIDE_Y": 8, "SIDE_X": 8, "SHIFT_Y": 4, "SHIFT_X": 4, "PLACES": 64}
    constants = {**windows, "WINDOW": 8, "HEADS": 16, "CHANNELS": 20, "BLOCK": 32}
    for kernel in (window.attention_forward_kernel, window.attention_backward_kernel):
        compile_kernel(kernel, constants, 4, capability)
    sums = {"STRIDE": 960, "WIDTH": 320, "ROWS": 32, "BLOCK": 64}
    compile_kernel(window.column_sum_kernel, sums, 4, capability)


def compile_convolution(capability: int) -> None:
    shape = {"HEIGHT": 32, "WIDTH": 32, "STRIDE": 1280, "CHANNELS": 640, "FAST": True}
    constants = {**shape, "ROWS": 8, "COLUMNS": 32, "BLOCK": 64}
    # Columns of 8 rows and their margins: two of x forwards; two of x, two of the gradient and ten sums backwards.
    compile_kernel(convolution.convolution_forward_kernel, constants, 1, capability, carried=2 * 10)
    compile_kernel(convolution.convolution_backward_kernel, constants, 1, capability, carried=2 * 12 + 2 * 10 + 10)
    for kernel in (convolution.convolution_forward_kernel, convolution.convolution_backward_kernel):
        compile_kernel(kernel, {**constants, "p_bias": None}, 1, capability)


def compile_residual_norm(capability: int) -> None:
    constants = cut_rows(channels=320, num_rows=1024)
    num_warps = constants.pop("num_warps")
    del constants["num_stages"]
    forward, backward = residual_norm.residual_norm_forward_kernel, residual_norm.residual_norm_backward_kernel
    compile_kernel(forward, constants, num_warps, capability)
    compile_kernel(backward, {**constants, "SUMS": 4}, num_warps, capability)
    without_bias = {"p_branch_bias": None, "p_grad_branch_bias": None, "SUMS": 3}
    without_norm = without_bias | dict.fromkeys(("p_weight", "p_scale", "p_grad_normed"))
    for kernel, others in (
        (forward, {"p_bias": None, "p_shift": None, "p_normed": None}),
        (backward, {"p_x_new": None, "p_grad_x": None}),
    ):
        compile_kernel(kernel, {**constants, **without_bias}, num_warps, capability)
        compile_kernel(kernel, {**constants, **without_norm, **others}, num_warps, capability)
    compile_kernel(
        residual_norm.residual_norm_sum_kernel, {"CHANNELS": 320, "BLOCK": 64, "ROWS": 8, "SUMS": 4}, 2, capability
    )


def compile_gated_norm(capability: int) -> None:
    constants = cut_rows(channels=640, num_rows=1024)
    num_warps = constants.pop("num_warps")
    del constants["num_stages"]
    compile_kernel(gated_norm.gated_norm_forward_kernel, {**constants, "PLANES": 2}, num_warps, capability)
    compile_kernel(gated_norm.gated_norm_backward_kernel, constants, num_warps, capability)


def compile_linear_gelu(capability: int) -> None:
    constants = linear_gelu.cut_columns(channels=1280, num_rows=131072)
    num_warps = constants.pop("num_warps")
    del constants["num_stages"]
    for kernel in (linear_gelu.linear_gelu_forward_kernel, linear_gelu.linear_gelu_backward_kernel):
        compile_kernel(kernel, constants, num_warps, capability)


if __name__ == "__main__":
    for compile_all in (
        compile_convolution, compile_gated_norm, compile_linear_gelu, compile_residual_norm, compile_scan,
        compile_window,
    ):  # fmt: skip
        compile_all(int(sys.argv[1]))
