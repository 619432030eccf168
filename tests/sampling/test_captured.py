"""What recording a pass changes, as far as it can be seen without CUDA."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from lamamba.model import Block, LaMambaDiff
from lamamba.sampling.captured import modulations_ahead
from small_network import TINY_CONFIG


class Stream:
    """A stream of CUDA that does nothing, and notes who waits for it."""

    def __init__(self, waits: list[str]) -> None:
        self.waits = waits

    def wait_stream(self, other: Any) -> None:
        self.waits.append("stream")

    def record_event(self) -> Any:
        return self

    def wait(self) -> None:
        self.waits.append("event")


def test_modulations_are_computed_before_the_first_block_while_a_pass_is_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    network = LaMambaDiff(in_channels=1, sample_size=8, num_classes=3, **TINY_CONFIG).eval()
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    inputs = torch.randn(2, 1, 8, 8), torch.tensor([3, 500]), torch.tensor([0, 2])
    done: list[str] = []
    waits: list[str] = []
    blocks = [module for module in network.modules() if isinstance(module, Block)]
    for block in blocks:
        assert block.ssm is not None
        block.modulation.register_forward_hook(lambda *_: done.append("modulate"))
        block.ssm.register_forward_hook(lambda *_: done.append("scan"))

    @torch.no_grad()
    def predict() -> Tensor:
        done.clear()
        out: Tensor = network(*inputs)
        return out

    wanted = predict()
    assert done == ["modulate", "scan"] * len(blocks)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: False)
    with modulations_ahead(network):  # another thread, whose work is not recorded
        assert torch.equal(predict(), wanted)
        assert done == ["modulate", "scan"] * len(blocks)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: True)
    monkeypatch.setattr("torch.cuda.current_stream", lambda: None)
    monkeypatch.setattr("torch.cuda.Stream", lambda: Stream(waits))
    monkeypatch.setattr("torch.cuda.stream", lambda _: nullcontext())
    with modulations_ahead(network):
        assert torch.equal(predict(), wanted)
    assert done == ["modulate"] * len(blocks) + ["scan"] * len(blocks)
    assert waits == ["stream"] + ["event"] * len(blocks), "each block waits for its own modulation"
    assert torch.equal(predict(), wanted)
    assert done == ["modulate", "scan"] * len(blocks)
