import itertools
import json
import math
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor

from forked import run_python, run_ranks
from lamamba.ops.selective_scan import selective_scan
from lamamba.ops.sequence_scan import selective_scan_cuda

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def run(*options: str) -> "subprocess.CompletedProcess[str]":
    return run_python(str(BENCHMARKS / "run.py"), *options)


def cases(done: subprocess.CompletedProcess[str]) -> set[str]:
    """Read the first column of the printed records."""
    return {line.split()[0] for line in done.stdout.splitlines() if ", float32" in line or ", bf16" in line}


def test_the_command_runs_and_prints_its_cases() -> None:
    done = run("--quick", "scan")
    assert done.returncode == 0, done.stderr
    both = {f"scan_{direction}_{grid}" for direction in ("forward", "backward") for grid in ("8x8x32", "4x4x64")}
    assert cases(done) == both | {"scan_both_sequence"}


@pytest.mark.slow
def test_every_network_trains_infers_and_is_profiled() -> None:
    done = run("--quick", "limits", "train_s", "train_xl", "infer_xl", "profile")
    assert done.returncode == 0, done.stderr
    assert {"copy", "matmul", "train_s_256", "train_xl_512", "infer_xl_256", "infer_xl_512"} < cases(done)
    assert {"profile_train_xl_256_matrix_products", "profile_train_xl_256_optimizer"} < cases(done)
    assert "| XL, 256 px, 1 state, inference, batch 1: speed over DiT |" in done.stdout
    for provider in ("lamamba", "lamamba-16-states", "dit-s-2"):
        assert f"train_s_256 {provider} images_per_s" in " ".join(done.stdout.split())


def test_an_unknown_case_is_an_error_that_lists_them() -> None:
    done = run("--quick", "trane")
    assert done.returncode == 2
    assert "no case begins with trane: choose from limits, scan" in done.stderr


def test_records_hold_median_spread_and_where_they_come_from(tmp_path: Path) -> None:
    import measure

    results = measure.Results(tmp_path, at_commit="abc1234")
    results.add("case", "lamamba", "ms", [5.0, 1.0, 2.0, 3.0, 4.0, 100.0], batch=8, dtype="bf16")
    results.write()
    (path,) = tmp_path.iterdir()
    assert path.name.endswith("_abc1234.json")
    (record,) = json.loads(path.read_text())
    assert (record["value"], record["p20"], record["p80"], record["commit"]) == (3.5, 2.0, 5.0, "abc1234")
    assert {"case", "provider", "metric", "batch", "dtype", "gpu", "torch", "triton", "commit"} < record.keys()
    assert len(measure.milliseconds(lambda: None, repeats=4)) == 4


def test_a_competitor_that_fails_is_reported_and_the_records_before_it_are_kept(tmp_path: Path) -> None:
    import measure

    def fails(results: measure.Results) -> None:
        results.add("case", "lamamba", "ms", [1.0], batch=1, dtype="bf16")
        raise RuntimeError("out of memory")

    results = measure.Results(tmp_path)
    results.attempt("this one", fails)
    assert results.failures == ["this one"]
    assert len(json.loads(next(tmp_path.iterdir()).read_text())) == 1


def test_a_recurrence_becomes_a_selective_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    import peers

    def recurrence(log_gate: Tensor, token: Tensor) -> Tensor:
        h, states = torch.zeros(token.shape[0], token.shape[2]), []
        for t in range(token.shape[1]):
            h = log_gate[:, t].float().exp() * h + token[:, t]
            states.append(h)
        return torch.stack(states, dim=1)

    monkeypatch.setattr(peers, "recurrence", recurrence)
    b, k, length, d = 2, 4, 6, 3
    u, delta = torch.randn(b, k, length, d), torch.rand(b, k, length, d)
    A, D = -torch.rand(k, d, 1), torch.randn(k, d)
    B, C = torch.randn(b, k, length, 1), torch.randn(b, k, length, 1)
    y, wanted = (scan(u, delta, A, B, C, D) for scan in (peers.selective_scan, selective_scan))
    assert (y - wanted).norm() < 0.01 * wanted.norm()  # gates and tokens are rounded to bfloat16


def test_limits_count_bytes_once_and_products_at_their_peak() -> None:
    from kernel_groups import group_of, limits_by_group

    x, y = torch.ones(2, 1000), torch.ones(1000, 500)
    limits = limits_by_group(lambda: (x.add_(1), x.T, (x @ y)), gb_per_s=1.0, tflop_per_s=1e-6)
    assert limits["elementwise and the rest"] == pytest.approx(2 * x.nbytes / 1e6)
    assert limits["matrix products"] == pytest.approx(2 * 2 * 1000 * 500 / 1e3)
    assert group_of(["aten::sum", "lamamba::scan_grid_backward"]) == "scan grid backward"
    assert group_of(["cuLaunch", "aten::addmm", "aten::linear"]) == "matrix products"
    assert group_of(["aten::_fused_adamw_"]) == "optimizer"


