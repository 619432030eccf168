"""Train to the end, then again, killed at random moments: `killing_server.py FOLDER KILLS SEED ARGUMENT...`.

FOLDER/whole is the unbroken run, FOLDER/killed-0 the one that is killed; should it come to its end before it was killed
so often, FOLDER/killed-1 goes on, and so forth. Every other attempt is killed at any moment of its start and its first
steps, the others soon after they began to save; how soon is counted in starts and steps as this machine takes them.

Each attempt is a fork of this process, which has trained for a moment in one thread, so that all modules and compiled
loops are there. What is left must be what the unbroken run leaves; the test that starts this looks.
"""

import gc
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import torch

import loss_curves  # noqa: F401
from lamamba.cli import main


def attempt(out: Path, arguments: list[str]) -> int:
    child = os.fork()
    if child == 0:
        try:
            main(["train", "--out", str(out), "--resume-or-start", *arguments])
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    return child


def finish(out: Path, arguments: list[str]) -> float:
    """Let an attempt come to its end; returns the seconds that it took."""
    start = time.monotonic()
    assert os.waitpid(attempt(out, arguments), 0)[1] == 0, "an attempt that nobody kills failed"
    return time.monotonic() - start


def wait_for_a_save(checkpoints: Path, child: int) -> None:
    """Wait until an attempt has begun to save, or is at its end."""
    before = names(checkpoints)
    while names(checkpoints) <= before and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.001)


def names(folder: Path) -> set[str]:
    return set(os.listdir(folder)) if folder.is_dir() else set()


if __name__ == "__main__":
    folder, (kills, seed, *arguments) = Path(sys.argv[1]), sys.argv[2:]
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU would have autograd start threads, which no fork survives
    torch.set_num_threads(1)
    report = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for num_images in ("4", "8"):
        main(["train", "--out", str(folder / "first"), "--resume-or-start", *arguments, "--num-images", num_images])
    shutil.rmtree(folder / "first")
    gc.collect()
    gc.freeze()  # of what all attempts share
    assert threading.active_count() == 1, f"threads are left: {threading.enumerate()}"

    whole_s = finish(folder / "whole", arguments)
    start_s = finish(folder / "whole", arguments)  # there is nothing left to do
    step_s = (whole_s - start_s) / len((folder / "whole" / "log.jsonl").read_text().splitlines())

    chance = random.Random(int(seed))
    killed = inside_save = ended = 0
    while killed < int(kills):
        out = folder / f"killed-{ended}"
        child = attempt(out, arguments)
        if killed % 2:
            wait_for_a_save(out / "checkpoints", child)
            time.sleep(chance.uniform(0.0, chance.choice((0.1, 1.5))) * step_s)
        else:
            time.sleep(chance.uniform(0.0, start_s + 2 * step_s))
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) or status == 0, "an attempt failed by itself"
        if os.WIFSIGNALED(status):
            killed += 1
            inside_save += any(out.glob("checkpoints/.*"))
        else:
            ended += 1
    finish(folder / f"killed-{ended}", arguments)
    print(f"killed {killed} times, {inside_save} of them inside a save, in {ended + 1} runs", file=report)
    print(f"a start takes {start_s:.2f} s, a step {step_s:.2f} s", file=report)
