"""The command `lamamba doctor`: check what works on this machine, and suggest fixes.

Another process checks one part after the other and reports the results. If a part ends that process, for example with
an illegal instruction in compiled code, that is its result, and a new process checks the remaining parts.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from lamamba import __version__
from lamamba.config import DoctorConfig
from lamamba.terminal.output import say

LIMIT_S = 300.0  # for one part; a check that takes longer hangs
OPERATIONS = (  # as in lamamba.ops.selfcheck, which only the other process imports
    *("scan_grid", "scan_grid, 4 states", "selective_scan_fn", "selective_scan_fn, 4 states"),
    *("window_attention", "depthwise_convolution", "gated_norm", "residual_norm", "linear_gelu"),
    *("norm_linear", "norm_mlp", "norm_attention", "gated_norm_linear"),
)
TRACKERS = ("wandb", "trackio")
_OTHER_TORCH = (
    "pip install --force-reinstall torch --index-url URL, with the URL that pytorch.org/get-started/locally names"
)
_FOR_DEVELOPERS = ("dev", "bench")
_MANY_THREADS = 16  # with more, other programs slow small networks: benchmarks/results/2026-11-27_many_cores.txt


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    """The part that was checked."""
    state: Literal["ok", "note", "broken"]
    """A note is optional or not needed on this machine; what is broken should be fixed."""
    detail: str
    """What was found."""
    fix: str = ""
    """What would help; a command if possible."""


def doctor(config: DoctorConfig) -> bool:
    """Print the findings line by line, and return whether nothing is broken."""
    findings = []
    for finding in examine(list(PARTS)):
        findings.append(finding)
        if not config.json:
            say(f"{finding.state:<6} {finding.name:<22} {finding.detail}")
            if finding.fix:
                say(f"{'':<29} {finding.fix}")
    broken = sum(finding.state == "broken" for finding in findings)
    if config.json:
        say(*json.dumps([asdict(finding) for finding in findings], indent=2).splitlines())
    else:
        say(f"{broken} broken: see above for what to do" if broken else "nothing is broken")
    return not broken


def examine(parts: Sequence[str], limit_s: float = LIMIT_S) -> Iterator[Finding]:
    """Check parts of the machine (names in `PARTS`), each for at most `limit_s` seconds. Raises nothing."""
    left, context = list(parts), multiprocessing.get_context("spawn")
    while left:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_report, args=(left, sender), daemon=True)
        try:
            process.start()
        except OSError:  # no other process can be started
            yield from look(left.pop(0))
            continue
        sender.close()  # so that reading ends when the process ends
        fault = ""
        while left and not fault:
            try:
                if receiver.poll(limit_s):
                    yield from receiver.recv()
                    left.pop(0)
                else:
                    fault = f"did not answer for {limit_s:g} s"
            except (EOFError, OSError):
                process.join()
                fault = f"ended the process that checked it ({_describe_end(process.exitcode)})"
        if fault:
            yield Finding(left.pop(0), "broken", fault)
        process.kill()
        process.join()


def look(part: str) -> list[Finding]:
    """Check one part in this process. An error becomes a finding."""
    try:
        return list(PARTS[part]())
    except (Exception, SystemExit) as error:
        return [Finding(part, "broken", f"cannot be checked ({_describe(error)})")]


def _report(parts: list[str], sender: Connection) -> None:
    silence = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):  # libraries would print warnings about what is reported here anyway
        os.dup2(silence, descriptor)
    for part in parts:
        sender.send(look(part))


def _describe(error: BaseException) -> str:
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


def _describe_end(code: int | None) -> str:
    if code is not None and code < 0:
        with suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit code {code}"


def _look_at_python() -> Iterator[Finding]:
    place = Path(__file__).parents[1]
    yield Finding("lamamba", "ok", f"{__version__}, in {place}")
    yield Finding("Python", "ok", f"{platform.python_version()} on {platform.platform()}, {sys.executable}")


def _look_at_packages() -> Iterator[Finding]:
    """Compare the installed packages with the required versions."""
    required = _requirements("")
    faults = [(one, fault) for one in required if (fault := _check_version(one))]
    for one, fault in faults:
        yield Finding("packages", "broken", fault, f"pip install '{one.name}{one.specifier}'")
    if not faults:
        yield Finding("packages", "ok", f"all {len(required)} required packages have suitable versions")


def _requirements(extra: str) -> list[Any]:
    """List each `packaging.requirements.Requirement` of an extra, or with "" those that are always required."""
    from packaging.requirements import Requirement

    listed = [Requirement(text) for text in importlib.metadata.requires("lamamba") or ()]
    always = [one for one in listed if one.marker is None or one.marker.evaluate({"extra": ""})]
    if not extra:
        return always
    return [one for one in listed if one not in always and one.marker and one.marker.evaluate({"extra": extra})]


def _check_version(required: Any) -> str:
    """Say what is wrong with the installed version of a requirement; "" if nothing is."""
    try:
        version = importlib.metadata.version(required.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{required.name} is not installed"
    fits = required.specifier.contains(version, prereleases=True)
    return "" if fits else f"{required.name} is {version}, and lamamba needs {required.specifier}"


def _look_at_import(name: str) -> Iterator[Finding]:
    try:
        module = importlib.import_module(name)
        yield Finding(name, "ok", module.__version__)
    except Exception as error:
        detail = f"cannot be imported ({_describe(error)})"
        yield Finding(name, "broken", detail, f"pip install --force-reinstall {name}")


def _look_at_torch() -> Iterator[Finding]:
    (finding,) = _look_at_import("torch")
    if finding.state == "ok":
        import torch

        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        built = f"for ROCm {torch.version.hip}" if torch.version.hip else built
        finding = replace(finding, detail=f"{torch.__version__}, built {built}")
    yield finding


def _look_at_gpus() -> Iterator[Finding]:
    import torch

    seen = _ask_nvidia_smi()
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            detail = (
                f"{device.name}, {device.total_memory / 2**30:.0f} GiB, compute capability "
                f"{device.major}.{device.minor}" + (f", driver {seen[0][1]}" if seen else "")
            )
            try:
                torch.ones(2, device=f"cuda:{index}").sum().item()
                yield Finding(f"GPU {index}", "ok", detail)
            except RuntimeError as error:  # for example, torch has no kernels for this GPU
                yield Finding(f"GPU {index}", "broken", f"{detail}: {_describe(error)}", _OTHER_TORCH)
    elif seen and torch.version.cuda is None:
        detail = f"{seen[0][0]} is present, but this torch is built without CUDA"
        yield Finding("GPU", "broken", detail, _OTHER_TORCH)
    elif seen:
        try:
            torch.cuda.init()
            reason = "unknown reason"
        except (RuntimeError, AssertionError) as error:
            reason = _describe(error)
        fix = f"install a newer driver than {seen[0][1]}, for CUDA {torch.version.cuda}; or {_OTHER_TORCH}"
        yield Finding("GPU", "broken", f"{seen[0][0]} is present, but torch cannot use it: {reason}", fix)
    elif torch.backends.mps.is_available():
        yield Finding("GPU", "ok", "Apple GPU, through Metal (MPS)")
    else:
        yield Finding("GPU", "note", "no GPU that torch can use; lamamba runs on the CPU")


def _ask_nvidia_smi() -> list[tuple[str, str]]:
    """Ask NVIDIA's driver, not torch, for the names of the GPUs and its version. Empty without a driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=30)
    lines = answer.stdout.splitlines() if answer.returncode == 0 else []
    return [(name.strip(), driver.strip()) for name, _, driver in (line.rpartition(",") for line in lines)]


