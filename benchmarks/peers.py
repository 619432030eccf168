"""Public scans that install from PyPI and need no compiler; each is left out where its package is missing.

    fla               fla-core's `fused_recurrent_hgrn`: Triton, walks in time, float32 state, any dtype in and out
    accelerated-scan  `accelerated_scan.scalar`: Triton, a parallel scan; computes in the dtype it is given, so float32

(Left aside: mamba-ssm and accelerated_scan.warp, which compile CUDA; mambapy, which is plain PyTorch.)

What these packages have is the recurrence h[t] = gate[t] h[t-1] + token[t] of independent channels. So two things are
timed: that recurrence alone, four paths as four sequences, gates and tokens ready-made in the peer's own layout, which
is generous to the peer; and all that `scan_grid` does, with the peer's recurrence inside: gathers, low-rank expansion,
softplus, gates, tokens, output, sum over paths, in PyTorch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

Recurrence = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """A recurrence over (b, l, d) logarithms of gates and tokens, or, `time_last`, over (b, d, l) gates and tokens."""

    package: str
    load: Callable[[], Recurrence]
    time_last: bool
    dtype: torch.dtype

    def ready_made(self, b: int, length: int, d: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Draw gates (or their logarithms) and tokens in the peer's layout."""
        shape = (b, d, length) if self.time_last else (b, length, d)
        log_gate = -torch.rand(shape, device=device, dtype=self.dtype)
        return log_gate.exp() if self.time_last else log_gate, torch.randn_like(log_gate)

    def selective_scan(self, recurrence: Recurrence) -> Callable[..., Tensor]:
        """Make `lamamba.ops.selective_scan.selective_scan`, for one state, out of the recurrence."""

        def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
            log_gate, token = delta * A[..., 0][:, None], (delta * B * u)
            log_gate, token = (x.flatten(0, 1).to(self.dtype) for x in (log_gate, token))
            if self.time_last:
                h = recurrence(log_gate.exp().mT.contiguous(), token.mT.contiguous()).mT
            else:
                h = recurrence(log_gate, token)
            y = C * h.reshape(u.shape) + D[:, None] * u
            return y.to(u.dtype)

        return scan


def _load_fla() -> Recurrence:
    from fla.ops.hgrn import fused_recurrent_hgrn

    return lambda log_gate, token: fused_recurrent_hgrn(token, log_gate)[0]


def _load_accelerated_scan() -> Recurrence:
    from accelerated_scan.scalar import scan

    return scan


PEERS = {
    "fla": Peer("fla", _load_fla, time_last=False, dtype=torch.bfloat16),
    "accelerated-scan": Peer("accelerated_scan", _load_accelerated_scan, time_last=True, dtype=torch.float32),
}


def installed() -> list[str]:
    """Name the peers that are there, and say which are not."""
    missing = [name for name, peer in PEERS.items() if find_spec(peer.package) is None]
    if missing:
        print(f"left out, not installed: {', '.join(missing)} (pip install --no-deps fla-core accelerated-scan)")
    return [name for name in PEERS if name not in missing]
