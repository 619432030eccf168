"""Labels are found by name and by number in one way, whoever asks."""

import re

import pytest

from lamamba.errors import ConfigError
from lamamba.sampling.labels import Labels

NAMES = ("Cat", "Dog", "Great owl")


def labels(num_classes: int, names: tuple[str, ...]) -> Labels:
    return Labels(num_classes, dict(enumerate(names)))


def test_labels_by_number_and_name() -> None:
    assert labels(3, NAMES).parse("2, cat,DOG,3") == [2, 0, 1, 3]
    assert labels(1000, ()).parse(None) == list(range(10))
    assert labels(0, ()).parse(None) == [0]
    with pytest.raises(ConfigError, match="give numbers from 0 to 999"):
        labels(1000, ()).parse("cat")


def test_a_name_wins_over_a_number() -> None:
    assert labels(2, ("3", "7")).parse("7,3") == [1, 0]
    assert labels(3, ("2", "1", "0")).parse("0,2,3") == [2, 0, 3], "3 is no name, and the number of no label"
    assert labels(3, ("A", "B", "a")).parse("a,A,b") == [2, 0, 1], "the case decides where it must"
    for part, hint in (("0", "there are 3, 7"), ("17", "did you mean 7?"), ("-1", "there are 3, 7")):
        with pytest.raises(ConfigError, match=f"no class is named '{part}': .*{re.escape(hint)}$"):
            labels(2, ("3", "7")).parse(part)
    with pytest.raises(ConfigError, match="a number is a name"):
        labels(2, ("3", "cat")).parse("0")


def test_names_are_found_as_they_are_shown() -> None:
    for names in (NAMES, (), ("0", "3", "7"), ("Cat", "cat", " x ", "no label"), ("a\nb", "c")):
        known = labels(max(3, len(names)), names)
        shown = [known.name(label) for label in range(known.num_classes)]
        assert [known.find(name) for name in shown] == list(range(known.num_classes))
    assert labels(3, NAMES).find("No label") == 3
    assert labels(3, NAMES).find(2) == 2
    assert labels(0, ()).find("no label") == 0
    for label in (2.5, True, None, [1]):
        with pytest.raises(ConfigError, match="is neither a name nor a whole number"):
            labels(3, NAMES).find(label)
    with pytest.raises(ConfigError, match="label 1 is out of range: this network is unconditional"):
        labels(0, ()).find(1)


def test_weights_are_those_of_labels_and_mixtures() -> None:
    known = labels(3, NAMES)
    assert known.weights("dog") == known.weights(1) == [0, 1, 0, 0]
    assert known.weights(None) == [0, 0, 0, 1]
    assert known.weights({"cat": 1, "no label": 3}) == [0.25, 0, 0, 0.75]
