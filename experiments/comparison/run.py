"""Run the comparison of LaMamba with DiT, piece by piece. Finished pieces are skipped, and stopped ones continue.

    python experiments/comparison/run.py                            list all pieces, and which are done
    python experiments/comparison/run.py seed-0 --seconds 540    a list, or pieces by name, within this time
    python experiments/comparison/run.py seed-0 --quick --out demo/comparison --results demo/comparison

Several processes with the same folders share the pieces, one process per GPU (CUDA_VISIBLE_DEVICES). Under torchrun,
they share each training instead. The numbers are the same except for rounding, whose effect grows:

    torchrun --nproc-per-node 2 experiments/comparison/run.py s-state-16

README.md in this folder has the commands for a GPU that is available for ten minutes at a time.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from filelock import FileLock, Timeout

from distilling import distill
from lamamba.config import nearest
from lamamba.distributed.processes import joined
from lamamba.errors import LamambaError
from lamamba.sampling import choose_device
from pieces import FULL, LISTS, PIECES, QUICK, Clipping, Distilling, Memorisation, Piece, Speed, Steps, Study, Training
from setting import RESULTS, Clock, OutOfTimeError, Setting, is_finished, of_learning_rate
from studies import look_for_copies, score_clipping, score_steps, time_steps
from training import forget, train

FUNCTIONS = {
    Training: train, Steps: score_steps, Clipping: score_clipping, Memorisation: look_for_copies, Speed: time_steps,
    Distilling: distill,
}  # fmt: skip


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"lists ({', '.join(LISTS)}) or pieces, in the order to run them")
    parser.add_argument("--out", type=Path, default=Path("runs/comparison"), help="checkpoints and unfinished records")
    parser.add_argument("--results", type=Path, default=RESULTS, help="records, to keep")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many, all being saved")
    parser.add_argument("--data-folder", type=Path, help="the four files of Fashion-MNIST, without Debian's package")
    parser.add_argument("--emoji", type=Path, help="the folder that `lamamba prepare emoji` made")
    parser.add_argument("--cifar", type=Path, help="the folder that cifar.py made")
    parser.add_argument("--features", type=Path, help="the folder that features.py made, for more scores")
    parser.add_argument("--learning-rate", type=float, help="in place of the pieces' own")
    parser.add_argument("--commit", help="of the code, where there is a copy without history")
    parser.add_argument("--device", default="auto", help="cpu, cuda; auto takes the best there is")
    parser.add_argument("--quick", action="store_true", help="tiny networks and numbers; the records say so")
    return parser.parse_args()


def chosen(names: list[str]) -> list[Piece]:
    """Find pieces by their names and lists; raises SystemExit with suggestions."""
    pieces: list[Piece] = []
    for name in names:
        if name not in LISTS and name not in PIECES:
            sys.exit(f"nothing is named {name!r}: {nearest(name, [*LISTS, *PIECES])}")
        pieces += LISTS.get(name) or [PIECES[name]]
    return pieces


def show(setting: Setting) -> None:
    for name, pieces in LISTS.items():
        print(name)
        for piece in pieces:
            begun = (setting.out / piece.name / "record.json").is_file()
            print(f"    {piece.name:24}{'done' if is_finished(setting, piece) else 'begun' if begun else ''}")


def main() -> int:
    """Run the requested pieces. Return 0 if all are done, 1 if a piece failed, 3 if time ran out.

    torchrun turns both into 1.
    """
    clock = Clock(start=time.monotonic())
    arguments = read_arguments()
    clock.seconds = arguments.seconds
    pieces = chosen(arguments.names)
    try:
        with joined(arguments.device) as (processes, device):
            setting = Setting(
                arguments.out, arguments.results, QUICK if arguments.quick else FULL, choose_device(device), clock,
                arguments.data_folder, arguments.emoji, arguments.commit, processes, arguments.cifar,
                arguments.features,
            )  # fmt: skip
            if not pieces:
                show(setting)
                return 0
            return (run if processes.world_size == 1 else run_together)(setting, pieces, arguments.learning_rate)
    except OutOfTimeError:
        return 3


def run(setting: Setting, pieces: Sequence[Piece], learning_rate: float | None = None) -> int:
    """Run all pieces that no other process runs, and wait for the other processes."""
    for piece in pieces:
        if is_finished(setting, piece):
            print(f"{piece.name}: done before", flush=True)
    failed: set[str] = set()
    setting.out.mkdir(parents=True, exist_ok=True)
    while left := [piece for piece in pieces if piece.name not in failed and not is_finished(setting, piece)]:
        names = {piece.name for piece in left}
        for piece in left:
            if isinstance(piece, Study) and piece.of is not None and piece.of.name in names:
                continue  # the network that it needs is not trained yet
            lock = FileLock(setting.out / f".{piece.name}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue  # another process runs it
            try:
                if not is_finished(setting, piece):  # another process may just have finished it
                    setting.clock.check_to_begin()
                    FUNCTIONS[type(piece)](setting, of_learning_rate(piece, learning_rate))
                    print(f"{piece.name}: done", flush=True)
            except OutOfTimeError:
                print(f"{piece.name}: the time is over, the same command goes on from here", flush=True)
                return 3
            except (LamambaError, OSError) as error:
                print(f"{piece.name}: error: {error}", file=sys.stderr, flush=True)
                failed.add(piece.name)
            finally:
                lock.release()
                forget(setting.device)
            break
        else:
            try:
                setting.clock.check()
            except OutOfTimeError:
                return 3
            time.sleep(0.2)
    return int(bool(failed))


def run_together(setting: Setting, pieces: Sequence[Piece], learning_rate: float | None = None) -> int:
    """Run trainings, each on all ranks. Rank 0 decides, writes and prints.

    Raises:
        OutOfTimeError: there was no time for the rest.
        SystemExit: a requested piece is not a training, or a training failed.
    """
    is_first = setting.processes.is_first
    others = [piece.name for piece in pieces if not isinstance(piece, Training)]
    if others:
        told = f"{', '.join(others)}: several processes share trainings alone: run this without torchrun"
        sys.exit(told if is_first else 1)
    setting.out.mkdir(parents=True, exist_ok=True)
    for piece in pieces:
        if not setting.processes.all_reduce_max(is_first and not is_finished(setting, piece)):
            continue
        lock = FileLock(setting.out / f".{piece.name}.lock")
        try:
            with lock.acquire(timeout=0) if is_first else nullcontext():
                setting.check_time(to_begin=True)
                train(setting, of_learning_rate(piece, learning_rate))
        except OutOfTimeError:
            if is_first:
                print(f"{piece.name}: the time is over, the same command goes on from here", flush=True)
            raise
        except Timeout:
            sys.exit(f"{piece.name}: error: another process runs it")
        except (LamambaError, OSError) as error:
            sys.exit(f"{piece.name}: error: {error}")
        if is_first:
            print(f"{piece.name}: done", flush=True)
        forget(setting.device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
