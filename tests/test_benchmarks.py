import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "run.py"), *options]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command_runs_and_prints_its_cases() -> None:
    done = run("--quick", "scan")
    assert done.returncode == 0, done.stderr
    cases = {line.split()[0] for line in done.stdout.splitlines()}
    assert cases == {"scan_forward", "scan_both", "copy", "scan_both_sequence"}


def test_an_unknown_case_is_an_error_that_lists_them() -> None:
    done = run("--quick", "trane")
    assert done.returncode == 2
    assert "no case begins with trane: there are scan" in done.stderr


def test_records_hold_median_spread_and_where_they_come_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import measure

    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    results = measure.Results()
    results.add("case", "lamamba", "ms", [5.0, 1.0, 2.0, 3.0, 4.0, 100.0], batch=8, dtype="bf16")
    (record,) = json.loads(results.write().read_text())
    assert (record["value"], record["p20"], record["p80"]) == (3.5, 2.0, 5.0)
    assert {"case", "provider", "metric", "batch", "dtype", "gpu", "torch", "triton", "commit"} < record.keys()
    assert len(measure.milliseconds(lambda: None, repeats=4)) == 4
