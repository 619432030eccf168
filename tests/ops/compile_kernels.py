"""Compile all kernels without a GPU: `compile_kernels.py CAPABILITY ...`, such as 80 or 90.

A block of the network runs forward and backward on a CPU while its launches are recorded. Then each kernel is compiled
once for every form of its arguments.
"""

import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton._C.libtriton import ir, llvm, passes
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend

# These import all kernels. That must happen before `knobs.runtime.interpret` is set, or they would be interpreted.
import lamamba.ops.depthwise_convolution.triton
import lamamba.ops.fused_layers.triton
import lamamba.ops.gated_norm.triton
import lamamba.ops.linear_gelu.triton
import lamamba.ops.modulation.triton
import lamamba.ops.residual_norm.triton
import lamamba.ops.selective_scan.triton
import lamamba.ops.sequence_scan.triton
import lamamba.ops.window_attention.triton  # noqa: F401
from lamamba.config import NetworkConfig
from lamamba.model import Block
from lamamba.ops import selective_scan_fn
from lamamba.ops.backend import use_backend
from lamamba.ops.fused_layers import Norm
from lamamba.ops.fused_layers.kernels import norm_linear_kernel
from lamamba.ops.fused_layers.triton import norm_linear_triton
from lamamba.ops.launch import Launch, compile_launch, record_launches
from lamamba.ops.linear_gelu import gelu_mlp
from lamamba.ops.linear_gelu.products import gelu_linear, gelu_linear_backward
from lamamba.ops.modulation import modulate_together
from lamamba.ops.residual_norm import Residual, add_gated

# Bytes of shared memory that a program can have, by compute capability (CUDA C++ Programming Guide, technical
# specifications).
SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
# The largest number of values that a loop of each kernel carries between iterations. The compiler drops a variable from
# a loop if it gets the very value of another one; the interpreter, which runs the other tests, does not.
CARRIED: dict[str, Callable[[dict[str, Any]], int]] = {
    # Columns with rows and margins. Forward: two of x. Backward: two of x, two of the gradient, and ten sums.
    "convolution_forward_kernel": lambda c: 2 * (c["ROWS"] + 2),
    "convolution_backward_kernel": lambda c: 2 * (c["ROWS"] + 4) + 2 * (c["ROWS"] + 2) + 10,
    # Forward: y at 16 steps; B and C, A and the state itself, per state; and the pointer to B and C. Backward: two
    # gradients at 16 steps, and five values per state.
    "states_forward_kernel": lambda c: 16 + 3 * c["AT_ONCE"] + 1,
    "states_backward_kernel": lambda c: 2 * 16 + 5 * c["AT_ONCE"],
}


FUSED = norm_linear_kernel.fn.__module__


