"""Weight decay, Muon and the learning rate follow their equations."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lamamba.config import TrainConfig
from lamamba.errors import LamambaError
from lamamba.training import optimizers
from lamamba.training import run as training
from lamamba.training.optimizers import Muon, hidden_matrices, weights_decayed
from tiny_runs import make_trainer, same, take_steps


@pytest.mark.parametrize("geometry", [{}, {"downsample": "conv", "ssm_conv_bias": True, "ssm_state_size": 2}], ids=str)
def test_weight_decay_shrinks_matrices_and_convolutions_alone(tmp_path: Path, geometry: dict[str, Any]) -> None:
    trainer = make_trainer(tmp_path, network=geometry, weight_decay=0.5, learning_rate=0.1)
    for parameter in trainer.network.parameters():
        parameter.data.fill_(1.0)
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()
    left_alone = re.compile(r"bias$|norm\.weight$|_embedding(\.weight)?$|\.A_log$|\.D$")
    shrunk = 0
    for name, parameter in trainer.network.named_parameters():
        expected = 1.0 if left_alone.search(name) else 0.95  # 1 - learning_rate * weight_decay
        torch.testing.assert_close(parameter.data, torch.full_like(parameter, expected), msg=name)
        shrunk += expected < 1
    assert shrunk > 50


def test_muon_steps_by_its_equation_and_adamw_trains_the_rest(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, optimizer="muon", learning_rate=0.01, weight_decay=0.5)
    generator = torch.Generator().manual_seed(0)
    before = {name: value.detach().clone() for name, value in trainer.network.named_parameters()}
    for parameter in trainer.network.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    trainer._step_if_finite(torch.tensor(1.0))
    hidden = hidden_matrices(trainer.network)
    assert {name for name in before if re.search(r"^patch_proj|^head|embedding|_norm|dt_|x_proj", name)}.isdisjoint(
        hidden
    )
    assert {"encoder.0.0.mlp.linear_1.weight", "bottleneck.0.attention.qkv.weight"} < set(hidden)
    for name, parameter in trainer.network.named_parameters():
        kept = before[name] * (0.995 if weights_decayed(trainer.network)[name] else 1)  # 1 - 0.01 * 0.5
        assert parameter.grad is not None
        if name not in hidden:
            torch.testing.assert_close(parameter.detach(), kept - 0.01 * parameter.grad.sign(), rtol=1e-4, atol=1e-5)
            continue
        # Newton-Schulz changes the singular values alone: x <- 3.4445 x - 4.775 x^3 + 2.0315 x^5, five times.
        left, values, right = torch.linalg.svd(parameter.grad.double(), full_matrices=False)
        values = values / values.norm()
        for _ in range(5):
            values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
        step = 0.2 * max(parameter.shape) ** 0.5 * (left * values) @ right
        distance = (kept - parameter.detach()).double() / 0.01 - step
        assert float(distance.norm() / step.norm()) < 1e-3, name


def test_muon_steps_matrices_together_as_pytorch_does_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(8, 24), (24, 8), (16, 16), (8, 24), (24, 8), (8, 24), (40, 16)]

    def stepped(make: Any, shapes: list[tuple[int, ...]] = shapes) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        parameters = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
        optimizer = make(parameters)
        for step in range(4):
            for index, parameter in enumerate(parameters):
                parameter.grad = torch.randn(parameter.shape, generator=generator) if step or index != 3 else None
            optimizer.step()
        return [x.flatten() for each in parameters for x in (each.detach(), optimizer.state[each]["momentum_buffer"])]

    ours = partial(Muon, lr=0.02, weight_decay=0.1)
    pytorchs = partial(torch.optim.Muon, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    together = stepped(ours)
    # A step changes a value by 4e-3 (root mean square). PyTorch computes it in bfloat16.
    for found, expected in zip(together, stepped(pytorchs), strict=True):
        assert float((found - expected).square().mean().sqrt()) < 2e-4
    convolutions = [(rows, columns // 4, 2, 2) for rows, columns in shapes]
    torch.testing.assert_close(stepped(ours, convolutions), together)
    monkeypatch.setattr(optimizers, "MOST_VALUES", 2 * 8 * 24)
    torch.testing.assert_close(stepped(ours), together)


def test_muon_skips_a_step_whose_gradient_is_not_finite(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, optimizer="muon", learning_rate=0.01, weight_decay=0.5)
    before = take_steps(trainer, 1)
    momenta = [
        trainer.optimizers[1].state[value]["momentum_buffer"] for value in hidden_matrices(trainer.network).values()
    ]
    kept = [momentum.clone() for momentum in momenta]
    for parameter in trainer.network.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    assert float(trainer._step_if_finite(torch.tensor(float("nan")))) == 1
    assert same(before, take_steps(trainer, 0))
    assert all(torch.equal(first, second) for first, second in zip(kept, momenta, strict=True))


def test_the_learning_rate_rises_and_falls(tmp_path: Path) -> None:
    def rates(**options: Any) -> list[float]:
        config = TrainConfig(out=tmp_path, learning_rate=8.0, num_images=100, **options)
        return [training.learning_rate(config, images) for images in (10, 20, 60, 100)]

    assert rates() == [8.0, 8.0, 8.0, 8.0]
    assert rates(warmup_images=20) == [4.0, 8.0, 8.0, 8.0]
    assert rates(warmup_images=20, decay="linear") == [4.0, 8.0, 4.0, 0.0]
    assert rates(warmup_images=20, decay="cosine") == pytest.approx([4.0, 8.0, 4.0, 0.0])
    trainer = make_trainer(tmp_path, warmup_images=16)
    take_steps(trainer, 2)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(5e-5)
    with pytest.raises(LamambaError, match=r"warmup_images is 100: it must be less than num_images 100"):
        rates(warmup_images=100, decay="linear")
