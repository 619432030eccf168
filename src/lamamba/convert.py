"""The command `lamamba convert`: a checkpoint of the authors' code to a folder of this package, or the way back."""

import shlex
import shutil
from pathlib import Path

from lamamba.checkpoint import CheckpointInfo, find_checkpoint, load_network, locate, verify, write_weights
from lamamba.config import ConvertConfig
from lamamba.errors import CheckpointError, ConfigError
from lamamba.files import TEMPORARY
from lamamba.latents import check_autoencoder
from lamamba.output import say
from lamamba.released import load_released, read_released, save_released, sizes_in


def convert(config: ConvertConfig) -> None:
    """Convert what the configuration names: a file is taken for a released checkpoint, anything else is this package's.

    Raises:
        LamambaError: the checkpoint, an option that does not go with it, or the path to write to is at fault.
    """
    if config.out.exists():
        raise ConfigError(f"out {config.out} is there already: give another, or move it away")
    source = Path(config.checkpoint)
    if source.is_file():
        _from_released(source, config)
        say(f"wrote {config.out}, to be sampled with: lamamba sample {shlex.quote(str(config.out))}")
    elif source.suffix in (".pt", ".pth"):
        raise CheckpointError(f"{source} does not exist: give a released checkpoint")
    else:
        _to_released(config)
        say(f"wrote {config.out}: weights under the names of the released code")


def _from_released(source: Path, config: ConvertConfig) -> None:
    if config.out.suffix in (".pt", ".pth"):
        raise ConfigError(f"out {config.out} is a file's name: a released checkpoint becomes a folder")
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
    temporary = config.out.with_name(TEMPORARY + config.out.name)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        write_weights(temporary, averaged, CheckpointInfo(vae=vae), trained=networks.get("model"))
        temporary.replace(config.out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _to_released(config: ConvertConfig) -> None:
    defaults = ConvertConfig(config.checkpoint, config.out)
    for name in ("preset", "vae", "network"):
        if getattr(config, name) != getattr(defaults, name):
            raise ConfigError(f"{name} is of released checkpoints, and {config.checkpoint} is none: leave it out")
    if config.out.suffix not in (".pt", ".pth"):
        raise ConfigError(f"out {config.out} is not a .pt file, which released checkpoints are")
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
