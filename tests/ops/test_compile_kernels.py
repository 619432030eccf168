"""Every kernel compiles without a GPU."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lamamba.ops

pytest.importorskip("triton")


def names_of_kernels() -> set[str]:
    """Return the names of all kernels in ops/: Triton functions named `..._kernel`."""
    files = Path(lamamba.ops.__file__).parent.rglob("*kernels.py")
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")}


CAPABILITIES = ("80", "86", "89", "90", "100", "120")  # from Ampere to Blackwell


@pytest.mark.slow
def test_kernels_compile_without_a_gpu() -> None:
    """Compile to a cubin, as a block launches them. This needs its own process, because tests interpret the kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_DISABLE_LINE_INFO"] = "1"  # cached code of another checkout would have other paths
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run([sys.executable, script, *CAPABILITIES], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = {tuple(line.split()[1:]) for line in done.stdout.splitlines() if line.startswith("compiled")}
    assert compiled == {(name, capability) for name in names_of_kernels() for capability in CAPABILITIES}