class AnyGPU:
    """Replaces Triton's driver, and returns the GPU to compile for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability  # compiled kernels are cached per device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def share_coalescing() -> None:
    """Run the first passes over a kernel once for all GPUs: they take most of the time, and do the same for each."""
    convert, coalesce, others = passes.ttir.add_convert_to_ttgpuir, passes.ttgpuir.add_coalesce, CUDABackend.make_ttgir
    coalesced: dict[tuple[str, int], tuple[str, str]] = {}

    def make_ttgir(module: Any, metadata: dict[str, Any], options: Any, capability: int) -> Any:
        context, target, kernel = module.context, f'"cuda:{capability}"', (str(module), options.num_warps)
        if kernel not in coalesced:
            manager = ir.pass_manager(context)
            convert(manager, f"cuda:{capability}", options.num_warps, 32, options.num_ctas)
            coalesce(manager)
            manager.run(module, "coalesce")
            coalesced[kernel] = str(module), target
        else:
            text, first_target = coalesced[kernel]
            with tempfile.NamedTemporaryFile(suffix=".ttgir") as file:
                Path(file.name).write_text(text.replace(first_target, target))
                module = ir.parse_mlir_module(file.name, context)
            module.context = context
        return others(module, metadata, options, capability)

    passes.ttir.add_convert_to_ttgpuir = passes.ttgpuir.add_coalesce = lambda *arguments: None
    CUDABackend.make_ttgir = staticmethod(make_ttgir)


def run_block(num_states: int) -> None:
    """Run forward and backward of two blocks of S in bfloat16, which launches every kernel that has gradients."""
    config = NetworkConfig(embed_dim=64, num_heads=4, ssm_state_size=num_states)
    block = Block(config, config.embed_dim, shifted=True, project=False)
    x, condition = torch.randn(1, 32, 32, config.embed_dim, requires_grad=True), torch.randn(1, config.embed_dim)
    with torch.autocast("cpu", torch.bfloat16), use_backend("triton"):
        out, residual = block(x, condition)
        out, residual = block(out, condition, residual)
        add_gated(out, residual).float().sum().backward()


def run_fused() -> None:
    """Run the fused layers in bfloat16, each in the sizes that need most shared memory of those that pay."""
    for shape in ((2, 32, 32, 128), (16, 32, 32, 128), (8, 8, 8, 256), (2, 8, 8, 512)):
        channels = shape[3]
        x, gate = torch.empty(shape, dtype=torch.bfloat16), torch.empty(shape[0], channels, dtype=torch.bfloat16)
        block = Block(NetworkConfig(embed_dim=channels, num_heads=4), channels, shifted=True, project=False).to(x)
        with torch.no_grad(), use_backend("triton" if channels == 128 else "auto"):
            residual = Residual(x, gate, gate[0])
            block(x, gate, residual)
            norm = Norm(x, residual, gate[0], gate[0], (gate, gate), 1e-5)
            norm_linear_triton(
                *norm.arguments("norm_linear"), block.mlp.linear_1.weight, block.mlp.linear_1.bias, True, x.dtype
            )


def run_mlp() -> None:
    """Run MLPs in bfloat16. First GELU is in the kernels of the second layer, then it has kernels of its own.

    The sizes that need most shared memory come first, because some GPUs compile only the first launch of a kernel.
    """
    hidden, bias = torch.ones(8, 640, dtype=torch.bfloat16), torch.ones(640, dtype=torch.bfloat16)
    for width in (256, 128):
        gelu_linear(hidden, bias, hidden.new_ones(width, 640))
    for width in (512, 128):
        gelu_linear_backward(hidden.new_ones(8, width), hidden, bias, hidden.new_ones(width, 640))
    weight_2 = hidden.new_ones(576, 640).requires_grad_()
    with use_backend("triton"):
        gelu_mlp(hidden.new_ones(8, 32), hidden.new_ones(640, 32), bias, weight_2).sum().backward()


def modulate() -> None:
    """Run the linear layers of a network's modulation, with aligned and with unaligned rows."""
    with torch.no_grad(), use_backend("triton"):
        for width in (64, 12):
            condition = torch.ones(1, 4 * width, dtype=torch.bfloat16)
            network = Block(NetworkConfig(embed_dim=width, num_heads=1), width, False, True).to(torch.bfloat16)
            assert modulate_together(condition, network)


