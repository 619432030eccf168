"""The model of a cluster against what follows on paper, its table against the records, and how well it fits them."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from lamamba.cli import main
from lamamba.commands.plan import MEASURED, Line, Model, Point, basis, network_of, point_plan, predict
from lamamba.config import PlanConfig
from lamamba.errors import ConfigError
from lamamba.training.cost import training_flops

ROOT = Path(__file__).parents[2]
S = 4 * 653_467_688  # bytes of xl-512's gradients
GIB = 2**30


def made_up(longer_ms: float = 0.0) -> Model:
    """Make up steps of 10 ms and 4 an image; two GPUs take so much longer, and 1 GiB. A link sends 100 GB/s."""
    alone = [Point("xl-512", 1, images, 10 + 4 * images, 20 + images) for images in (8, 16, 32)]
    together = [Point("xl-512", 2, 32, 138 + longer_ms, 53.0)]
    kinds = {"all_reduce": 100.0, "all_gather": 50.0}
    return Model("NVIDIA H200", "", (*alone, *together), kinds, 100.0, {})


MODEL = made_up(longer_ms=5.0)


def test_a_line_goes_through_its_points_and_one_point_gives_a_proportion() -> None:
    line = Line.through([(1, 5.0), (2, 7.0), (5, 13.0)])
    assert (line.fixed, line.slope) == pytest.approx((3, 2))
    alone = Line.through([(4, 8.0), (4, 8.0)])
    assert (alone.fixed, alone.slope) == pytest.approx((0, 2))


def test_one_gpu_computes_and_nothing_else() -> None:
    plan = predict(PlanConfig("xl-512", gpus=1, batch_size=20), MODEL)
    assert plan.ms == pytest.approx(10 + 4 * 20)
    assert (plan.exposed_ms, plan.noise_ms, plan.sent_in_host_gb, plan.sent_out_gb) == (0, 0, 0, 0)
    assert plan.efficiency == 1
    assert plan.images_per_s(1) == pytest.approx(1e3 * 20 / 90)
    assert plan.memory_gib == pytest.approx(20 + 20)


def test_two_gpus_take_longer_by_what_was_measured() -> None:
    plan = predict(PlanConfig("xl-512", gpus=2, batch_size=64), MODEL)
    assert plan.communication_ms == pytest.approx(1e3 * S / 100e9)
    assert plan.exposed_ms == pytest.approx(5)
    assert plan.sent_in_host_gb == pytest.approx(S / 1e9)
    assert predict(PlanConfig("xl-512", gpus=2, batch_size=64), made_up(0.0)).exposed_ms == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_gpus_of_a_host_send_by_its_links_alone(gpus: int) -> None:
    plan = predict(PlanConfig("xl-512", gpus=gpus), MODEL)
    assert plan.sent_in_host_gb == pytest.approx(2 * (gpus - 1) / gpus * S / 1e9)
    assert plan.sent_out_gb == 0
    assert plan.communication_ms == pytest.approx(1e3 * plan.sent_in_host_gb / 100)


@pytest.mark.parametrize("hosts", [2, 8, 64])
def test_gpus_of_many_hosts_send_their_part_over_the_network(hosts: int) -> None:
    plan = predict(PlanConfig("xl-512", gpus=8 * hosts), MODEL)
    assert plan.sent_in_host_gb == pytest.approx(2 * 7 / 8 * S / 1e9)
    assert plan.sent_out_gb == pytest.approx(2 * S / 8 * (hosts - 1) / hosts / 1e9)
    wanted = 1e3 * (plan.sent_in_host_gb / 100 + plan.sent_out_gb / 40)
    assert plan.communication_ms == pytest.approx(wanted)


def test_what_exceeds_the_backward_pass_cannot_hide() -> None:
    slow = PlanConfig("xl-512", gpus=16, batch_size=16, network_gbytes_per_s=0.5)
    plan = predict(slow, MODEL)
    assert plan.exposed_ms == pytest.approx(plan.communication_ms - 4 * 2 / 3)
    assert plan.limit == "communication"
    sharded = predict(replace(slow, shard=True), MODEL)
    assert sharded.exposed_ms == pytest.approx(sharded.communication_ms - 4 * 2 / 3)


def test_two_points_tell_latency_from_what_grows_with_bytes() -> None:
    points = [Point("s-256", 1, 8, 3.0, 4.0), Point("s-256", 2, 8, 3.0 + 1.5, 5.0)]
    both = replace(MODEL, points=(*MODEL.points, *points))
    bare_ms = [1e3 * 4 * network_of(name).parameters / 100e9 for name in ("s-256", "xl-512")]
    slope = (5 - 1.5) / (bare_ms[1] - bare_ms[0])
    plan = predict(PlanConfig("xl-512", gpus=8, batch_size=8 * 64), both)
    assert plan.exposed_ms == pytest.approx(5 + slope * (plan.communication_ms - bare_ms[1]))
    assert predict(PlanConfig("xl-512", gpus=1, batch_size=8), both).exposed_ms == 0


def test_sharding_sends_half_as_much_again_and_divides_all_but_the_weights() -> None:
    for gpus in (8, 64):
        whole, sharded = (predict(PlanConfig("xl-512", gpus=gpus, shard=shard), MODEL) for shard in (False, True))
        assert sharded.sent_in_host_gb == pytest.approx(1.5 * whole.sent_in_host_gb)
        assert sharded.sent_out_gb == pytest.approx(1.5 * whole.sent_out_gb)
        assert whole.held_gib == pytest.approx(4 * S / GIB)
        assert sharded.held_gib == pytest.approx((1 + 3 / gpus) * S / GIB)
        assert whole.memory_gib - sharded.memory_gib == pytest.approx(3 * S / GIB * (1 - 1 / gpus))
    whole, sharded = (predict(PlanConfig("xl-512", gpus=2, shard=shard), MODEL) for shard in (False, True))
    gathering = 1e3 * S / 2 / 50e9
    assert sharded.communication_ms == pytest.approx(whole.communication_ms + gathering)
    assert sharded.ms == pytest.approx(whole.ms + gathering)


def test_noise_of_the_whole_batch_takes_time_and_memory_on_each_gpu() -> None:
    plan = predict(PlanConfig("xl-512", gpus=512, batch_size=512 * 32), MODEL)
    numbers = 511 * 32 * 4 * 64 * 64 * 2
    assert plan.noise_ms == pytest.approx(numbers / 100 / 1e6)
    assert plan.memory_gib == pytest.approx(20 + 32 + 1 + 4 * numbers / GIB)


def test_reading_limits_what_the_rest_could_do() -> None:
    config = PlanConfig("xl-512", gpus=16, batch_size=16 * 32, data_gbytes_per_s=0.01)
    plan = predict(config, MODEL)
    assert plan.read_mb == pytest.approx(8 * 32 * 64 * 1024 / 1e6)  # 64 KiB an image
    assert plan.ms == pytest.approx(plan.read_mb / 0.01)
    assert plan.efficiency == pytest.approx(138 / plan.ms)
    assert plan.limit == "reading"
    assert predict(replace(config, data_gbytes_per_s=100.0), MODEL).limit == "computing"


def test_a_preset_that_was_not_measured_takes_the_mfu_of_the_nearest() -> None:
    both = replace(MODEL, points=(*MODEL.points, Point("s-256", 1, 8, 3.0, 4.0), Point("s-256", 1, 16, 5.0, 5.0)))
    assert (both.reference("xl-512"), both.reference("l-512"), both.reference("s-512")) == ("xl-512", "xl-512", "s-256")
    theirs, ours = both.milliseconds("s-256"), both.milliseconds("s-512")
    flops = {name: training_flops(network_of(name).config) for name in ("s-256", "s-512")}
    assert flops["s-512"] / ours.slope == pytest.approx(flops["s-256"] / theirs.slope)
    assert ours.fixed == pytest.approx(theirs.fixed, rel=0.01)
    assert both.other_gib("s-512").slope == pytest.approx(4 * both.other_gib("s-256").slope)


def test_a_number_of_states_that_was_not_measured_is_refused() -> None:
    config = PlanConfig("xl-512-16-states", gpus=1, batch_size=20)
    error = "xl-512-16-states has 16 states, and no step of its width with as many was measured"
    with pytest.raises(ConfigError, match=error):
        predict(config, MODEL)
    with pytest.raises(ConfigError, match="b-256-16-states has 16 states, and no step of its width"):
        predict(replace(config, preset="b-256-16-states"), Model.shipped())
    assert predict(config, Model.shipped()).ms > 100
    given = replace(config, images_per_s=40.0)
    assert predict(given, MODEL).ms == pytest.approx(500)
    said = "the memory per image of xl-512, whose number of states is 1, not 16"
    assert any(said in line for line in basis(given, MODEL))
    assert not any("states" in line for line in basis(replace(given, preset="xl-512"), MODEL))


def test_measured_steps_of_both_numbers_of_states_give_a_line_for_each() -> None:
    points = [Point("b-256-16-states", 1, images, 2 + 3 * images, 4 + images) for images in (8, 16)]
    both = replace(MODEL, points=(*MODEL.points, *points))
    assert both.reference("xl-512-16-states") == "b-256-16-states"
    assert both.reference("b-256") == "xl-512"
    assert predict(PlanConfig("b-256-16-states", gpus=1, batch_size=20), both).ms == pytest.approx(2 + 3 * 20)
    theirs, ours = both.milliseconds("b-256-16-states"), both.milliseconds("s-256-16-states")
    assert ours.slope == pytest.approx(theirs.slope * 2_440_507_392 / 8_480_407_552)


def test_another_gpu_is_slower_by_its_peak_or_as_measured() -> None:
    config = PlanConfig("xl-512", gpus=1, batch_size=20)
    assert predict(replace(config, gpu="A100"), MODEL).ms == pytest.approx(90 * 989 / 312)
    assert predict(replace(config, gpu="Mine", images_per_s=40.0), MODEL).ms == pytest.approx(500)
    with pytest.raises(ConfigError, match=r"gpu 'Mine' is unknown: give images_per_s, .* or use one of B200"):
        predict(replace(config, gpu="Mine"), MODEL)


@pytest.mark.parametrize(
    "changed",
    [
        {"gpus": 32}, {"gpus_per_host": 16}, {"batch_size": 1024}, {"shard": True}, {"power_averages": 2},
        {"gpu": "A100"}, {"images_per_s": 100.0}, {"link_gbytes_per_s": 20.0}, {"network_gbytes_per_s": 5.0},
        {"data_gbytes_per_s": 0.01}, {"preset": "l-512"},
    ],
    ids=str,
)  # fmt: skip
def test_every_option_changes_what_is_predicted(changed: dict[str, object]) -> None:
    config = PlanConfig("xl-512", gpus=16)
    assert predict(replace(config, **changed), MODEL) != predict(config, MODEL)


# --- the measured points -----------------------------------------------------------------------------------------


@pytest.fixture
def benchmarks_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.mark.usefixtures("benchmarks_importable")
def test_the_table_and_the_page_are_what_the_records_give() -> None:
    import scaling_report

    again = "run make scaling"
    assert scaling_report.measured(scaling_report.newest_records()) == json.loads(MEASURED.read_text()), again
    page = scaling_report.PAGE.read_text()
    assert scaling_report.filled(page, Model.shipped()) == page, again
    with pytest.raises(ValueError, match="no place for the table fit"):
        scaling_report.filled(page.replace("<!-- fit -->", ""), Model.shipped())


def record(case: str, metric: str, value: float, batch: int, gpus: int = 1) -> dict[str, object]:
    common = {"dtype": "bf16", "gpu": "NVIDIA H100", "torch": "2", "triton": "3", "commit": "c"}
    spread = {"value": value, "p20": value, "p80": value}
    return {"case": case, "provider": f"processes-{gpus}", "metric": metric, "batch": batch, **spread, **common}


@pytest.mark.usefixtures("benchmarks_importable")
def test_the_newest_day_of_a_case_counts_and_its_median(tmp_path: Path) -> None:
    from scaling_report import measured, newest_records

    old = [record("scaling_xl-256", "ms", 150.0, 128), record("scaling_xl-256", "in_use_gib", 40.0, 128)]
    without_memory = [record("scaling_xl-256", "ms", 1.0, 128)]
    others = [record("draw_noise", "numbers_per_ns", 100.0, 4096)]
    others += [record(f"read_latents_{side}", "images_per_s", 1e3, 512) for side in (32, 64)]
    kinds = ("all_reduce", "all_gather")
    others += [record(f"{kind}_256_mib", "sent_gb_per_s", 300.0, 2**26, gpus=2) for kind in kinds]
    new = [{**one, "value": one["value"] + 2} for one in old]  # type: ignore[operator]
    newer = [{**one, "value": one["value"] + 4} for one in old]  # type: ignore[operator]
    files = {"2026-01-01_a": old, "2026-01-02_b": new, "2026-01-02_c": newer, "2026-01-03_d": without_memory}
    for name, records in {**files, "2026-01-01_e": others}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    content = measured(newest_records(tmp_path))
    assert content["points"] == [{"preset": "xl-256", "gpus": 1, "images": 128, "ms": 153.0, "memory_gib": 43.0}]
    # The GPU that was measured last counts, with presets of both numbers of states.
    case = "scaling_xl-256-16-states"
    later = [*old, *others, record(case, "ms", 210.0, 128), record(case, "in_use_gib", 50.0, 128)]
    (tmp_path / "2026-01-04_f.json").write_text(json.dumps([{**one, "gpu": "NVIDIA H200"} for one in later]))
    content = measured(newest_records(tmp_path))
    model = Model.read(content)
    assert model.gpu == "NVIDIA H200"
    assert [(point.preset, point.ms) for point in model.points] == [("xl-256", 150.0), ("xl-256-16-states", 210.0)]
    plan = PlanConfig("xl-256-16-states", gpus=1, batch_size=128, gpu="H200")
    assert (predict(plan, model).ms, predict(plan, model).memory_gib) == pytest.approx((210, 50))
    (tmp_path / "2026-01-04_f.json").unlink()
    (tmp_path / "2026-01-01_e.json").unlink()
    with pytest.raises(ValueError, match="there are no records of all_reduce_256_mib"):
        measured(newest_records(tmp_path))


def test_every_measured_step_is_predicted() -> None:
    points = Model.shipped().points
    assert {point.gpus for point in points} == {1, 2}
    for point in points:
        plan = predict(point_plan(point))
        assert plan.ms == pytest.approx(point.ms, rel=0.05), point
        assert plan.memory_gib == pytest.approx(point.memory_gib, rel=0.05), point


# --- the command -------------------------------------------------------------------------------------------------


def test_the_command_prints_what_is_predicted_and_on_what_it_rests(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "xl-512", "--gpus", "64", "--batch-size", "2048", "--num-images", "36000000", "--shard"])
    shown = " ".join(capsys.readouterr().out.split())
    config = PlanConfig("xl-512", gpus=64, batch_size=2048, shard=True)
    plan = predict(config)
    assert "xl-512 on 64 H200 in 8 hosts, batches of 2,048, 32 per GPU, sharded" in shown
    speed = plan.images_per_s(64)
    assert f"images/s │ {speed:,.0f}" in shown
    assert f"GPU-hours for 36,000,000 images │ {64 * 36e6 / speed / 3600:,.0f}" in shown
    assert f"memory per GPU, GiB of 139 │ {plan.memory_gib:.1f}, fits" in shown
    assert "Measured: xl-512 with " in shown
    assert "40 GB/s from each GPU's network card" in shown
    assert "that nothing hides the all-gather of the weights" in shown


def test_the_command_says_what_does_not_fit_and_what_is_stretched(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "l-512", "--gpus", "1", "--batch-size", "1024", "--gpu", "A100"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "does not fit" in shown
    assert "because l-512 was not measured" in shown
    assert "times scaled by peak TFLOP/s from NVIDIA H200" in shown
    assert "network card" not in shown
    main(["plan", "xl-512", "--gpus", "1", "--batch-size", "1024", "--images-per-s", "100"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "linear time up to 1024 images" in shown
    assert "Given: images_per_s 100." in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["xl-521"], "no preset is named 'xl-521': did you mean xl-512?"),
        (["xl-512", "--gpus", "64", "--batch-size", "100"],
         "batch_size is 100: it must be a multiple of the 64 gpus: 64 or 128"),
        (["xl-512", "--batch-size", "0"], "batch_size is 0: it must be a multiple of the 8 gpus: 8 or 16"),
        (["xl-512", "--gpus", "12"], "gpus is 12: it must be a multiple of gpus_per_host 8, or less than it"),
        (["xl-512", "--gpus", "0"], "gpus is 0: it must be 1 or more"),
        (["xl-512", "--network-gbytes-per-s", "0"], "network_gbytes_per_s is 0.0: it must be more than 0"),
        (["xl-512", "--power-averages", "-1"], "power_averages is -1: it must be 0 or more"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_cannot_be_is_refused_with_its_mend(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["plan", *arguments])
    assert end.value.code == 2
    assert re.sub(r"\s+", " ", capsys.readouterr().err).strip() == f"lamamba: error: {said}"
