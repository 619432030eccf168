"""What is said of a machine, whatever is wrong with it."""

import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lamamba.cli import main
from lamamba.commands import doctor as doctors
from lamamba.commands.doctor import Finding, examine, look
from lamamba.ops.backend import use_backend
from lamamba.ops.selfcheck import OPERATIONS, check_operation

CPU = torch.device("cpu")


def the_only(part: str) -> Finding:
    (finding,) = look(part)
    return finding


def test_this_machine_is_at_no_fault(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    main(["doctor", "--json"])
    shown = capsys.readouterr()
    found = {entry["name"]: entry for entry in json.loads(shown.out)}
    assert set(OPERATIONS) < found.keys()
    assert [entry for entry in found.values() if entry["state"] == "broken"] == []
    assert found["torch"]["detail"].startswith(torch.__version__)
    assert found["hub"]["detail"].endswith("with a token")
    assert "secret" not in shown.out + shown.err


def test_lines_say_what_helps_and_a_fault_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    findings = [Finding("first", "ok", "works"), Finding("second", "broken", "does not", "pip install second")]
    monkeypatch.setattr(doctors, "examine", lambda parts: iter(findings))
    with pytest.raises(SystemExit, match="1"):
        main(["doctor"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["ok", "first", "works"], ["broken", "second", "does", "not"], ["pip", "install", "second"],
        ["1", "broken:", "see", "above", "for", "what", "to", "do"],
    ]  # fmt: skip


def test_a_part_that_ends_its_process_is_a_finding_and_the_rest_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a library does whose compiled code this processor cannot run."""
    (tmp_path / "numba.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")
    (tmp_path / "diffusers.py").write_text("import time\ntime.sleep(1000)\n")
    monkeypatch.syspath_prepend(tmp_path)  # which the other process takes over
    found = list(examine(["Python", "numba", "diffusers", "packages"], limit_s=10))
    assert [(one.name, one.state) for one in found] == [
        ("lamamba", "ok"), ("Python", "ok"), ("numba", "broken"), ("diffusers", "broken"), ("packages", "ok"),
    ]  # fmt: skip
    assert found[2].detail == "ended the process that checked it (SIGILL)"
    assert found[3].detail == "did not answer for 10 s"


def test_where_there_can_be_no_other_process_this_one_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(process: object) -> None:
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setattr(multiprocessing.get_context("spawn").Process, "start", fail)
    assert [one.name for one in examine(["Python", "packages"])] == ["lamamba", "Python", "packages"]


def test_without_torch_every_part_still_has_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text('raise ImportError("libtorch.so: cannot open shared object file\\nand more")')
    monkeypatch.syspath_prepend(tmp_path)
    found = {one.name: one for one in examine(list(doctors.PARTS), limit_s=60)}
    says = "cannot be imported (ImportError: libtorch.so: cannot open shared object file)"
    assert found["torch"] == Finding("torch", "broken", says, "pip install --force-reinstall torch")
    for name in ("GPU", "bf16", "threads", *OPERATIONS):
        assert "libtorch.so" in found[name].detail, name
    assert found["packages"].state == found["extra cpu"].state == "ok"


def test_what_is_missing_or_too_old_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    versions = {"torch": "2.8.0", "torchmetrics": None}

    def version(name: str) -> str:
        found = versions.get(name, real)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found if isinstance(found, str) else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    says = "torch is 2.8.0, and lamamba needs >=2.9"
    assert the_only("packages") == Finding("packages", "broken", says, "pip install 'torch>=2.9'")
    extras = {one.name: one for one in look("extras")}
    assert extras["extra evaluate"] == Finding(
        "extra evaluate", "note", "torchmetrics is not installed", "pip install 'lamamba[evaluate]'"
    )
    assert "extra dev" not in extras


@pytest.fixture
def on_nvidia(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """Pretend that there is a GPU, and a torch built for some CUDA that cannot use it."""

    def pretend(cuda: str | None) -> None:
        monkeypatch.setattr(doctors, "_ask_nvidia_smi", lambda: [("NVIDIA H100 80GB HBM3", "470.1")])
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

        def fail() -> None:
            raise RuntimeError("The NVIDIA driver on your system is too old")

        monkeypatch.setattr(torch.cuda, "init", fail)

    return pretend


def test_a_gpu_that_torch_cannot_use_is_a_fault(on_nvidia: Callable[[str | None], None]) -> None:
    on_nvidia(None)
    assert the_only("GPU").state == "broken"
    assert the_only("GPU").detail == "NVIDIA H100 80GB HBM3 is present, but this torch is built without CUDA"
    assert "pip install --force-reinstall torch" in the_only("GPU").fix
    on_nvidia("13.0")
    assert "torch cannot use it: RuntimeError: The NVIDIA driver on your system is too old" in the_only("GPU").detail
    assert "a newer driver than 470.1, for CUDA 13.0" in the_only("GPU").fix


def test_missing_compilers_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert the_only("numba").fix == "pip install 'lamamba[cpu]'"
    assert the_only("Triton").state == "note"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (the_only("Triton").state, the_only("Triton").fix) == ("broken", "pip install triton")


def test_more_threads_than_cores_are_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1000)
    assert the_only("threads").state == "broken"
    assert the_only("threads").fix.startswith("set OMP_NUM_THREADS=")


def test_many_threads_are_a_note_where_the_cpu_is_all_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)), raising=False)
    monkeypatch.setattr(Path, "read_text", lambda path, encoding: "max 100000")  # no quota
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert the_only("threads").state == "note"
    assert "torch uses 64 on 64 cores" in the_only("threads").detail
    assert the_only("threads").fix.startswith("set OMP_NUM_THREADS=8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert the_only("threads").state == "ok"


@pytest.mark.parametrize("backend", ["auto", "pytorch"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_agree_with_their_meaning(name: str, backend: str) -> None:
    with use_backend(backend):
        agreement = check_operation(name, CPU, torch.float32)
    assert agreement.holds
    assert 0 < agreement.error < 1e-5
    if backend == "pytorch":
        assert agreement.version == "PyTorch"


def test_loops_are_named_where_they_run() -> None:
    pytest.importorskip("numba")
    versions = {name: check_operation(name, CPU, torch.float32).version for name in OPERATIONS}
    scans = {f"{name}{states}" for name in ("scan_grid", "selective_scan_fn") for states in ("", ", 4 states")}
    after_norms = {"norm_linear", "norm_mlp", "norm_attention"}
    with_loops = {*scans, *after_norms, "window_attention", "gated_norm", "residual_norm"}
    assert versions == {name: "compiled loops" if name in with_loops else "PyTorch" for name in OPERATIONS}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_kernels_are_named_where_they_run() -> None:
    pytest.importorskip("triton")
    with use_backend("triton"):
        agreement = check_operation("gated_norm", CPU, torch.float32)
    assert agreement.version == "kernels"
    assert agreement.holds


def test_an_operation_that_computes_something_else_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    selfcheck = sys.modules["lamamba.ops.selfcheck"]
    for name, operation in OPERATIONS.items():
        for wrong in (lambda y: y * 1.001, lambda y: y + float("nan")):
            broken = operation._replace(run=lambda *inputs, run=operation.run, wrong=wrong: wrong(run(*inputs)))
            monkeypatch.setattr(selfcheck, "OPERATIONS", {**OPERATIONS, name: broken})
            assert not check_operation(name, CPU, torch.float32).holds, name
            assert the_only(name).state == "broken"


def test_the_names_of_operations_are_the_selfcheck_s() -> None:
    assert set(doctors.OPERATIONS) == set(OPERATIONS)


def test_the_driver_is_asked_for_names_and_version(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = SimpleNamespace(returncode=0, stdout="NVIDIA H100 80GB HBM3, 580.95.05\nNVIDIA L4, 580.95.05\n")
    monkeypatch.setattr(doctors.shutil, "which", lambda name: name)
    monkeypatch.setattr(doctors.subprocess, "run", lambda *arguments, **options: answer)
    assert doctors._ask_nvidia_smi() == [("NVIDIA H100 80GB HBM3", "580.95.05"), ("NVIDIA L4", "580.95.05")]
