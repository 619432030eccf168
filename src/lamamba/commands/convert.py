"""The command `lamamba convert`: between checkpoints of the authors' code and folders of this package."""

import shlex
import tempfile
from pathlib import Path

from lamamba.checkpoints.checkpoint import CheckpointInfo, find_checkpoint, load_network, locate, verify, write_weights
from lamamba.checkpoints.released import load_released, read_released, save_released, sizes_in
from lamamba.config import ConvertConfig
from lamamba.config.checks import check_unset
from lamamba.data.latents import check_autoencoder
from lamamba.errors import CheckpointError, ConfigError
from lamamba.files import TEMPORARY
from lamamba.terminal.output import say


def convert(config: ConvertConfig) -> None:
    """Convert a checkpoint. A file is a checkpoint of the authors' code; anything else is one of this package.

    Raises:
        LamambaError: the checkpoint is invalid, an option does not apply to it, or the output path is invalid.
    """
    if config.out.exists():
        raise ConfigError(f"out {config.out} exists already: choose another path, or move it away")
    source = Path(config.checkpoint)
    if source.is_file():
        _from_released(source, config)
        say(f"wrote {config.out}; sample it with: lamamba sample {shlex.quote(str(config.out))}")
    elif source.suffix in (".pt", ".pth"):
        raise CheckpointError(f"{source} does not exist: give a checkpoint of the authors' code")
    else:
        _to_released(config)
        say(f"wrote {config.out}, a checkpoint for the authors' code")


def _from_released(source: Path, config: ConvertConfig) -> None:
    if config.out.suffix in (".pt", ".pth"):
        raise ConfigError(
            f"out {config.out} is the name of a file, but the result is a folder: choose a name without .pt"
        )
    states = read_released(source)
    vae = None
    if config.vae is not None:
        check_autoencoder(config.vae)
        vae = str(config.vae.resolve())
    networks = {
        weights: load_released(state, **{**vars(config.network), **sizes_in(state)})
        for weights, state in states.items()
        if weights == "ema" or state is not states.get("ema")
    }
    averaged = networks.pop("ema", None) or networks.pop("model")
    config.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=config.out.parent) as temporary:
        folder = Path(temporary) / "weights"
        write_weights(folder, averaged, CheckpointInfo(vae=vae), trained=networks.get("model"))
        folder.replace(config.out)


def _to_released(config: ConvertConfig) -> None:
    check_unset(config, "preset", "vae", "network", why=f"{config.checkpoint} is not of the authors' code")
    if config.out.suffix not in (".pt", ".pth"):
        raise ConfigError(f"out {config.out} does not end in .pt, as checkpoints of the authors' code do")
    path = find_checkpoint(config.checkpoint)
    if not (path / "checkpoint.json").is_file():
        network = load_network(locate(path)[0])
        save_released(config.out, network, network)
        return
    for part in ("ema", "network"):
        verify(path, part)
    averaged = load_network(path / "ema")
    trained = load_network(path / "network") if (path / "network").is_dir() else averaged
    save_released(config.out, trained, averaged)
