"""From what the user wrote (`./folder`, `owner/name`, `owner/name@revision`) to a local folder."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from largemerge.errors import CheckpointError

_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.py", "*.bin"]
_PATTERNS_WITHOUT_PICKLE = _PATTERNS[:-1]
_CODE_PATTERNS = ["*.json", "*.py", "*.jinja", "*.txt", "*.model"]


def locate_checkpoint(reference: str, name: str, *, weights: bool = True) -> Path:
    """The local folder of a checkpoint; fetched from the Hub (or its cache) if it is no folder.

    Args:
        reference: A folder, or a Hub id, with `@revision` if wanted.
        name: What the user calls it, for messages.
        weights: Fetch them, too, not only the config.

    Raises:
        CheckpointError: If there is no such folder and the Hub does not have it or cannot be reached.
    """
    folder = Path(os.path.expanduser(reference))
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{name}: {reference} is a file; expected a checkpoint folder or a Hub id")
    repository, _, revision = reference.partition("@")
    if reference.startswith((".", "/", "~")) or repository.count("/") != 1:
        raise CheckpointError(
            f"{name}: {reference} does not exist; expected a checkpoint folder or a Hub id (owner/name)"
        )
    return _from_hub(repository, revision or None, name, weights)


def _from_hub(repository: str, revision: str | None, name: str, weights: bool) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    # Told so, as 1.x looks a commit up on the Hub that it has, offline or not.
    fetch = partial(snapshot_download, repository, revision=revision, local_files_only=constants.HF_HUB_OFFLINE)
    try:
        if not weights:
            return Path(fetch(allow_patterns=_CODE_PATTERNS))
        folder = Path(fetch(allow_patterns=_PATTERNS_WITHOUT_PICKLE))
        if not list(folder.glob("*.safetensors")):
            folder = Path(fetch(allow_patterns=_PATTERNS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        at = f" at revision {revision}" if revision else ""
        raise CheckpointError(
            f"{name}: {repository}{at} is neither a folder here nor to be had from the Hub: {cause}"
        ) from None
    return folder
