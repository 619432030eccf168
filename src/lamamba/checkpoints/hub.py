"""Download from and upload to the Hugging Face hub. huggingface_hub manages token, endpoint and cache."""

import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_token, snapshot_download

from lamamba.errors import CheckpointError, ConfigError


def is_repository(name: str) -> bool:
    """Return whether a name may be on the hub: it has the form "user/name", and there is no local folder "user"."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).parent.exists()


def fetch(name: str, *patterns: str, **options: Any) -> Path:
    """Download the files of a model that match the patterns. Without a network, find them in the cache.

    The options are revision, token, cache_dir, force_download and local_files_only, as for huggingface_hub.

    Raises:
        CheckpointError: there is no such model, or the hub cannot be reached.
    """
    with _explained(f"{name}, which is not a local path,", "give a folder, or a model that was downloaded before"):
        return Path(snapshot_download(name, allow_patterns=list(patterns), **options))


def make_repository(name: str, *, private: bool, branch: str | None) -> None:
    """Create a model's repository, and a branch in it, if they do not exist.

    Raises:
        ConfigError: the name is invalid, or the repository exists and is public but should be private.
        CheckpointError: there is no token, it has no write access, or the hub cannot be reached.
    """
    if name.count("/") != 1:
        raise ConfigError(
            f"repository {name!r} is not of the form USER/NAME: give the owner's name on the hub and the model's name"
        )
    if get_token() is None:
        raise CheckpointError(
            "uploading to the Hugging Face hub needs a token: log in (`hf auth login`), or set HF_TOKEN"
        )
    hub = HfApi()
    with _explained(name, "write the folder with --out, and upload it later"):
        hub.create_repo(name, private=private or None, exist_ok=True)  # None: the default of the owner's settings
        if private and not hub.model_info(name).private:
            raise ConfigError(
                f"repository {name} exists and is public: make it private in its settings, or choose another name"
            )
        if branch is not None:
            hub.create_branch(name, branch=branch, exist_ok=True)


def send(folder: Path, name: str, *, branch: str | None, message: str) -> str:
    """Upload all files of a folder, with huggingface_hub's progress bar, and return the address of the model's page.

    Raises:
        CheckpointError: the hub refuses them, or cannot be reached.
    """
    hub = HfApi()
    with _explained(name, "run the command again, it continues the upload"):
        hub.upload_folder(repo_id=name, folder_path=folder, revision=branch, commit_message=message)
    return f"{hub.endpoint}/{name}" + (f"/tree/{branch}" if branch else "")


@contextmanager
def _explained(name: str, advice: str) -> Iterator[None]:
    """Turn the many errors of huggingface_hub and of the network into one line with advice."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        offline = "unset HF_HUB_OFFLINE, " if constants.HF_HUB_OFFLINE else ""
        raise CheckpointError(
            f"{name} could not be requested from {constants.ENDPOINT} ({textwrap.shorten(str(error), 400)}): {offline}"
            f"check the name, log in (`hf auth login`, or HF_TOKEN) with access to it, or {advice}"
        ) from error
