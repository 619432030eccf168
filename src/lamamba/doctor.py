"""The command `lamamba doctor`: what works on this machine, what does not, and what would help.

Each part is looked at in another process, which reports one after the other. Where one of them ends that process, with
an illegal instruction in compiled code say, that is what is reported of it, and a new process goes on with the rest.
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
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

from lamamba import __version__
from lamamba.config import DoctorConfig
from lamamba.output import say

LIMIT_S = 300.0  # for one part: what has not answered by then never will
OPERATIONS = (  # those of lamamba.selfcheck, which only the other process can import
    "scan_grid", "scan_grid, 4 states", "window_attention", "depthwise_convolution",
    "gated_norm", "residual_norm", "linear_gelu",
)  # fmt: skip
TRACKERS = ("wandb", "trackio")
_OTHER_TORCH = (
    "pip install --force-reinstall torch --index-url URL, with the URL that pytorch.org/get-started/locally names"
)
_FOR_DEVELOPERS = ("dev", "bench")
_MANY_THREADS = 16  # more made small networks slow beside other programs: benchmarks/results/2026-11-27_many_cores.txt


@dataclass(frozen=True)
class Finding:
    """A line of the report."""

    name: str
    """What was looked at."""
    state: Literal["ok", "note", "fault"]
    """A note is something that could be better, or of which there is no need here; a fault, what should be mended."""
    says: str
    """What there is."""
    mend: str = ""
    """What would help, a command where there is one."""


def doctor(config: DoctorConfig) -> bool:
    """Print what was found, line by line; returns whether nothing is at fault."""
    findings = []
    for finding in examine(list(PARTS)):
        findings.append(finding)
        if not config.json:
            say(f"{finding.state:<6} {finding.name:<22} {finding.says}")
            if finding.mend:
                say(f"{'':<29} {finding.mend}")
    faults = sum(finding.state == "fault" for finding in findings)
    if config.json:
        say(*json.dumps([asdict(finding) for finding in findings], indent=2).splitlines())
    else:
        say("no faults" if not faults else f"{faults} fault{'s' * (faults > 1)}: see above for what helps")
    return not faults


def examine(parts: Sequence[str], limit_s: float = LIMIT_S) -> Iterator[Finding]:
    """Look at parts of the machine, names of `PARTS`, each for so many seconds at most; raises nothing."""
    left, context = list(parts), multiprocessing.get_context("spawn")
    while left:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_report, args=(left, sender), daemon=True)
        try:
            process.start()
        except OSError:  # there can be no other process
            yield from look(left.pop(0))
            continue
        sender.close()  # so that the end of the process is the end of what it says
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
                fault = f"ended the process that looked at it ({_describe_end(process.exitcode)})"
        if fault:
            yield Finding(left.pop(0), "fault", fault)
        process.kill()
        process.join()


def look(part: str) -> list[Finding]:
    """Look at one part, in this process; what goes wrong is a finding."""
    try:
        return list(PARTS[part]())
    except (Exception, SystemExit) as error:
        return [Finding(part, "fault", f"cannot be looked at ({_describe(error)})")]


def _report(parts: list[str], sender: Connection) -> None:
    silence = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):  # libraries warn of what is a finding here
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
    place = Path(__file__).parent
    yield Finding("lamamba", "ok", f"{__version__}, in {place}")
    yield Finding("Python", "ok", f"{platform.python_version()} on {platform.platform()}, {sys.executable}")


def _look_at_packages() -> Iterator[Finding]:
    """Compare what is installed with the versions that this one asks for."""
    faults = [fault for name, wanted in _requirements("") for fault in _check_version(name, wanted)]
    yield from (Finding("packages", "fault", says, mend) for says, mend in faults)
    if not faults:
        yield Finding("packages", "ok", f"{len(_requirements(''))} that lamamba needs, in versions that it can use")


def _requirements(extra: str) -> list[tuple[str, str]]:
    """List the packages of an extra, or with "" those always needed, each with the versions that will do."""
    from packaging.requirements import Requirement

    listed = [Requirement(text) for text in importlib.metadata.requires("lamamba") or ()]
    always = [one for one in listed if one.marker is None or one.marker.evaluate({"extra": ""})]
    if extra:
        listed = [one for one in listed if one.marker is not None and one.marker.evaluate({"extra": extra})]
    return [(one.name, str(one.specifier)) for one in listed if (one in always) == (not extra)]


def _check_version(name: str, wanted: str) -> Iterator[tuple[str, str]]:
    """Say what is wrong with a package and what helps, if anything is."""
    from packaging.specifiers import SpecifierSet

    mend = f"pip install '{name}{wanted}'"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        yield f"{name} is not installed", mend
        return
    if not SpecifierSet(wanted).contains(version, prereleases=True):
        yield f"{name} is {version}, and lamamba needs {wanted}", mend


def _look_at_import(name: str) -> Iterator[Finding]:
    try:
        module = importlib.import_module(name)
    except Exception as error:
        line = (str(error).splitlines() or [""])[0]
        yield Finding(
            name,
            "fault",
            f"cannot be imported ({type(error).__name__}: {line})",
            f"pip install --force-reinstall {name}",
        )
        return
    yield Finding(name, "ok", f"{module.__version__}")


def _look_at_torch() -> Iterator[Finding]:
    for finding in _look_at_import("torch"):
        if finding.state == "ok":
            import torch

            built = f"CUDA {torch.version.cuda}" if torch.version.cuda else ""
            built = f"ROCm {torch.version.hip}" if torch.version.hip else built
            yield Finding("torch", "ok", f"{torch.__version__}, built {f'for {built}' if built else 'without CUDA'}")
        else:
            yield finding


def _look_at_gpus() -> Iterator[Finding]:
    import torch

    seen = _ask_nvidia_smi()
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            says = (
                f"{device.name}, {device.total_memory / 2**30:.0f} GiB, compute capability "
                f"{device.major}.{device.minor}" + (f", driver {seen[0][1]}" if seen else "")
            )
            try:
                torch.ones(2, device=f"cuda:{index}").sum().item()
                yield Finding(f"GPU {index}", "ok", says)
            except RuntimeError as error:  # such as a torch that has no kernels for this GPU
                yield Finding(f"GPU {index}", "fault", f"{says}: {_describe(error)}", _OTHER_TORCH)
    elif seen and torch.version.cuda is None:
        yield Finding(
            "GPU", "fault", f"{seen[0][0]} is there, and this torch is built without CUDA",
            _OTHER_TORCH,
        )  # fmt: skip
    elif seen:
        try:
            torch.cuda.init()
            reason = "it does not say why"
        except (RuntimeError, AssertionError) as error:
            reason = _describe(error)
        yield Finding(
            "GPU", "fault", f"{seen[0][0]} is there, and torch cannot use it: {reason}",
            f"a newer driver than {seen[0][1]}, for CUDA {torch.version.cuda}; or {_OTHER_TORCH}",
        )  # fmt: skip
    elif torch.backends.mps.is_available():
        yield Finding("GPU", "ok", "Apple's, by Metal (MPS)")
    else:
        yield Finding("GPU", "note", "none that torch can use: lamamba runs on the CPU")


def _ask_nvidia_smi() -> list[tuple[str, str]]:
    """Ask NVIDIA's driver, not torch, for the names of its GPUs and its version; nothing where there is none."""
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
        yield Finding("CUDA graphs", "note", "not without CUDA: operations are launched one by one")
        return
    from lamamba.captured import Captured

    captured = Captured(lambda x: {"y": x + 1})
    found = float(captured(torch.ones(1, device="cuda"))["y"])
    captured.forget()
    if found == 2:
        yield Finding("CUDA graphs", "ok", "a step is launched as one")
    else:
        yield Finding("CUDA graphs", "fault", "what is recorded computes something else", "train --no-cuda-graph")


