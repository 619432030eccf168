"""Linear layers of many blocks in one launch, against each layer alone."""

import copy
import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamamba.model import LaMambaDiff
from lamamba.ops import modulation
from lamamba.ops.backend import use_backend
from lamamba.ops.linear import RoundedWeights, rounded, stack_rounded
from lamamba.ops.modulation import modulate_together

pytest.importorskip("triton")
from lamamba.ops.modulation.triton import linears, make_table

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter has no arithmetic in bfloat16
SMALL = {
    "in_channels": 1, "sample_size": 8, "num_classes": 3, "embed_dim": 16, "depths": (1, 1, 1, 1),
    "bottleneck_depth": 1, "decoder_extra_depth": 0, "num_heads": 2, "window_size": 4,
}  # fmt: skip


def make_network(dtype: torch.dtype = DTYPE) -> LaMambaDiff:
    torch.manual_seed(0)
    network = LaMambaDiff(**SMALL).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network.to(DEVICE, dtype)


def make_condition(batch: int = 3, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(batch, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)


def check(found: modulation.Modulations, network: LaMambaDiff, condition: Tensor) -> None:
    """Compare with float64, from weights and a condition in 16 bits."""
    exact, condition = copy.deepcopy(network).double(), condition.double()
    names = {module: name for name, module in network.named_modules()}
    wanted = {name: module for name, module in exact.named_modules() if hasattr(module, "condition_projection")}
    assert [names[module] for module in found] == list(wanted)
    for module, parts in found.items():
        of, value = wanted[names[module]], torch.cat(list(parts), dim=1)
        result = of.modulation(F.silu(of.condition_projection(condition)))
        assert {part.shape for part in parts} == {(len(condition), of.modulation.in_features)}
        assert value.dtype == DTYPE
        assert value.shape == result.shape
        assert (value.double() - result).norm() < 4 * torch.finfo(DTYPE).eps * result.norm(), names[module]


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3, 17])
def test_results_are_those_of_each_layer(batch: int) -> None:
    network, condition = make_network(), make_condition(batch)
    with use_backend("triton"):
        check(modulate_together(condition, network), network, condition)


@torch.no_grad()
@pytest.mark.parametrize("shapes", [[(70, 24), (33, 24)], [(40, 9), (5, 9)]], ids=["aligned", "odd"])
def test_layers_may_have_any_size(shapes: list[tuple[int, int]]) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, shapes[0][1], generator=generator).to(DEVICE, DTYPE)
    weights = [torch.randn(shape, generator=generator).to(DEVICE, DTYPE) for shape in shapes]
    biases = [torch.randn(len(weight), generator=generator).to(DEVICE, DTYPE) for weight in weights]
    table, is_aligned = make_table([(w, b, None) for w, b in zip(weights, biases, strict=True)], x.device)
    assert is_aligned == (shapes[0][1] % 8 == 0)
    out = linears(x, x, table, is_aligned, sum(len(weight) for weight in weights), False)
    parts = out.split([2 * len(weight) for weight in weights])
    for part, weight, bias in zip(parts, weights, biases, strict=True):
        wanted = F.linear(x.double(), weight.double(), bias.double())
        torch.testing.assert_close(part.view(2, -1).double(), wanted, rtol=1e-2, atol=2e-2)


@torch.no_grad()
def test_weights_that_changed_or_moved_are_used() -> None:
    network, condition = make_network(), make_condition()
    with use_backend("triton"):
        before = modulate_together(condition, network)
        for parameter in network.parameters():
            parameter.mul_(0.5)
        check(modulate_together(condition, network), network, condition)
        for parameter in network.parameters():
            parameter.data = parameter.data.clone() * 3
        moved = modulate_together(condition, network)
        check(moved, network, condition)
    assert not torch.equal(moved[network.head][0], before[network.head][0])


def test_otherwise_each_module_computes_its_own() -> None:
    network, condition = make_network(), make_condition()
    with use_backend("triton"):
        assert network.head not in modulate_together(condition, network)  # with gradients, alone with its shapes
        with torch.no_grad():
            assert modulate_together(condition, network)
            assert not modulate_together(make_condition(modulation.MAX_BATCH + 1), network)
            assert not modulate_together(condition.float(), network.float())
            network.to(DTYPE)
            handle = network.head.modulation.register_forward_hook(lambda *_: None)
            assert not modulate_together(condition, network)
            handle.remove()
            own = modulation.modulate(network.head, condition)
            network.head.modulation = nn.Sequential(network.head.modulation)
            assert not modulate_together(condition, network)
            assert all(map(torch.equal, modulation.modulate(network.head, condition), own))
    with torch.no_grad(), use_backend("pytorch"):
        assert not modulate_together(condition, make_network())


