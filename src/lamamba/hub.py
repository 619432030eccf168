"""The Hugging Face hub: fetches a model's files, sends a folder. Token, endpoint and cache are huggingface_hub's."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lamamba.errors import CheckpointError, ConfigError


def is_repository(name: str) -> bool:
    """Tell whether "user/name" may be on the hub: it is written so, and no folder "user" is here."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).parent.exists()


def fetch(name: str, *patterns: str, **options: Any) -> Path:
    """Fetch files of a model, as far as the cache lacks them; without a network, find them in the cache.

    Args:
        name: "user/name".
        patterns: of the files' names.
        options: revision, token, cache_dir, force_download and local_files_only, as huggingface_hub has them.

    Raises:
        CheckpointError: there is no such model, or the hub cannot be asked.
    """
    from huggingface_hub import snapshot_download

    with _explained(f"{name}, which is no path here,", "give a folder, or what was fetched before"):
        return Path(snapshot_download(name, allow_patterns=list(patterns), **options))


def make_repository(name: str, *, private: bool, branch: str | None) -> None:
    """Make a model's repository and a branch in it, where they are not there already.

    Raises:
        ConfigError: the name cannot be one, or the repository is there and public, and a private one is wanted.
        CheckpointError: there is no token, it may not write there, or the hub cannot be asked.
    """
    from huggingface_hub import HfApi, get_token

    if name.count("/") != 1:
        raise ConfigError(f"repository {name!r} is no USER/NAME: give the owner's name on the hub and the model's")
    if get_token() is None:
        raise CheckpointError(
            "the Hugging Face hub takes nothing without a token: log in (`hf auth login`), or set HF_TOKEN"
        )
    hub = HfApi()
    with _explained(name, "write the folder with --out, and send it later"):
        hub.create_repo(name, private=private or None, exist_ok=True)  # None is what the owner's settings say
        if private and not hub.model_info(name).private:
            raise ConfigError(
                f"repository {name} is there already and public: make it private in its settings, or give another name"
            )
        if branch is not None:
            hub.create_branch(name, branch=branch, exist_ok=True)


def send(folder: Path, name: str, *, branch: str | None, message: str) -> str:
    """Send all files of a folder, with huggingface_hub's progress, and return the address of the model's page.

    Raises:
        CheckpointError: the hub refuses them, or cannot be reached.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    with _explained(name, "run it again, what was sent is not sent twice"):
        hub.upload_folder(repo_id=name, folder_path=folder, revision=branch, commit_message=message)
    return f"{hub.endpoint}/{name}" + (f"/tree/{branch}" if branch else "")


@contextmanager
def _explained(name: str, mend: str) -> Iterator[None]:
    """Turn the many kinds of errors of huggingface_hub, and of the network below it, into one line with the mend."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    try:
        yield
    except ConfigError:
        raise
    except HFValidationError as error:
        raise ConfigError(f"{name!r} cannot be a name on the Hugging Face hub: {_first_line(error)}") from error
    except Exception as error:
        status = getattr(error.response, "status_code", None) if isinstance(error, HfHubHTTPError) else None
        if isinstance(error, RepositoryNotFoundError):
            said = (
                f"{name} is not on {constants.ENDPOINT}, or not for you to see: look for a typing error, or log in "
                "(`hf auth login`, or HF_TOKEN)"
            )
        elif status in (401, 403):
            said = f"your token is not accepted for {name}: give a name of your own, or (HF_TOKEN) one that may write"
        elif isinstance(error, ValueError) or status is not None:  # the former is of the card's metadata
            said = f"{constants.ENDPOINT} refuses {name}: {' '.join(str(error).split())}"
        elif constants.HF_HUB_OFFLINE:
            said = f"{name} is not at hand, and HF_HUB_OFFLINE keeps from asking the hub: unset it, or {mend}"
        else:
            said = f"{name} cannot be asked of {constants.ENDPOINT} ({_first_line(error)}): {mend}"
        raise CheckpointError(said) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
