"""Parameters are divided evenly among ranks. tests/distributed/test_processes.py trains with divided state."""

import pytest
import torch
from torch import Tensor

from lamamba.distributed import sharding
from lamamba.distributed.processes import Processes
from lamamba.distributed.sharding import Division
from lamamba.model import LaMambaDiff


@pytest.mark.parametrize("number", [1, 2, 3, 8])
def test_each_parameter_belongs_to_one_rank_and_all_have_as_much(number: int) -> None:
    network = LaMambaDiff.from_preset("nano")
    selected = [Division(network, Processes(rank, number)).select(network) for rank in range(number)]
    names = [name for own in selected for name in own]
    assert sorted(names) == sorted(name for name, _ in network.named_parameters())
    sizes = [sum(value.numel() for value in own.values()) for own in selected]
    largest = max(value.numel() for value in network.parameters())
    assert max(sizes) - min(sizes) < largest


def test_parameters_are_sent_by_the_rank_that_has_stepped_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks in one process: each changes its own parameters and its own part of an EMA."""
    networks = [LaMambaDiff.from_preset("nano", embed_dim=8, num_heads=2) for _ in range(3)]
    for network in networks[1:]:
        network.load_state_dict(networks[0].state_dict())
    before = {name: value.detach().clone() for name, value in networks[0].named_parameters()}
    divisions = [Division(network, Processes(rank, 3)) for rank, network in enumerate(networks)]
    sent: dict[int, Tensor] = {}

    def gather(out: Tensor, own: Tensor) -> None:
        """Note what a rank sends; once all have sent, write it to what the last one receives."""
        sent[len(sent)] = own.clone()
        if len(sent) == 3:
            out.copy_(torch.cat([sent[rank] for rank in range(3)]))
            sent.clear()

    monkeypatch.setattr(sharding.dist, "all_gather_into_tensor", gather)
    wanted = {}
    for division, network in zip(divisions, networks, strict=True):
        division.synchronize_from_now_on(network)
        assert all(torch.equal(value, before[name]) for name, value in network.named_parameters())
        for name, value in division.select(network).items():
            value.data += 1 + division.rank
            wanted[name] = value.detach().clone()
    for division in divisions:
        division.synchronize()
    last = dict(networks[-1].named_parameters())
    assert all(torch.equal(last[name], value) for name, value in wanted.items())

    averages = [LaMambaDiff.from_preset("nano", embed_dim=8, num_heads=2).requires_grad_(False) for _ in range(3)]
    for division, average in zip(divisions, averages, strict=True):
        average.load_state_dict(before)
        division.forget_others(average)
        held = sum(value.numel() for value in average.parameters())
        assert 0 < held < sum(value.numel() for value in before.values()) / 2
    for division, average in zip(divisions, averages, strict=True):
        with division.completed(average):
            is_last = division.rank == 2
            whole = {name: value.clone() for name, value in average.named_parameters()}
        assert not is_last or all(torch.equal(whole[name], value) for name, value in before.items())
        assert sum(value.numel() for value in average.parameters()) < sum(v.numel() for v in before.values()) / 2
