"""Several processes train as one: started by torchrun, the same numbers as in a single process.

On a CPU through gloo; where there are two GPUs also there, through NCCL and with steps as CUDA graphs.
"""

import json
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch
from packaging.version import parse
from safetensors.torch import load_file

import steps
from forked import Fork, run_ranks
from lamamba.checkpoints.checkpoint import checkpoints_in, load_checkpoint
from lamamba.cli import main
from lamamba.distributed.processes import Processes, joined
from lamamba.errors import ConfigError
from lamamba.training.averages import snapshots_in
from small_network import TINY_NETWORK

TINY = [
    *TINY_NETWORK,
    *("--data", "builtin", "--batch-size", "8", "--precision", "float32", "--sample-steps", "1", "--horizontal-flip"),
    *("--learning-rate", "0.003", "--log-every", "8", "--checkpoint-every", "24", "--sample-every", "100000"),
]
# On GPUs as wide as the kernels want it.
DEVICES = {"cpu": [*TINY, "--device", "cpu"], "cuda": [*TINY, "--embed-dim", "32"]}


@pytest.fixture(scope="module", params=DEVICES)
def tiny(request: pytest.FixtureRequest) -> list[str]:
    """Options of a short run on a device."""
    if request.param == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    return DEVICES[request.param]


def train_together(
    number: int,
    *options: str,
    program: tuple[str, ...] = ("-m", "lamamba"),
    command: str = "train",
    restarts: int = 0,
) -> "subprocess.CompletedProcess[str]":
    return run_ranks(number, *program, command, *options, restarts=restarts)


def program_with(folder: Path, fault: str) -> tuple[str, ...]:
    """Write the command line with something put before every step, which knows `rank`, `trainer`, `restart`, `x_0`."""
    path = folder / "program.py"
    path.write_text(
        f"""
import os, signal, sys, time
from lamamba.cli import main
from lamamba.training.trainer import Trainer

rank, restart = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
draw = Trainer._draw

def broken(trainer, images, labels):
    x_0, *others = draw(trainer, images, labels)
{fault}
    return x_0, *others

Trainer._draw = broken
main()
"""
    )
    return (str(path),)


def seconds_since_it_was_gone(done: "subprocess.CompletedProcess[str]") -> float:
    gone = re.search(r"gone at (\S+)", done.stderr)
    assert gone, done.stderr
    return time.time() - float(gone[1])


def curve(run: Path) -> list[tuple[int, float, float]]:
    records = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [(record["images"], record["loss"], record["grad_norm"]) for record in records]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny: list[str]) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    main(["train", "--out", str(out), *tiny, "--num-images", "40"])
    return out


# test_examples.py tests ranks that start as separate processes.
@pytest.mark.parametrize(
    ("number", "options"), [(4, []), (2, ["--shard", "--accumulate", "2", "--gradient-checkpointing"])]
)
def test_the_loss_curve_is_that_of_one_process(
    tmp_path: Path, tiny: list[str], alone: Path, number: int, options: list[str]
) -> None:
    if "--device" not in tiny and torch.cuda.device_count() < number:
        pytest.skip(f"needs {number} GPUs")
    out = tmp_path / "run"
    done = train_together(number, "--out", str(out), *tiny, "--num-images", "40", *options)
    assert done.returncode == 0, done.stderr
    assert len(curve(out)) == 5
    for ours, wanted in zip(curve(out), curve(alone), strict=True):
        assert ours == pytest.approx(wanted, rel=1e-4)
    assert done.stdout.count("done: 40 images seen") == 1, "the first process alone prints"
    averages = [load_checkpoint(run).network.state_dict() for run in (out, alone)]
    for name, value in averages[0].items():
        torch.testing.assert_close(value, averages[1][name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
def test_a_step_is_the_same_however_the_batch_is_cut(tmp_path: Path) -> None:
    """By ranks with all of the optimizer state, with a part of it each, and as in CUDA graphs."""
    done = run_ranks(2, steps.__file__, str(tmp_path))
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "steps.json").read_text())
    assert len(results) == len(steps.CASES)
    for case, (distance, times_sent) in results.items():
        # Muon computes its steps in bfloat16, which makes more of rounding errors.
        assert distance < (0.02 if "muon" in case else 1e-3 if steps.ON_GPU else 1e-4), case
        if not steps.ON_GPU:  # where a graph sends them unseen
            assert times_sent == 2, f"{case}: once in each of two steps"


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path, tiny: list[str], alone: Path) -> None:
    """Sharded or not: what two have saved in parts, one reads whole, and three cut otherwise."""
    out = str(tmp_path / "run")
    often = ["--power-averages", "0.1", "--snapshot-every", "40", "--checkpoint-every", "8"]
    assert train_together(2, "--out", out, *tiny, *often, "--shard", "--num-images", "16").returncode == 0
    shards = sorted(path.name for path in (checkpoints_in(Path(out))[-1] / "training").iterdir())
    assert [name.split("-model")[0] for name in shards] == ["shard-00001", "shard-00002"]
    main(["train", "--out", out, "--resume", "--no-shard", "--num-images", "24"])
    more = 3 if "--device" in tiny else min(3, torch.cuda.device_count())
    assert train_together(more, "--out", out, "--resume", "--shard", "--num-images", "32").returncode == 0
    assert train_together(2, "--out", out, "--resume", "--no-shard", "--num-images", "40").returncode == 0
    assert checkpoints_in(Path(out))[-1].name == f"{40:012d}"
    for ours, wanted in zip(curve(Path(out)), curve(alone), strict=True):
        assert ours == pytest.approx(wanted, rel=1e-4)
    expected = tmp_path / "expected"
    main(["train", "--out", str(expected), *tiny, *often, "--num-images", "40"])
    ours, wanted = (load_file(snapshots_in(run)[-1]) for run in (Path(out), expected))
    for name, value in wanted.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-2, atol=1e-3, msg=name)


