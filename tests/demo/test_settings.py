"""What a visitor asks for is held to the limits here, whatever a page sent."""

import copy
import os
from dataclasses import replace
from typing import Any

import pytest

from lamamba.config import DemoLimits, SamplingConfig
from lamamba.demo.previews import Models
from lamamba.demo.settings import label_names, read_numbers, read_request
from lamamba.errors import ConfigError
from lamamba.sampling import choose_device
from lamamba.sampling.generate import ImageSampler

LIMITS = DemoLimits(max_images=4, max_steps=10, max_pixels=4 * 32 * 32)


@pytest.fixture(scope="module")
def model() -> ImageSampler:
    return ImageSampler(SamplingConfig(checkpoint="nano"), choose_device("cpu"))


def test_values_become_a_request(model: ImageSampler) -> None:
    request = read_request(
        {
            "labels": ["Coat", "BAG"], "sampler": "euler", "steps": 7.0, "guidance": 3, "interval_low": 0.5,
            "interval_high": 20, "rescale": 0.5, "seed": 5, "num_images": 3, "height": 32, "width": 16,
        },
        model,
        LIMITS,
    )  # fmt: skip
    assert request.labels == (4, 8, 4)
    assert request.seeds == [5, 6, 7]
    assert read_request({"seed": 2**64 - 1}, model, DemoLimits()).seeds == [2**64 - 1]
    assert read_request({"seed": 3.0}, model, DemoLimits()).seeds == [3]
    config = request.config
    assert (config.sampler, config.steps, config.guidance, config.size) == ("euler", 7, 3.0, (32, 16))
    assert (config.guidance_options.interval, config.guidance_options.rescale) == ((0.5, 20.0), 0.5)


def test_what_is_left_out_has_a_default_within_the_limits(model: ImageSampler) -> None:
    request = read_request({}, model, DemoLimits())
    assert request.labels == (10,)  # no label
    assert (request.config.sampler, request.config.steps, request.config.size) == ("unipc", 25, (32, 32))


def test_names_are_those_of_the_checkpoint(model: ImageSampler) -> None:
    names = label_names(model)
    assert (len(names), names[0], names[9], names[10]) == (11, "T-shirt/top", "Ankle boot", "no label")


def test_names_are_text_that_a_page_can_hold(model: ImageSampler) -> None:
    names = ("Cat", "cat", " x ", "<b>|", os.fsdecode(b"\xff\x1b"))
    model = copy.copy(model)
    model.num_classes, model.info = len(names), replace(model.info, class_names=names)
    shown = label_names(model)
    assert shown == ["Cat", "cat", " x ", "<b>|", "\\xff\\x1b", "no label"]
    assert [model.labels.find(name) for name in shown] == list(range(6))
    assert model.labels.find("NO LABEL") == 5


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"num_images": 5}, "num_images is 5: give 1 to 4"),
        ({"num_images": 0}, "num_images is 0: give 1 to 4"),
        ({"steps": 11}, "steps is 11: give 1 to 10"),
        ({"steps": 10**400}, "steps is far out of range"),
        ({"steps": float("nan")}, "steps is nan: give a number"),
        ({"steps": float("inf")}, "steps is far out of range"),
        ({"steps": 2.5}, "steps is 2.5: give a whole number"),
        ({"steps": "5"}, "steps is '5': give a number"),
        ({"steps": True}, "steps is True: give a number"),
        ({"steps": None}, "steps is None: give a number"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2.0**64}, "it must be a whole number from 0 to 18,446,744,073,709,551,615"),
        ({"seed": 2**64 - 1, "num_images": 2}, "it must be a whole number from 0 to 18,446,744,073,709,551,614, for 2"),
        ({"seed": True}, "seed is True"),
        ({"guidance": 21}, "guidance is 21: give 0 to 20"),
        ({"rescale": 2}, "rescale is 2: give 0 to 1"),
        ({"interval_low": 1}, "the guidance interval has one end"),
        ({"interval_low": 5, "interval_high": 1}, "the lower first"),
        ({"height": 33}, "image size 33 is not an even number"),
        ({"height": 10**9}, "height is 1e"),
        ({"num_images": 4, "width": 34}, "4,352 pixels together, and this page makes at most 4,096"),
        ({"labels": ["cot"]}, "no class is named 'cot': did you mean coat?"),
        ({"labels": []}, "no label is chosen"),
        ({"labels": [{"a": 1}]}, "no class is named"),
        ({"labels": "Coat"}, "no label is chosen"),
        ({"sampler": "dpm++"}, "no sampler of this model is named 'dpm++'"),
        ({"checkpoint": "/etc"}, "nothing is named 'checkpoint' here"),
        ({"vae": "/etc"}, "nothing is named 'vae' here"),
    ],
)
def test_what_cannot_be_is_refused(model: ImageSampler, values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_request({"steps": 5, **values}, model, LIMITS)
    assert said in str(error.value)


def test_numbers_are_separated_by_commas() -> None:
    assert read_numbers("scales", " 1, 2.5,4") == [1.0, 2.5, 4.0]
    for text in ("", "1,", "1 2", "a", None):
        with pytest.raises(ConfigError, match=r"scales are .*give numbers separated by commas"):
            read_numbers("scales", text)


@pytest.mark.parametrize("name", ["/etc", "../nano", "assets/nano", "", None, 3, ["nano"]])
def test_only_models_that_were_allowed_are_opened(name: Any) -> None:
    with pytest.raises(ConfigError, match="no model is named"):
        Models(["nano"], "cpu")[name]


def test_models_are_loaded_once() -> None:
    models = Models(["nano"], "cpu")
    assert models.names == ["nano"]
    assert models["nano"] is models["nano"]


@pytest.mark.parametrize("checkpoints", [[], ["nano", "nano"]])
def test_models_need_names_of_their_own(checkpoints: list[str]) -> None:
    with pytest.raises(ConfigError, match="one or more, named apart"):
        Models(checkpoints, "cpu")
