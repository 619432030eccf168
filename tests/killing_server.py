"""Train again and again into one folder, killed at random moments: `killing_server.py OUT KILLS SEED ARGUMENT...`.

Every other attempt is killed at any moment from its start, the others soon after it began to save.

Each attempt is a fork of this process, which has loaded all modules but computed nothing, so that an attempt takes a
moment. What is left must be what an unbroken run leaves; the test that starts this looks.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import matplotlib.figure  # noqa: F401 - what training imports late, so that forks need not
import torch
import torch.utils.tensorboard

import lamamba.train  # noqa: F401
from lamamba.cli import main


def attempt(arguments: list[str]) -> int:
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            main(arguments)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    return child


def wait_for_a_save(checkpoints: Path, child: int) -> None:
    """Wait until an attempt has begun to save, or is at its end."""
    before = names(checkpoints)
    while names(checkpoints) <= before and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.01)


def names(folder: Path) -> set[str]:
    return set(os.listdir(folder)) if folder.is_dir() else set()


if __name__ == "__main__":
    out, kills, seed, *arguments = sys.argv[1:]
    command = ["train", "--out", out, "--resume", *arguments]
    chance = random.Random(int(seed))
    killed = inside_save = 0
    while killed < int(kills):
        child = attempt(command)
        if killed % 2:
            wait_for_a_save(Path(out) / "checkpoints", child)
            time.sleep(chance.uniform(0.0, chance.choice((0.02, 0.5))))
        else:
            time.sleep(chance.uniform(0.3, 2.0))
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) or status == 0, "an attempt failed by itself"
        killed += 1
        inside_save += any(Path(out).glob("checkpoints/.*"))
    assert os.waitpid(attempt(command), 0)[1] == 0, "the last attempt, which nobody kills, failed"
    print(f"killed {killed} times, {inside_save} of them inside a save")