def gpu_records() -> list:
    """Make up the records of a GPU on which lamamba takes half as long as DiT."""
    from measure import Record

    common = {"p20": 1.0, "p80": 2.0, "dtype": "bf16", "gpu": "Made-up GPU", "torch": "2", "triton": "3", "commit": "c"}
    measured = []
    from run import INFERENCE, TRAINING

    batches = [("train", *item) for item in TRAINING.items()] + [("infer", *item) for item in INFERENCE.items()]
    timed = [(f"{kind}_{size}_{pixels}", batch) for kind, (size, pixels), many in batches for batch in many]
    for provider, ms in (("lamamba", 1.0), ("lamamba-16-states", 1.6), ("dit-2", 2.0), ("dit-2-diffusers", 3.0)):
        for case, batch in timed:
            values = {"ms": ms, "images_per_s": 1e3 * batch / ms, "peak_gib": 10 * ms}
            measured += [(case, provider, metric, value, batch) for metric, value in values.items()]
        for side in (256, 512, 1024, 2048):
            measured.append((f"resolution_{side}", provider, "ns_per_pixel", ms * side**0.05, 1))
    measured.append(("scan_forward_32x32x640", "lamamba", "ms", 0.5, 128))
    measured.append(("scan_forward_32x32x640", "lamamba", "gb_per_s", 1500.0, 128))
    measured.append(("scan_forward_32x32x640", "fla, alone", "ms", 1.5, 128))
    measured.append(("copy", "pytorch", "gb_per_s", 3000.0, 1))
    measured += [("profile_train_xl_256", "lamamba", "ms", 100.0, 128)]
    for metric, value in (("ms", 40.0), ("limit_ms", 20.0)):
        measured.append(("profile_train_xl_256_matrix_products", "lamamba", metric, value, 128))
    return [
        Record(case=case, provider=provider, metric=metric, value=value, batch=batch, **common)
        for case, provider, metric, value, batch in measured
    ]


def test_targets_are_held_against_the_faster_dit() -> None:
    from report import TARGETS, target_table

    records = gpu_records()
    values = {target.what: target.measure(records) for target in TARGETS}
    assert None not in values.values()
    assert values["XL, 256 px, 1 state, training, batch 128: speed over DiT"] == 2.0
    assert values["S, 256 px, 16 states, inference, batch 256: speed over DiT"] == 1.25
    assert values["XL, 512 px, 1 state, training, batch 32: peak memory over DiT"] == 0.5
    assert values["XL, inference: longest time per pixel up to 2048 px, over that at 256 px"] == pytest.approx(8**0.05)
    table = "\n".join(target_table(records))
    assert (
        "| XL, 256 px, 1 state, training, batch 128: speed over DiT | 2.00 | at least 1.90 | 2.30 | target met |"
        in table
    )
    assert (
        "| XL, 512 px, 1 state, training, batch 32: speed over DiT | 2.00 | at least 2.20 | 2.70 | not yet |" in table
    )
    assert (
        "| B, 256 px, 1 state, inference, batch 1: speed over DiT | 2.00 | at least 1.00 | 1.50 | goal met |" in table
    )
    assert "over DiT | 0.50 | at most 1.00 | 0.67 | goal met |" in table
    assert target_table(records[:1]) == []


def test_the_page_is_made_from_the_records(tmp_path: Path) -> None:
    from report import Run, newest_runs, write_page

    cpu = newest_runs(sorted((BENCHMARKS / "results").glob("*threads*.json")))
    page = write_page([Run("2026-01-01", gpu_records()), *cpu], tmp_path, "A word on the profile.", "Why not yet.")
    text = page.read_text()
    assert "## Made-up GPU\n\n2026-01-01, PyTorch 2, Triton 3, commit c.\n" in text
    assert "| matrix products | 40 | 100% | 20 | 2.0 |" in text
    assert "A word on the profile." in text
    assert text.count("Why not yet.") == 1
    assert "threads" in text
    pictures = {path.name for path in (tmp_path / "performance").iterdir()}
    assert pictures == {"Made-up-GPU-speed.png", "Made-up-GPU-resolution.png"}
    assert all(f"(performance/{name})" in text for name in pictures)
    assert write_page(cpu, tmp_path).read_text().count("## ") == len(cpu)


