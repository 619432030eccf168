"""Time several networks in one run: prepare all at once, each in its own process, then time one after the other.

    python benchmarks/together.py train:s:lamamba:256:256,32 train:s:dit-s-2:256:256,32 infer:xl:lamamba:256:128,8,1

Each argument is a network, as KIND:SIZE:PROVIDER:PIXELS:BATCHES. KIND is `train` or `infer`; networks.py has the
providers. This saves minutes compared with run.py, which compiles and times one network after the other. All networks
must fit into the memory of the GPU together. Records have the same form as those of run.py. Compare only records of one
run. Peak memory is recorded only for the first batch size of a network.
"""

import argparse
import fcntl
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

import networks
from measure import RESULTS, Record, Results, captured, milliseconds

REPEATS = {"train": 10, "infer": 40}


class Network(NamedTuple):
    """What one process prepares and times."""

    kind: str
    size: str
    provider: str
    pixels: int
    batches: tuple[int, ...]

    def __str__(self) -> str:
        return ":".join((self.kind, self.size, self.provider, str(self.pixels), ",".join(map(str, self.batches))))

    @classmethod
    def parse(cls, text: str) -> "Network":
        """Read KIND:SIZE:PROVIDER:PIXELS:BATCHES; raises ArgumentTypeError."""
        try:
            kind, size, provider, pixels, batches = text.split(":")
            network = cls(kind, size, provider, int(pixels), tuple(map(int, batches.split(","))))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text}: give five parts, such as train:s:lamamba:256:256,32") from None
        if kind not in REPEATS or size not in networks.SIZES:
            kinds, sizes = ", ".join(REPEATS), ", ".join(networks.SIZES)
            raise argparse.ArgumentTypeError(f"{text}: KIND is one of {kinds}; SIZE is one of {sizes}")
        return network


class Prepared(NamedTuple):
    """A step that can be timed."""

    replay: Callable[[], object]
    step: Callable[[], object]
    """The step itself. It is kept because the replay reads its tensors."""
    peak_gib: float


def prepare(network: Network, batch: int, quick: bool) -> Prepared:
    """Build a network, run its step, and capture it."""
    side = 8 if quick else network.pixels // 8
    module = networks.build(network.size, network.provider, side, quick)
    if network.kind == "train":
        step = networks.training_step(module, networks.random_batch(batch, side), autocast=True)
    else:
        images = networks.random_batch(batch, side, dtype=torch.bfloat16)
        step = networks.inference_step(networks.to_bfloat16(module.eval()), images)
    step()
    if networks.CUDA:
        torch.cuda.reset_peak_memory_stats()
    replay = captured(step)
    return Prepared(replay, step, torch.cuda.max_memory_allocated() / 2**30 if networks.CUDA else 0.0)


def work(network: Network, folder: Path, number: int, total: int, quick: bool, commit: str) -> None:
    """Prepare a network, wait until all processes have prepared theirs, and time it when its turn comes."""
    results = Results(None, commit)
    prepared = [prepare(network, batch, quick) for batch in network.batches]
    (folder / f"ready-{number}").touch()
    while len(list(folder.glob("ready-*"))) < total:
        time.sleep(0.05)
    case = f"{network.kind}_{network.size}_{network.pixels}"
    for index, (batch, of_batch) in enumerate(zip(network.batches, prepared, strict=True)):
        with open(folder / "turn", "w") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)
            times = milliseconds(of_batch.replay, 2 if quick else REPEATS[network.kind], warm_up=1 if quick else 10)
        results.add(case, network.provider, "ms", times, batch, "bf16")
        results.add(case, network.provider, "images_per_s", [1e3 * batch / ms for ms in times], batch, "bf16")
        if networks.CUDA and index == 0:
            results.add(case, network.provider, "peak_gib", [of_batch.peak_gib], batch, "bf16")
    (folder / f"{number}.json").write_text(json.dumps([asdict(record) for record in results.records]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+", type=Network.parse, metavar="KIND:SIZE:PROVIDER:PIXELS:BATCHES")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--commit", default="", help="commit to note, for a copy without history")
    parser.add_argument("--quick", action="store_true", help="a quick check with tiny sizes; ignore its numbers")
    parser.add_argument("--worker", nargs=3, metavar=("FOLDER", "NUMBER", "TOTAL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        folder, number, total = arguments.worker
        work(arguments.networks[0], Path(folder), int(number), int(total), arguments.quick, arguments.commit)
        return 0
    texts = [str(network) for network in arguments.networks]
    options = [*(["--quick"] if arguments.quick else []), "--commit", arguments.commit]
    results = Results(arguments.out, arguments.commit)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, *options, "--worker", folder]
        workers = [
            subprocess.Popen([*command, str(number), str(len(texts)), text]) for number, text in enumerate(texts)
        ]
        while None in (codes := [worker.poll() for worker in workers]):
            for number, code in enumerate(codes):
                if code:  # the others must not wait for a process that has failed, however it ended
                    Path(folder, f"ready-{number}").touch()
            time.sleep(0.1)
        failed = [text for text, code in zip(texts, codes, strict=True) if code]
        for path in sorted(Path(folder).glob("*.json"), key=lambda path: int(path.stem)):
            results.records += [Record(**record) for record in json.loads(path.read_text())]
    results.write()
    for text in failed:
        print(f"failed: {text}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