def _look_at_precision() -> Iterator[Finding]:
    from lamamba.sampling import choose_device, uses_bf16

    device = choose_device("auto")
    if uses_bf16("auto", device):
        yield Finding("bf16", "ok", f"used on {device} (--precision auto)")
    else:
        yield Finding("bf16", "note", f"float32 is used on {device} (--precision auto)")


def _look_at_cuda_graphs() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        yield Finding("CUDA graphs", "note", "not used without CUDA; operations are launched one by one")
        return
    from lamamba.sampling.captured import Captured

    captured = Captured(lambda x: {"y": x + 1})
    found = float(captured(torch.ones(1, device="cuda"))["y"])
    captured.forget()
    if found == 2:
        yield Finding("CUDA graphs", "ok", "a training step is launched as one graph")
    else:
        yield Finding("CUDA graphs", "broken", "a recorded graph gives a wrong result", "train with --no-cuda-graph")


def _look_at_distributed() -> Iterator[Finding]:
    import torch

    if not torch.distributed.is_available():
        yield Finding("torch.distributed", "note", "not included in this torch; training uses a single process")
        return
    has_nccl, num_gpus = torch.distributed.is_nccl_available(), torch.cuda.device_count()
    backends = [f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"] if has_nccl else []
    backends += ["gloo"] if torch.distributed.is_gloo_available() else []
    detail = f"with {' and '.join(backends) or 'no backend'}"
    if num_gpus > 1 and not has_nccl:
        fix = f"install a torch with NCCL, to train on all {num_gpus} GPUs"
        yield Finding("torch.distributed", "broken", detail, fix)
    else:
        yield Finding("torch.distributed", "ok", detail)


def _look_at_triton() -> Iterator[Finding]:
    import torch

    on_cuda = torch.cuda.is_available() and torch.version.hip is None
    if importlib.util.find_spec("triton") is None:
        if on_cuda:
            detail = "not installed; on this GPU lamamba runs without its kernels, and slower"
            yield Finding("Triton", "broken", detail, "pip install triton")
        else:
            yield Finding("Triton", "note", "not installed, and not needed without an NVIDIA GPU")
        return
    import triton
    from triton import knobs

    if knobs.runtime.interpret:
        yield Finding("Triton", "note", "TRITON_INTERPRET is set, for tests; kernels run in Python", "unset it")
    elif on_cuda:
        yield Finding("Triton", "ok", f"{triton.__version__}; lamamba uses its kernels on this GPU")
    else:
        yield Finding("Triton", "note", f"{triton.__version__}, not used without an NVIDIA GPU")


def _look_at_numba() -> Iterator[Finding]:
    without = "on a CPU scan, attention and norms run in plain PyTorch, which is slower"
    if importlib.util.find_spec("numba") is None:
        yield Finding("numba", "note", f"not installed; {without}", "pip install 'lamamba[cpu]'")
        return
    (finding,) = _look_at_import("numba")
    if finding.state == "ok":
        yield replace(finding, detail=f"{finding.detail}; compiles the loops of scan, attention and norms on a CPU")
    else:
        yield replace(finding, detail=f"{finding.detail}; {without}", fix="pip install --upgrade 'lamamba[cpu]'")


def _look_at_operation(name: str) -> Iterator[Finding]:
    import torch

    from lamamba.ops.selfcheck import check_operation
    from lamamba.sampling import choose_device, uses_bf16

    device = choose_device("auto")
    dtype = torch.bfloat16 if uses_bf16("auto", device) else torch.float32
    agreement = check_operation(name, device, dtype)
    detail = (
        f"{agreement.version} on {device}, {str(dtype).removeprefix('torch.')}; result and gradients are within "
        f"{agreement.error:.0e} of plain float64"
    )
    if agreement.holds:
        yield Finding(name, "ok", detail)
    else:
        yield Finding(name, "broken", f"{detail}, which is wrong", "install another version of torch, Triton or numba")


def _look_at_weights() -> Iterator[Finding]:
    from lamamba.checkpoints.checkpoint import shipped_weights, verify

    for folder in set(shipped_weights().values()):
        verify(folder)
    yield Finding("shipped weights", "ok", f"{', '.join(shipped_weights())}; checksums match")


def _look_at_extras() -> Iterator[Finding]:
    for extra in importlib.metadata.metadata("lamamba").get_all("Provides-Extra") or ():
        if extra in _FOR_DEVELOPERS:
            continue
        required = _requirements(extra)
        if faults := [fault for one in required if (fault := _check_version(one))]:
            yield Finding(f"extra {extra}", "note", "; ".join(faults), f"pip install 'lamamba[{extra}]'")
        else:
            yield Finding(f"extra {extra}", "ok", ", ".join(one.name for one in required))
    for tracker in TRACKERS:
        if importlib.util.find_spec(tracker) is None:
            yield Finding(f"tracker {tracker}", "note", "not installed", f"pip install {tracker}")
        else:
            yield Finding(f"tracker {tracker}", "ok", importlib.metadata.version(tracker))


def _look_at_hub() -> Iterator[Finding]:
    """Report the settings of the Hugging Face hub, without contacting it."""
    from huggingface_hub import constants, get_token

    offline = ", never contacted (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else ""
    if get_token() is None:
        detail = f"{constants.ENDPOINT}{offline}, without a token; you can download public models, but not upload"
        yield Finding("hub", "note", detail, "hf auth login")
    else:
        yield Finding("hub", "ok", f"{constants.ENDPOINT}{offline}, with a token")
    cache = Path(constants.HF_HUB_CACHE)
    there = next(path for path in (cache, *cache.parents) if path.exists())
    detail = f"{cache}, {shutil.disk_usage(there).free / 2**30:.0f} GiB free"
    if os.access(there, os.W_OK):
        yield Finding("hub cache", "ok", detail)
    else:
        yield Finding("hub cache", "broken", f"{detail}, not writable", "set HF_HOME to a writable folder")


def _look_at_threads() -> Iterator[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # the limit of a container
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        cores = min(cores, max(1, round(int(quota) / int(period))))
    names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_PROC_BIND", "MKL_NUM_THREADS", "KMP_AFFINITY")
    settings = "".join(f", {name}={os.environ[name]}" for name in names if name in os.environ)
    detail = f"torch uses {torch.get_num_threads()} on {cores} core{'s' * (cores > 1)}{settings}"
    has_gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    if torch.get_num_threads() > cores:
        yield Finding("threads", "broken", f"{detail}; they wait for each other", f"set OMP_NUM_THREADS={cores}")
    elif torch.get_num_threads() > _MANY_THREADS and not has_gpu:
        slow = f"{detail}; slow if other programs use the cores too"
        yield Finding("threads", "note", slow, "set OMP_NUM_THREADS=8 for small networks")
    else:
        yield Finding("threads", "ok", detail)


PARTS: dict[str, Callable[[], Iterator[Finding]]] = {
    "Python": _look_at_python,
    "packages": _look_at_packages,
    "torch": _look_at_torch,
    "diffusers": partial(_look_at_import, "diffusers"),
    "GPU": _look_at_gpus,
    "bf16": _look_at_precision,
    "CUDA graphs": _look_at_cuda_graphs,
    "torch.distributed": _look_at_distributed,
    "Triton": _look_at_triton,
    "numba": _look_at_numba,
    **{name: partial(_look_at_operation, name) for name in OPERATIONS},
    "shipped weights": _look_at_weights,
    "extras": _look_at_extras,
    "hub": _look_at_hub,
    "threads": _look_at_threads,
}
