"""Uploading a finished network with its card. The token is read, used, and never written anywhere."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.config.tables import SavingTable
from library.errors import ConfigError, UserError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Destination:
    """A repository that may be written to."""

    api: "HfApi"
    repository: str
    private: bool


def check(table: SavingTable, folder: Path, endpoint: str | None = None) -> Destination | None:
    """Where to upload, if that is asked for. Raises ConfigError before training if the token does not work."""
    if not table.push_to_hub:
        return None
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    token = table.hub_token or get_token()
    if token is None:
        raise ConfigError("push_to_hub needs a token: set the environment variable HF_TOKEN (or hub_token)")
    api = HfApi(endpoint=endpoint, token=token)
    try:
        user = api.whoami()["name"]
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise ConfigError(f"push_to_hub: the hub does not accept the token ({_first_line(error, token)})") from None
    repository = table.hub_model_id or folder.name
    return Destination(api, repository if "/" in repository else f"{user}/{repository}", table.hub_private)


def upload(destination: Destination, files: dict[str, Path | bytes], message: str) -> str:
    """Make the repository if needed and add `files` (by their names there) in one commit; returns its address.

    Raises UserError if the hub refuses; the files on the disk are what they were.
    """
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.errors import HfHubHTTPError

    token = str(destination.api.token)
    operations = [CommitOperationAdd(name, str(f) if isinstance(f, Path) else f) for name, f in files.items()]
    try:
        url = destination.api.create_repo(destination.repository, private=destination.private, exist_ok=True)
        destination.api.create_commit(destination.repository, operations, commit_message=message)
    except (HfHubHTTPError, OSError) as error:
        raise UserError(
            f"the network is finished and saved, but uploading it to {destination.repository} failed: "
            f"{_first_line(error, token)}. Upload the folder with `hf upload {destination.repository} FOLDER`"
        ) from None
    return str(url)


def _first_line(error: BaseException, token: str) -> str:
    """An error in one line, without the token."""
    lines = str(error).replace(token, "***").strip().splitlines()
    return lines[0] if lines else type(error).__name__
