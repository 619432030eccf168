"""Compile an exported network for C++ servers with AOTInductor: a package of machine code and weights.

    lamamba export nano --format pt2 --guidance --out exported
    python examples/aoti/compile.py exported/network.pt2 exported/package.pt2      # needs g++; some minutes

`sample.cpp` beside this file samples from the package. The package runs on the kind of processor that compiled it.
"""

import argparse

import torch

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("program", help="network.pt2 of lamamba export")
    parser.add_argument("package", help="the .pt2 file to write")
    arguments = parser.parse_args()
    program = torch.export.load(arguments.program)
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(program, package_path=arguments.package)
    print(f"wrote {arguments.package}")