def _look_at_distributed() -> Iterator[Finding]:
    import torch

    if not torch.distributed.is_available():
        yield Finding("torch.distributed", "note", "not in this torch: one process alone can train")
        return
    backends = (
        [f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"] if torch.distributed.is_nccl_available() else []
    )
    backends += ["gloo"] if torch.distributed.is_gloo_available() else []
    num_gpus = torch.cuda.device_count()
    lacks_nccl = num_gpus > 1 and not torch.distributed.is_nccl_available()
    yield Finding(
        "torch.distributed", "fault" if lacks_nccl else "ok", f"by {' and '.join(backends) or 'no backend'}",
        f"a torch with NCCL, for {num_gpus} GPUs to train together" if lacks_nccl else "",
    )  # fmt: skip


def _look_at_triton() -> Iterator[Finding]:
    import torch

    on_cuda = torch.cuda.is_available() and torch.version.hip is None
    if importlib.util.find_spec("triton") is None:
        if on_cuda:
            yield Finding(
                "Triton", "fault", "not installed: on this GPU lamamba runs without its kernels, and slower",
                "pip install triton",
            )  # fmt: skip
        else:
            yield Finding("Triton", "note", "not installed, nor needed without an NVIDIA GPU")
        return
    import triton
    from triton import knobs

    if knobs.runtime.interpret:
        yield Finding("Triton", "note", "TRITON_INTERPRET is set, for tests: kernels run in Python", "unset it")
    elif on_cuda:
        yield Finding("Triton", "ok", f"{triton.__version__}: on this GPU lamamba runs in its kernels")
    else:
        yield Finding("Triton", "note", f"{triton.__version__}, not used without an NVIDIA GPU")


def _look_at_numba() -> Iterator[Finding]:
    if importlib.util.find_spec("numba") is None:
        says = "not installed: on a CPU the scan and the norms run in plain PyTorch, and slower"
        yield Finding("numba", "note", says, "pip install 'lamamba[cpu]'")
        return
    try:
        version = importlib.import_module("numba").__version__
    except ImportError as error:
        says = f"cannot be imported ({error}): on a CPU the scan and the norms run in plain PyTorch, and slower"
        yield Finding("numba", "fault", says, "pip install --upgrade 'lamamba[cpu]'")
        return
    yield Finding("numba", "ok", f"{version}: on a CPU the scan and the norms run in its loops")


def _look_at_operation(name: str) -> Iterator[Finding]:
    import torch

    from lamamba.sampling import choose_device, uses_bf16
    from lamamba.selfcheck import check_operation

    device = choose_device("auto")
    dtype = torch.bfloat16 if uses_bf16("auto", device) else torch.float32
    agreement = check_operation(name, device, dtype)
    says = (
        f"{agreement.version} on {device}, {str(dtype).removeprefix('torch.')}: result and gradients are within "
        f"{agreement.error:.0e} of plain float64"
    )
    if agreement.holds:
        yield Finding(name, "ok", says)
    else:
        yield Finding(name, "fault", f"{says}, which is wrong", "another version of torch, Triton or numba")


def _look_at_weights() -> Iterator[Finding]:
    from lamamba.checkpoint import shipped_weights, verify

    for folder in set(shipped_weights().values()):
        verify(folder)
    yield Finding("shipped weights", "ok", f"of {', '.join(shipped_weights())}, as they were published")


def _look_at_extras() -> Iterator[Finding]:
    for extra in importlib.metadata.metadata("lamamba").get_all("Provides-Extra") or ():
        if extra in _FOR_DEVELOPERS:
            continue
        faults = [fault for name, wanted in _requirements(extra) for fault in _check_version(name, wanted)]
        if faults:
            says = "; ".join(says for says, _ in faults)
            yield Finding(f"extra {extra}", "note", says, f"pip install 'lamamba[{extra}]'")
        else:
            yield Finding(f"extra {extra}", "ok", ", ".join(name for name, _ in _requirements(extra)))
    for tracker in TRACKERS:
        if importlib.util.find_spec(tracker) is None:
            yield Finding(f"tracker {tracker}", "note", "not installed", f"pip install {tracker}")
        else:
            yield Finding(f"tracker {tracker}", "ok", importlib.metadata.version(tracker))


def _look_at_hub() -> Iterator[Finding]:
    """Say what would be used of the Hugging Face hub; it is not asked."""
    from huggingface_hub import constants, get_token

    offline = ", not asked for anything (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else ""
    if get_token() is None:
        yield Finding("hub", "note", f"{constants.ENDPOINT}{offline}, no token: what is public can be fetched, and "
                      "nothing sent", "hf auth login")  # fmt: skip
    else:
        yield Finding("hub", "ok", f"{constants.ENDPOINT}{offline}, with a token")
    cache = Path(constants.HF_HUB_CACHE)
    there = next(path for path in (cache, *cache.parents) if path.exists())
    says = f"{cache}, {shutil.disk_usage(there).free / 2**30:.0f} GiB free"
    if os.access(there, os.W_OK):
        yield Finding("hub's cache", "ok", says)
    else:
        yield Finding("hub's cache", "fault", f"{says}, and cannot be written", "HF_HOME=FOLDER, one that can")


def _look_at_threads() -> Iterator[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # of a container
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        cores = min(cores, max(1, round(int(quota) / int(period))))
    names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_PROC_BIND", "MKL_NUM_THREADS", "KMP_AFFINITY")
    settings = "".join(f", {name}={os.environ[name]}" for name in names if name in os.environ)
    says = f"{torch.get_num_threads()} of torch on {cores} core{'s' * (cores > 1)}{settings}"
    has_gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    if torch.get_num_threads() > cores:
        yield Finding("threads", "fault", f"{says}: they wait for each other", f"OMP_NUM_THREADS={cores}")
    elif torch.get_num_threads() > _MANY_THREADS and not has_gpu:
        slow = f"{says}: slow where other programs use the cores too"
        yield Finding("threads", "note", slow, "OMP_NUM_THREADS=8, for small networks")
    else:
        yield Finding("threads", "ok", says)


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