@pytest.mark.slow
def test_networks_are_prepared_side_by_side_and_timed_in_turn(tmp_path: Path) -> None:
    """If one network fails, the others are timed and recorded."""
    command = [sys.executable, str(BENCHMARKS / "together.py"), "--quick", "--out", str(tmp_path), "--commit", "abc"]
    networks = ["infer:s:lamamba:256:2,1", "infer:s:lamamba:256:-1"]
    done = subprocess.run([*command, *networks], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout.endswith(f"failed: {networks[1]}\n")
    (path,) = tmp_path.iterdir()
    records = json.loads(path.read_text())
    assert [(r["case"], r["provider"], r["metric"], r["batch"]) for r in records if r["metric"] != "peak_gib"] == [
        ("infer_s_256", "lamamba", metric, batch) for batch in (2, 1) for metric in ("ms", "images_per_s")
    ]
    assert {record["commit"] for record in records} == {"abc"}


@pytest.mark.parametrize("number", [1, 2])
def test_scaling_is_measured_by_any_number_of_processes(tmp_path: Path, number: int) -> None:
    command = [str(BENCHMARKS / "scaling.py"), "--quick", "--out", str(tmp_path)]
    done = run_ranks(number, *command) if number > 1 else run_python(*command)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.json")
    records = json.loads(path.read_text())
    assert {record["provider"] for record in records} == {f"processes-{number}"}
    values = {(record["case"], record["metric"], record["batch"]): record["value"] for record in records}
    for batch in (2 * number, 4 * number):
        ms, speed = (values["scaling_quick", metric, batch] for metric in ("ms", "images_per_s"))
        assert speed == pytest.approx(1e3 * batch / ms, rel=0.5)  # medians, each
    others = {case for case, _, _ in values} - {"scaling_quick"}
    alone, together = {"read_latents_8", "draw_noise"}, {"all_reduce_1_mib", "all_gather_1_mib"}
    assert others == (alone if number == 1 else together)


def test_a_batch_too_large_is_reported_and_the_next_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import scaling

    class NarrowTrainer(scaling.Trainer):
        def __init__(self, config: scaling.TrainConfig, *others: object) -> None:
            if config.batch_size == 2:
                raise torch.OutOfMemoryError("no room")
            super().__init__(config, *others)

    monkeypatch.setattr(scaling, "Trainer", NarrowTrainer)
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--quick", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="failed: quick, 2 images"):
        scaling.main()
    (path,) = tmp_path.iterdir()
    trained = [record["batch"] for record in json.loads(path.read_text()) if record["case"] == "scaling_quick"]
    assert set(trained) == {4}


def test_scans_are_compared_with_the_compiled_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What replaces the compiled kernel in other networks stands for it here; it takes the same arguments."""
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", selective_scan_cuda)
    benchmark = import_module("selective_scan")
    times = itertools.count(1)
    monkeypatch.setattr(benchmark, "milliseconds", lambda run, repeats, warm_up: [run() is not None and next(times)])
    benchmark.main(["--quick", "--out", str(tmp_path / "records")])
    benchmark.main(["--quick", "--network", "--batch", "2", "--out", str(tmp_path / "records")])
    records = [json.loads(line) for line in (tmp_path / "records").read_text().splitlines()]
    assert not [record for record in records if "failed" in record]
    forward = [record for record in records if record.get("pass") == "forward"]
    assert len(forward) == 4
    assert all(record["error"] < (1e-6 if record["dtype"] == "float32" else 1e-2) for record in forward)
    assert max(value for record in records for value in record.get("difference", {}).values()) < 1e-6
    # Times count up: 1 and 2 for the first shape, 3 and 4 for the other version, and so on.
    assert [record["all"] for record in records if record.get("ratios_of") == "forward"] == [[3 / 1, 7 / 5]]
    assert [record["mean"] for record in records if record.get("ratios_of") == "backward"] == [1]
    losses = [record["first_loss"] for record in records if "network" in record]
    assert len(losses) == 4
    assert max(losses) - min(losses) < 0.05


def test_sets_of_images_are_timed_in_every_way(tmp_path: Path) -> None:
    options = ["--out", str(tmp_path), "--providers", "lamamba", "dit-pipeline", "dit-generate"]
    done = run_python(str(BENCHMARKS / "sampling.py"), "--quick", *options)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.json")
    values = {(record["provider"], record["metric"]): record["value"] for record in json.loads(path.read_text())}
    assert all(map(math.isfinite, values.values()))
    assert values["autoencoder", "ms_per_image"] > 0
    ways = {"lamamba", "dit-pipeline", "dit-generate"}
    assert values.keys() == {("autoencoder", "ms_per_image")} | {
        (way, metric) for way in ways for metric in ("images_per_s", "first_start_s", "start_s")
    }