@torch.no_grad()
def test_a_plan_lives_as_long_as_its_network() -> None:
    network = make_network()
    with use_backend("triton"):
        modulate_together(make_condition(), network)
    assert network in modulation._plans
    number = len(modulation._plans)
    del network
    assert len(modulation._plans) == number - 1


@torch.no_grad()
def test_few_plans_are_kept_when_weights_move() -> None:
    network, condition = make_network(), make_condition()
    with use_backend("triton"):
        modulate_together(condition, network)
        (of_graph,) = modulation._plans[network].values()
        of_graph.is_in_graph = True
        weights = []  # kept, so that no address repeats
        for _ in range(modulation.KEPT + 2):
            for parameter in network.parameters():
                weights.append(parameter.data)
                parameter.data = parameter.data.clone()
            modulate_together(condition, network)
    plans = list(modulation._plans[network].values())
    assert len(plans) == modulation.KEPT + 1
    assert plans[0] is of_graph


@torch.no_grad()
def test_a_replaced_block_is_not_kept() -> None:
    network, condition = make_network(), make_condition()
    with use_backend("triton"):
        modulate_together(condition, network)
        before = weakref.ref(network.bottleneck[0])
        network.bottleneck[0] = copy.deepcopy(network.bottleneck[0])
        check(modulate_together(condition, network), network, condition)
    gc.collect()
    assert before() is None


def test_tables_of_inference_mode_serve_elsewhere() -> None:
    network, condition = make_network(), make_condition()
    with use_backend("triton"):
        with torch.inference_mode():
            modulate_together(condition, network)
        with torch.no_grad():
            check(modulate_together(condition, network), network, condition)