def scan_sequences(num_states: int) -> None:
    """Run forward and backward of a gated scan in bfloat16, cut into segments, which launches its every kernel."""
    u, delta, z = (torch.randn(1, 32, 256, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    B, C = (torch.randn(1, num_states, 256, dtype=torch.bfloat16) for _ in range(2))
    D = bias = torch.ones(32)
    y = selective_scan_fn(u, delta, -torch.rand(32, num_states), B, C, D, z, bias, True, backend="triton")
    assert isinstance(y, torch.Tensor)
    y.float().sum().backward()


def forms(*num_states: int) -> list[Launch]:
    """Record the launches of blocks: for each kernel, one per combination of missing arguments and switches."""
    chosen: dict[object, Launch] = {}
    for launched in (launched for number in num_states for launched in record_launches(run_block, number)):
        missing = tuple(argument is None for argument in launched.arguments)
        switches = tuple((name, value) for name, value in launched.constants if value is None or value in (True, False))
        chosen.setdefault((launched.kernel, missing, switches), launched)
    return list(chosen.values())


def fullest(launches: list[Launch]) -> list[Launch]:
    """Choose one launch of each kernel: the one with the fewest missing arguments."""
    ordered = sorted(launches, key=lambda launched: -launched.arguments.count(None))
    return list({launched.kernel: launched for launched in ordered}.values())


def compile_for(capability: int, launches: list[Launch]) -> list[Any]:
    triton.runtime.driver.set_active(AnyGPU(capability))
    return [compile_launch(launched) for launched in launches]


def assemble(compiled: Any, capability: int) -> tuple[str, bytes]:
    """Assemble PTX and cubin for a GPU for which Triton generates the same LLVM code as for the compiled one."""
    llvm.init_targets()  # which Triton leaves out if it finds all kernels in its cache
    backend, metadata = CUDABackend(GPUTarget("cuda", capability, 32)), compiled.metadata._asdict()
    options = backend.parse_options({name: metadata[name] for name in ("num_warps", "num_ctas", "num_stages")})
    ptx = backend.make_ptx(compiled.asm["llir"], metadata, options, capability)
    return ptx, backend.make_cubin(ptx, metadata, options, capability)


def check(launched: Launch, compiled: Any, capability: int) -> None:
    name = launched.kernel.fn.__name__
    is_own = compiled.metadata.target.arch == capability
    ptx, cubin = (compiled.asm["ptx"], compiled.asm["cubin"]) if is_own else assemble(compiled, capability)
    assert cubin, name
    assert f".target sm_{capability}" in ptx, name
    assert compiled.metadata.shared <= SHARED[capability], f"{name}: {compiled.metadata.shared} bytes are shared"
    if name in CARRIED:
        loops = re.findall(r"iter_args\((.*?)\) ->", compiled.asm["ttir"])
        carried, wanted = max(loop.count("=") for loop in loops), CARRIED[name](dict(launched.constants))
        assert carried == wanted, f"{name}: a loop carries {carried} values, not {wanted}"
    print("compiled", name, capability, flush=True)


def check_same_code(of_80: list[Any], capability: int, launches: list[Launch]) -> None:
    """Compile a few kernels that compile quickly, and check that their code is the same as for 80."""
    quick = {"linear_gelu_forward_kernel", "attention_forward_kernel", "steps_backward_kernel", "gelu_linear_kernel"}
    pairs = [pair for pair in zip(launches, of_80, strict=True) if pair[0].kernel.fn.__name__ in quick]
    assert len(pairs) == len(quick)
    for compiled, (_, other) in zip(compile_for(capability, [launched for launched, _ in pairs]), pairs, strict=True):
        assert compiled.asm["ptx"] == other.asm["ptx"].replace(".target sm_80", f".target sm_{capability}")
        assert compiled.metadata.shared == other.metadata.shared


if __name__ == "__main__":
    share_coalescing()
    knobs.runtime.interpret = True  # so that operations accept CPU tensors and launch the same kernels as on a GPU
    others = record_launches(modulate) + record_launches(run_mlp)
    fused = [launched for launched in record_launches(run_fused) if launched.kernel.fn.__module__ == FUSED]
    # Loops take several states per iteration with 16 states, and one with 3 states, which compiles twice as fast. The
    # sequence scan is also compiled for one state, which stays in registers. To save time, only one GPU gets every form
    # of a kernel.
    every, few = forms(1, 16) + others + fused, forms(1, 3) + others
    sequences = {number: record_launches(scan_sequences, number) for number in (1, 3, 4)}
    of_80: list[Any] = []
    for capability in map(int, sys.argv[1:]):
        launches = fullest(few + sequences[1 if capability < 100 else 3]) + fullest(fused)
        if capability == 90:
            launches = every + sequences[4]
        if capability in (86, 89):  # Triton generates the same code as for 80; only the assembler differs
            compiled = of_80 = of_80 or compile_for(80, launches)
            check_same_code(of_80, capability, launches)
        else:
            compiled = compile_for(capability, launches)
            of_80 = compiled if capability == 80 else of_80
        for launched, kernel in zip(launches, compiled, strict=True):
            check(launched, kernel, capability)