@pytest.mark.parametrize("shard", [[], ["--shard"]], ids=["copies", "shards"])
def test_finetuning_begins_with_the_same_weights_in_all(
    tmp_path: Path, tiny: list[str], alone: Path, shard: list[str]
) -> None:
    options = ["--data", "builtin", "--batch-size", "8", "--num-images", "16", "--log-every", "8"]
    options += ["--precision", "float32", "--sample-steps", "1"]
    options += [*tiny[tiny.index("--device") :][:2]] if "--device" in tiny else []
    run, expected = tmp_path / "run", tmp_path / "expected"
    done = train_together(2, str(alone), "--out", str(run), *options, *shard, command="finetune")
    assert done.returncode == 0, done.stderr
    main(["finetune", str(alone), "--out", str(expected), *options])
    for ours, wanted in zip(curve(run), curve(expected), strict=True):
        assert ours == pytest.approx(wanted, rel=1e-4)


def test_shares_of_a_batch_are_as_even_as_can_be() -> None:
    assert Processes(1, 4).share(8) == slice(2, 4)
    for length, number in ((7, 3), (8, 3), (3, 3), (1024, 7)):
        shares = [Processes(rank, number).share(length) for rank in range(number)]
        assert [place for share in shares for place in range(length)[share]] == list(range(length))
        sizes = [share.stop - share.start for share in shares]
        assert (sizes[0], sizes[-1]) == (min(sizes), max(sizes)) == (length // number, -(-length // number))
    with pytest.raises(ConfigError, match=r"batch_size 3 is too small for 4 processes: use 4 or more"):
        Processes(0, 4).share(3)


PLACE = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": None}, r"WORLD_SIZE is 2 but RANK is not set, so start with torchrun, or unset RANK and WORLD_SIZE"),
        ({"WORLD_SIZE": None, "RANK": "1"}, r"RANK is 1: it must be less than WORLD_SIZE 1, so start with torchrun"),
        ({"WORLD_SIZE": "two"}, r"WORLD_SIZE is 'two': it must be a whole number, 1 or more, so"),
        ({"WORLD_SIZE": ""}, r"WORLD_SIZE is '': it must be"),
        ({"WORLD_SIZE": "0"}, r"WORLD_SIZE is '0': it must be"),
        ({"WORLD_SIZE": "2.0"}, r"WORLD_SIZE is '2\.0': it must be"),
        ({"RANK": "-1"}, r"RANK is '-1': it must be a whole number, 0 or more"),
        ({"RANK": "2"}, r"RANK is 2: it must be less than WORLD_SIZE 2"),
        ({"MASTER_ADDR": None}, r"WORLD_SIZE is 2 but MASTER_ADDR is not set"),
        ({"MASTER_ADDR": ""}, r"WORLD_SIZE is 2 but MASTER_ADDR is not set"),
        ({"MASTER_ADDR": "no such host"}, r"2 processes could not connect at no such host:29500 \(.*check MASTER_ADDR"),
        ({"MASTER_PORT": None}, r"WORLD_SIZE is 2 but MASTER_PORT is not set"),
        ({"MASTER_PORT": "http"}, r"MASTER_PORT is 'http': it must be a whole number, from 1 to 65535"),
        ({"MASTER_PORT": "65536"}, r"MASTER_PORT is '65536': it must be"),
        ({"MASTER_PORT": "taken"}, r"another program uses MASTER_PORT \d+: choose another port"),
    ],
    ids=str,
)
def test_a_wrong_environment_is_one_line(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, str | None], message: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for name, value in {**PLACE, **changes}.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, str(taken.getsockname()[1]) if value == "taken" else value)
        with pytest.raises(ConfigError, match=message) as caught, joined("cpu"):
            pytest.fail("it was accepted")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("local_rank", [None, "x", "7"])
def test_a_wrong_local_rank_is_one_line(monkeypatch: pytest.MonkeyPatch, local_rank: str | None) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {**PLACE, "LOCAL_RANK": local_rank}.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    with (
        pytest.raises(ConfigError, match=r"LOCAL_RANK is (not set|'x'|7, but this machine has 2 GPUs)"),
        joined("cuda"),
    ):
        pytest.fail("it was accepted")


