"""Operations of the network that plain PyTorch does not have, each with fast versions.

The selective scan can replace the compiled kernel of `mamba_ssm` in other networks. Importing this package loads only
torch and, at the first call, Triton on a GPU or numba on a CPU.
"""

from lamamba.ops.sequence_scan import selective_scan_2d, selective_scan_fn

__all__ = ["selective_scan_2d", "selective_scan_fn"]
