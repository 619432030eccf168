"""Labels: their names and numbers, mixtures of them, and whether a network can be guided away from "no label"."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lamamba.checkpoints.checkpoint import Distilled
from lamamba.config import nearest
from lamamba.config.checks import as_whole
from lamamba.config.sampling import DEFAULT_GUIDANCE
from lamamba.errors import ConfigError
from lamamba.terminal.streams import visible

NO_LABEL = "no label"


@dataclass(frozen=True)
class Labels:
    """The labels of a network: 0 to num_classes - 1, and num_classes for "no label".

    A name wins over a number. If any class has a number as its name, a number written as text is always a name, except
    the number of "no label": in folders 1, 2 and 3, "2" is not the third class.
    """

    num_classes: int
    names: Mapping[int, str] = field(default_factory=dict)
    """Names of classes. A class without one is called by its number."""

    def find(self, label: Any) -> int:
        """Return the number of a label that is given by its name or its number.

        Raises:
            ConfigError: there is no such label.
        """
        if not isinstance(label, str):
            whole = as_whole(label)
            if whole is None:
                raise ConfigError(f"label {label!r} is neither a name nor a whole number: give one of these")
            return check_range(whole, self.num_classes)
        text = visible(label.strip())
        for name, known in ((visible(label), self._exact), (text, self._exact), (text.lower(), self._lower)):
            if name in known:
                return known[name]
        classes = [visible(name).lower() for name in self.names.values()]
        numbers_are_names = any(name.isdecimal() for name in classes)
        if text.removeprefix("-").isdecimal() and not (numbers_are_names and int(text) != self.num_classes):
            return check_range(int(text), self.num_classes)
        hint = f"give numbers from 0 to {self.num_classes - 1}"
        if not self.num_classes:
            hint = "this network is unconditional"
        elif classes:
            why = "classes are named by numbers here, so a number is a name; " if text.isdecimal() else ""
            hint = why + nearest(text.lower(), classes)
        raise ConfigError(f"no class is named {text!r}: {hint}")

    def parse(self, text: str | None) -> list[int]:
        """Read labels given by name or number, separated by commas; None is all classes, at most the first 10.

        Raises:
            ConfigError: there is no such label, or none is given.
        """
        if text is None:
            return list(range(min(self.num_classes, 10))) if self.num_classes else [0]
        if not text.strip():
            raise ConfigError("labels is empty: give names or numbers, separated by commas")
        return [self.find(part) for part in text.split(",")]

    def name(self, label: int) -> str:
        """Name a label for people, with its number where the name is another number."""
        if label == self.num_classes:
            return NO_LABEL
        name = visible(self.names.get(label, label))
        return f"{name} = label {label}" if name.isdecimal() and name != str(label) else name

    def weights(self, label: Any) -> list[float]:
        """Return the weight of each label's embedding, "no label" last.

        Args:
            label: a name, a number, None for "no label", a mixture such as {"Coat": 0.5, "Bag": 0.5}, or the weights.

        Raises:
            ConfigError: there is no such label, or weights are wrong.
        """
        if isinstance(label, np.ndarray | Tensor) and label.ndim:
            row = torch.as_tensor(label)
            if row.shape != (self.num_classes + 1,) or not row.isfinite().all():
                raise ConfigError(
                    f"a label's weights are {tuple(row.shape)}: give {(self.num_classes + 1,)} finite ones, or labels "
                    "as whole numbers"
                )
            return [float(weight) for weight in row]
        weights = [0.0] * (self.num_classes + 1)
        if not isinstance(label, Mapping):
            weights[self.num_classes if label is None else self.find(label)] = 1.0
            return weights
        total = sum(map(float, label.values())) if all(map(_is_weight, label.values())) else 0.0
        if not 0 < total < math.inf:
            raise ConfigError(f"the mixture {dict(label)} has no weights: give each label one, 0 or more")
        for part, weight in label.items():
            weights[self.find(part)] += float(weight) / total
        return weights

    @cached_property
    def _exact(self) -> dict[str, int]:
        """Every name by which a label is known, as it is printed; names of classes win."""
        shown = {self.name(label): label for label in range(self.num_classes + 1)}
        return shown | {visible(name): label for label, name in self.names.items()}

    @cached_property
    def _lower(self) -> dict[str, int]:
        return {name.lower(): label for name, label in self._exact.items()}


def check_range(label: int, num_classes: int) -> int:
    """Return a label; raise ConfigError unless it is that of a class or "no label"."""
    if not 0 <= label <= num_classes:
        allowed = (
            f"use 0 to {num_classes - 1}, or {num_classes} for no label"
            if num_classes
            else "this network is unconditional, its only label is 0"
        )
        raise ConfigError(f"label {label} is out of range: {allowed}")
    return label


def check_numbers(labels: Sequence[Any], num_classes: int) -> list[int]:
    """Return labels as ints; raise ConfigError unless all are whole numbers of a class or of "no label"."""
    numbers = [as_whole(label) for label in labels]
    for label, number in zip(labels, numbers, strict=True):
        if number is None:
            raise ConfigError(f"label {label!r} is not a whole number: give the number of a class")
    return [check_range(number, num_classes) for number in numbers if number is not None]


def _is_weight(value: Any) -> bool:
    try:
        return 0 <= float(value) < math.inf
    except (TypeError, ValueError):
        return False


def why_unguided(config: Any, distilled: Distilled | None = None) -> str | None:
    """Say why a network of this configuration cannot be guided away from "no label"; None if it can."""
    if distilled:
        return f"this network was {distilled}"
    if not config.num_classes:
        return "guidance needs labels, and this network is unconditional"
    if not getattr(config, "label_dropout", True):  # what has no such option was trained with some
        return 'this network was trained with label_dropout 0, so it has never seen "no label", which guidance needs'
    return None


def choose_guidance(
    config: Any, scale: float | None, by_weaker: bool = False, distilled: Distilled | None = None
) -> float:
    """Choose the guidance scale.

    Args:
        scale: the requested scale; 1 is no guidance. None chooses the default, or 1 if the network cannot be guided.
        by_weaker: guide away from a weaker network, not from "no label".
        distilled: steps and guidance of a distilled network. Its predictions include guidance, so only this scale and
            1 are accepted.

    Raises:
        ConfigError: guidance is wanted of a network that cannot be guided.
    """
    if distilled is not None and not by_weaker:
        if scale not in (None, 1, distilled.guidance):
            raise ConfigError(
                f"guidance_scale is {scale:g}, and this network was {distilled}: leave it out, or distill again"
            )
        return 1.0
    why = None if by_weaker else why_unguided(config)
    if why and scale not in (None, 1):
        raise ConfigError(f"{why}: leave guidance_scale at 1, or guide by a weaker network, not {scale}")
    return scale if scale is not None else 1.0 if why else DEFAULT_GUIDANCE


def check_no_label(config: Any) -> None:
    """Raise ConfigError where "no label" is wanted of a network that has labels and was never trained without."""
    if config.num_classes and why_unguided(config):
        raise ConfigError(
            'this network was trained with label_dropout 0, so it has never seen "no label": give one of its '
            f"{config.num_classes} classes"
        )