def test_a_device_that_processes_cannot_share_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match=r"device 'mps' does not support 2 processes"), joined("mps"):
        pass


@pytest.mark.parametrize("shard", [[], ["--shard"]], ids=["copies", "shards"])
def test_all_skip_a_step_that_is_not_finite_in_one_of_them(tmp_path: Path, tiny: list[str], shard: list[str]) -> None:
    fault = """
    if rank == 1 and trainer.step in (2, 3):
        x_0 = x_0 * float("nan")
"""
    out = tmp_path / "run"
    done = train_together(
        2, "--out", str(out), *tiny, "--num-images", "48", "--log-every", "24", *shard,
        program=program_with(tmp_path, fault),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [record["skipped_steps"] for record in records] == [1, 1]
    network = load_checkpoint(out, "network").network
    assert all(bool(value.isfinite().all()) for value in network.state_dict().values())


@pytest.mark.slow
def test_where_one_dies_the_others_end_and_a_restart_goes_on(tmp_path: Path, tiny: list[str], alone: Path) -> None:
    fault = """
    if rank == 1 and trainer.step == 4 and restart == 0:
        print("gone at", time.time(), file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""
    program = program_with(tmp_path, fault)
    done = train_together(2, "--out", str(tmp_path / "dead"), *tiny, "--num-images", "40", program=program)
    assert done.returncode != 0
    assert seconds_since_it_was_gone(done) < 60
    assert re.search(r"rank +: 1 .*exitcode +: -9", done.stderr, re.DOTALL), "who died is named"
    assert [path.name for path in checkpoints_in(tmp_path / "dead")] == [f"{24:012d}"]
    again = tmp_path / "again"
    done = train_together(
        2, "--out", str(again), "--resume-or-start", *tiny, "--num-images", "40", program=program, restarts=1
    )
    assert done.returncode == 0, done.stderr
    for ours, wanted in zip(curve(again), curve(alone), strict=True):
        assert ours == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(("rank", "shard"), [(0, []), (1, ["--shard"])])
def test_an_error_in_one_ends_all(tmp_path: Path, tiny: list[str], rank: int, shard: list[str]) -> None:
    fault = f"""
    if rank == {rank} and trainer.step == 3:
        print("gone at", time.time(), file=sys.stderr, flush=True)
        raise FileNotFoundError("this one is broken")
"""
    program = program_with(tmp_path, fault)
    done = train_together(2, "--out", str(tmp_path / "run"), *tiny, *shard, "--num-images", "40", program=program)
    assert done.returncode != 0
    assert "this one is broken" in done.stderr
    assert seconds_since_it_was_gone(done) < 60


@pytest.mark.parametrize("shard", [[], ["--shard"]], ids=["copies", "shards"])
def test_a_signal_to_all_is_one_checkpoint(tmp_path: Path, tiny: list[str], shard: list[str]) -> None:
    fault = """
    if rank == 1 and trainer.step == 3:
        os.kill(os.getpid(), signal.SIGTERM)
"""
    out = tmp_path / "run"
    program = program_with(tmp_path, fault)
    done = train_together(2, "--out", str(out), *tiny, *shard, "--num-images", "40", program=program)
    assert done.returncode != 0
    assert "stopped by SIGTERM at image 32, all is saved" in done.stderr
    assert [int(path.name) for path in checkpoints_in(out)] == [24, 32]


@pytest.mark.skipif(parse(torch.__version__) < parse("2.12"), reason="torchrun takes no --shutdown-timeout")
@pytest.mark.parametrize("name", ["SIGUSR1", "SIGINT"])
def test_a_signal_to_the_whole_job_is_one_checkpoint(tmp_path: Path, tiny: list[str], name: str) -> None:
    """As a scheduler signals all processes: torchrun passes on what it gets, so that the others get it twice."""
    out, program = tmp_path / "run", tmp_path / "program.py"
    program.write_text(  # saving takes so long that what torchrun passes on comes in between
        """
import time
from lamamba.cli import main
from lamamba.training.trainer import Trainer

save = Trainer.save
Trainer.save = lambda trainer: time.sleep(1.5) or save(trainer)
main()
"""
    )
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    options = ["--signals-to-handle=SIGTERM,SIGINT,SIGUSR1", "--shutdown-timeout=120", str(program), "train"]
    with Fork(*torchrun, *options, "--out", str(out), *tiny, "--num-images", "100000", start_new_session=True) as job:
        end = time.monotonic() + 120
        while not (out / "log.jsonl").is_file() or not (out / "log.jsonl").read_text():
            assert time.monotonic() < end, "nothing happened"
            assert job.returncode is None
            time.sleep(0.1)
        workers = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        assert len(workers) == 2
        for process in (*map(int, workers), job.pid):
            os.kill(process, getattr(signal, name))
        _, said = job.communicate(timeout=120)
    assert job.returncode != 0
    saved = checkpoints_in(out)[-1]
    assert f"stopped by {name} at image {int(saved.name)}, all is saved" in said
