"""The examples run as they are written."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from packaging.version import parse

from lamamba.checkpoints.checkpoint import checkpoints_in
from small_network import TINY_NETWORK

pytestmark = pytest.mark.skipif(parse(torch.__version__) < parse("2.12"), reason="torchrun takes no --shutdown-timeout")
SLURM = Path(__file__).parent.parent / "examples" / "slurm" / "train.sbatch"
TINY = [
    *TINY_NETWORK,
    *("--data", "builtin", "--batch-size", "8", "--device", "cpu", "--sample-steps", "1", "--log-every", "8"),
    *("--sample-every", "100000"),
]


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """A cluster of one host: what the script asks of SLURM, as small programs that note the call."""
    programs = tmp_path / "bin"
    programs.mkdir()
    torchrun = f'exec "{sys.executable}" -m torch.distributed.run "$@"'
    for name, content in {
        "srun": 'exec "$@"',
        "torchrun": torchrun,
        "scontrol": f'if [ "$1" = show ]; then echo localhost; else echo "$@" >> "{tmp_path}/asked"; fi',
    }.items():
        (programs / name).write_text(f"#!/bin/bash\n{content}\n")
        (programs / name).chmod(0o755)
    return {
        **os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "localhost", "SLURM_GPUS_ON_NODE": "2",
    }  # fmt: skip


@pytest.mark.slow
def test_a_job_saves_and_queues_itself_again_when_its_time_is_over(tmp_path: Path, slurm: dict[str, str]) -> None:
    run = tmp_path / "run"
    job = subprocess.Popen(["bash", str(SLURM), str(run), *TINY, "--num-images", "100000"], env=slurm)
    end = time.monotonic() + 120
    while not (run / "log.jsonl").is_file() or not (run / "log.jsonl").read_text():
        assert time.monotonic() < end, "nothing happened"
        assert job.poll() is None
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=120) == 0
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    saved = int(checkpoints_in(run)[-1].name)
    assert saved >= 8
    # The next part: one process trains what is left.
    again = ["bash", str(SLURM), str(run), "--num-images", str(saved + 8)]
    assert (
        subprocess.run(
            again, env={**slurm, "SLURM_RESTART_COUNT": "1", "SLURM_GPUS_ON_NODE": "1"}, timeout=240
        ).returncode
        == 0
    )
    assert int(checkpoints_in(run)[-1].name) == saved + 8
    assert (tmp_path / "asked").read_text() == "requeue 7\n"


def test_a_fault_does_not_queue_the_job_again(tmp_path: Path, slurm: dict[str, str]) -> None:
    # Without torchrun, which would start it four times.
    stand_in = f'#!/bin/bash\nwhile [ "$1" != -m ]; do shift; done\nexec "{sys.executable}" "$@"\n'
    (tmp_path / "bin" / "torchrun").write_text(stand_in)
    done = subprocess.run(["bash", str(SLURM), str(tmp_path / "run"), "--data", "nowhere"], env=slurm, timeout=240)
    assert done.returncode != 0
    assert not (tmp_path / "asked").exists()
