"""Steps of training: each option changes them, and ways to compute the same step agree."""

from pathlib import Path
from typing import Any

import pytest
import torch

import lamamba
from lamamba.data import to_float
from lamamba.errors import LamambaError
from lamamba.ops.linear import RoundedWeights
from lamamba.training import run as training
from steps import Replayed
from tiny_runs import make_trainer, same, take_steps


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return take_steps(make_trainer(tmp_path_factory.mktemp("trained")), 3)


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 1},
        {"learning_rate": 1e-3},
        {"warmup_images": 100},
        {"decay": "linear", "num_images": 20},
        {"decay": "cosine", "num_images": 20},
        {"weight_decay": 0.1},
        {"max_grad_norm": 0.01},
        {"dropout": 0.1},
        {"optimizer": "muon"},
        {"ema_decay": 0.1},
        {"horizontal_flip": True},
        {"objective": "flow"},
        {"objective": "flow", "timesteps": "logit-normal"},
        {"objective": "flow", "timesteps": "logit-normal", "timestep_logits": (0.8, 0.8)},
        {"objective": "flow", "contrast": 0.05},
        {"objective": "flow-x"},
        {"objective": "diffusion-v"},
        {"objective": "diffusion-v-zero-snr"},
        {"precision": "bf16"},
        {"network": {"label_dropout": 0.9}},
    ],
    ids=lambda options: list(options)[-1],
)
def test_every_option_of_training_changes_it(
    tmp_path: Path, trained: dict[str, torch.Tensor], options: dict[str, Any]
) -> None:
    changed = take_steps(make_trainer(tmp_path, **options), 3)
    assert all(bool(value.isfinite().all()) for value in changed.values())
    assert not same(trained, changed)


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"gradient_checkpointing": True}], ids=str)
def test_weights_rounded_together_train_the_same(tmp_path: Path, options: dict[str, Any]) -> None:
    """Only GPUs use this, but a CPU computes the same."""
    plain, together = (make_trainer(tmp_path, precision="bf16", **options) for _ in range(2))
    copies = RoundedWeights(together.network, torch.bfloat16)
    together.rounding = copies.in_use
    assert same(take_steps(plain, 3), take_steps(together, 3))
    assert all(bool(copy.isfinite().all()) for copy in copies.copies)
    assert any(bool(copy.any()) for copy in copies.copies), "the copies were written"


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    saved = make_trainer(tmp_path, gradient_checkpointing=True)
    assert saved.network.is_gradient_checkpointing
    assert same(take_steps(saved, 2), take_steps(make_trainer(tmp_path), 2))


def test_dropout_is_for_training_alone(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, dropout=0.25)
    before = torch.get_rng_state()
    take_steps(trainer, 2)
    assert torch.equal(torch.get_rng_state(), before)
    batch = torch.randn(2, 1, 32, 32), torch.tensor([3, 500]), torch.tensor([0, 2])
    with torch.no_grad():
        assert not torch.equal(trainer.network(*batch), trainer.network(*batch))
        for network in (trainer.average, trainer.network.eval()):
            assert torch.equal(network(*batch), network(*batch))
    assert trainer.network.state_dict().keys() == make_trainer(tmp_path).network.state_dict().keys()
    assert "dropout" not in trainer.network.config
    with pytest.raises(LamambaError, match=r"dropout is 0.1: it must be 0 with gradient_checkpointing"):
        make_trainer(tmp_path, dropout=0.1, gradient_checkpointing=True)


def test_dropout_in_a_network_without_such_layers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.Trainer, "build", lambda self: torch.nn.Linear(2, 2))
    with pytest.raises(LamambaError, match=r"dropout is 0.1, but the network has no layer nn.Dropout"):
        make_trainer(tmp_path, dropout=0.1)


def test_the_average_follows_its_formula(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, ema_decay=0.25, learning_rate=0.01)
    before = take_steps(trainer, 0)
    for (images, labels), step in zip(trainer.batches(), range(1, 5), strict=False):
        trainer.take_step(images, labels)
        after = take_steps(trainer, 0)
        decay = min(0.25, (1 + step) / (10 + step))  # 2/11, then 0.25
        for name in (name.removeprefix("network.") for name in after if name.startswith("network.")):
            expected = decay * before[f"average.{name}"] + (1 - decay) * after[f"network.{name}"]
            torch.testing.assert_close(after[f"average.{name}"], expected, rtol=1e-5, atol=1e-7)
        before = after


@pytest.mark.parametrize("objective", ["diffusion", "flow"])
@pytest.mark.parametrize("min_snr_gamma", [0.0, 5.0])
def test_the_documented_loss_is_the_loss_that_runs(tmp_path: Path, objective: str, min_snr_gamma: float) -> None:
    trainer = make_trainer(tmp_path, objective=objective, min_snr_gamma=min_snr_gamma, network={"label_dropout": 0.5})
    images, labels = next(trainer.batches())
    generator = torch.Generator()
    generator.set_state(trainer.generator.get_state())
    expected = lamamba.training_losses(
        trainer.objective,
        trainer.network,
        to_float(images),
        labels,
        null_label=trainer.network.null_label,
        label_dropout=0.5,
        generator=generator,
        min_snr_gamma=min_snr_gamma,
    )
    terms = trainer.take_step(images, labels)
    for name, value in expected.items():
        assert float(terms[name]) == pytest.approx(float(value.detach().mean()), rel=1e-6)


@pytest.mark.parametrize(("batch", "accumulate"), [(4, 4), (7, 3)])
def test_a_batch_in_parts_is_one_step_with_the_same_gradient(tmp_path: Path, batch: int, accumulate: int) -> None:
    options = {"batch_size": batch, "max_grad_norm": 0.0}
    whole, parts = (make_trainer(tmp_path, accumulate=number, **options) for number in (1, accumulate))
    images, labels = next(whole.batches())
    terms = [trainer.take_step(images, labels) for trainer in (whole, parts)]
    torch.testing.assert_close(terms[0], terms[1], rtol=1e-5, atol=0)
    assert (parts.step, parts.images) == (1, batch)
    for (name, first), second in zip(whole.network.named_parameters(), parts.network.parameters(), strict=True):
        assert first.grad is not None
        assert second.grad is not None
        assert float((first.grad - second.grad).norm()) <= 1e-5 * float(first.grad.norm()), name


@pytest.mark.parametrize("accumulate", [1, 2, 3], ids="{} parts".format)
def test_a_step_that_is_replayed_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int) -> None:
    options = {"batch_size": 7, "accumulate": accumulate, "learning_rate": 1e-3}
    called, replayed = (make_trainer(tmp_path, **options) for _ in range(2))
    replayed.captures = True
    monkeypatch.setattr("lamamba.training.gradients.Captured", Replayed)
    monkeypatch.setattr(Replayed, "parameters", list(replayed.network.parameters()))
    wanted, ours = (take_steps(trainer, 4) for trainer in (called, replayed))
    assert replayed.gradients is not None
    assert len(replayed.gradients.graphs) == len({*replayed.parts})
    for name, value in wanted.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5, msg=name)