class Adapted(nn.Linear):
    """A layer that does more than its product, under the name that adapters often have."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


Adapted.__name__ = "Linear"


@torch.no_grad()
@pytest.mark.parametrize("change", ["class", "method", "shape"])
def test_layers_that_were_changed_compute_their_own(change: str) -> None:
    network, condition = make_network(), make_condition()
    layer = network.head.modulation
    if change == "class":
        layer.__class__ = Adapted
    elif change == "method":
        layer.forward = lambda x: 2 * F.linear(x, layer.weight, layer.bias)  # type: ignore[method-assign]
    else:
        layer.weight.data = layer.weight.data.flatten()[:7]  # as PyTorch's first FSDP keeps them between passes
    with use_backend("triton"):
        assert not modulate_together(condition, network)


@torch.no_grad()
def test_no_images_have_no_modulation() -> None:
    with use_backend("triton"):
        assert not modulate_together(make_condition(0), make_network())


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@torch.no_grad()
def test_a_recording_does_not_make_tables() -> None:
    network, condition = make_network(), make_condition()
    for recorded in (False, True):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            condition + 1  # PyTorch warns of empty graphs
            found = modulate_together(condition, network)
        assert bool(found) == recorded
        modulate_together(condition, network)
    graph.replay()
    check(found, network, condition)
    assert [plan.is_in_graph for plan in modulation._plans[network].values()] == [True]


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@torch.no_grad()
def test_in_mixed_precision_rounded_weights_are_used() -> None:
    network, condition = make_network(torch.float32), make_condition(dtype=torch.float32)
    with torch.autocast(DEVICE, DTYPE):
        assert not modulate_together(condition, network)
        with RoundedWeights(network, DTYPE).in_use():
            found = modulate_together(condition, network)
    check(found, network.to(DTYPE), condition.to(DTYPE))


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@torch.no_grad()
def test_a_network_gives_the_same_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    network = make_network()
    inputs = torch.randn(2, 1, 8, 8, device=DEVICE, dtype=DTYPE), torch.tensor([5, 900.0], device=DEVICE)
    labels = torch.tensor([0, 3], device=DEVICE)
    together = network(*inputs, labels)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = network(*inputs, labels)
    graph.replay()
    assert torch.equal(out, together)
    monkeypatch.setattr("lamamba.model.modulate_together", lambda condition, network: {})
    apart = network(*inputs, labels)
    assert (together - apart).norm() < 0.02 * apart.norm()


LAYERS = ("condition_projection", "modulation")


def gradients_of(network: LaMambaDiff, condition: Tensor, together: bool) -> list[Tensor]:
    """Return the gradients of the condition and of all layers that can be computed in groups."""
    condition = condition.clone().requires_grad_()
    found = modulate_together(condition, network) if together else {}
    modules = [module for module in network.modules() if hasattr(module, "modulation") and module is not network.head]
    assert len(found) == (len(modules) if together else 0)
    total = torch.zeros((), dtype=torch.float64, device=condition.device)
    for index, module in enumerate(modules):
        for number, part in enumerate(found[module] if together else modulation.modulate(module, condition)):
            if number != 4:  # a part without a gradient
                weights = torch.cos(index + torch.arange(part.numel(), device=part.device)).view(part.shape)
                total = total + (part.double() * weights).sum()
    parameters = [p for module in modules for name in LAYERS for p in getattr(module, name).parameters()]
    return list(torch.autograd.grad(total, [condition, *parameters]))


@pytest.mark.parametrize("with_copies", [False, True])
@pytest.mark.parametrize("batch", [1, 5])
def test_gradients_of_groups_are_those_of_each_layer(batch: int, with_copies: bool) -> None:
    """Weights are float32, with or without 16-bit copies. Both versions are compared with float64."""
    network = make_network(torch.float32)
    condition = make_condition(batch, torch.float32)
    rounding = RoundedWeights(network, DTYPE).in_use if with_copies else nullcontext
    with torch.autocast(DEVICE, DTYPE), rounding():
        with use_backend("triton"):
            grads = gradients_of(network, condition, True)
            found = modulate_together(condition.to(DTYPE), network)
        alone = gradients_of(network, condition, False)
    exact = gradients_of(copy.deepcopy(network).double(), condition.double(), False)
    for grad, own, wanted in zip(grads, alone, exact, strict=True):
        assert grad.dtype == own.dtype == torch.float32
        assert (grad - wanted).norm() <= 2 * (own - wanted).norm() + 1e-6 * wanted.norm()
        assert (own - wanted).norm() > 0
    rounded_network = copy.deepcopy(network).to(DTYPE)
    with torch.no_grad():
        for module, parts in found.items():
            name = next(name for name, other in network.named_modules() if other is module)
            wanted = torch.cat(modulation.modulate(rounded_network.get_submodule(name), condition.to(DTYPE)), dim=1)
            torch.testing.assert_close(torch.cat(list(parts), dim=1), wanted, rtol=1e-2, atol=1e-2)


def test_modules_with_hooks_compute_their_own_gradients() -> None:
    network, condition = make_network(), make_condition()
    layer, seen = network.bottleneck[0].modulation, []
    with use_backend("triton"):
        assert network.bottleneck[0] in modulate_together(condition, network)
        handle = layer.register_full_backward_hook(lambda *_: seen.append("gradient"))
        assert not modulate_together(condition, network)
        sum(part.sum() for part in modulation.modulate(network.bottleneck[0], condition)).backward()
        handle.remove()
        assert network.bottleneck[0] in modulate_together(condition, network)
    assert seen == ["gradient"]


def test_copies_of_equal_layers_are_stacked_without_another_copy() -> None:
    network = make_network(torch.float32)
    layers = [network.encoder[2][0].modulation, network.encoder[3][0].modulation]
    with RoundedWeights(network, DTYPE).in_use():
        stacked = stack_rounded([layer.weight for layer in layers], DTYPE)
        assert stacked.data_ptr() == rounded(layers[0].weight, DTYPE).data_ptr()
        apart = stack_rounded([layer.weight for layer in reversed(layers)], DTYPE)
        assert apart.data_ptr() != rounded(layers[1].weight, DTYPE).data_ptr()
    assert stacked.shape == (2, *layers[0].weight.shape)
    for of_stack, layer in zip((*stacked, *apart.flip(0)), layers * 2, strict=True):
        assert torch.equal(of_stack, layer.weight.to(DTYPE))
