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
    """An account that may be written to. wanted: the repository's name, with or without the account's."""

    api: "HfApi"
    user: str
    wanted: str | None
    private: bool

    def repository(self, folder: Path) -> str:
        """The repository of a run in this folder."""
        name = self.wanted or folder.name
        return name if "/" in name else f"{self.user}/{name}"


def token_of(table: SavingTable) -> str:
    """The token to upload with. Raises ConfigError if there is none; asks nobody."""
    from huggingface_hub import get_token

    token = table.hub_token or get_token()
    if token is None:
        raise ConfigError("push_to_hub needs a token: set the environment variable HF_TOKEN (or hub_token)")
    return token


def check(table: SavingTable, endpoint: str | None = None) -> Destination | None:
    """Where to upload, if that is asked for. Raises ConfigError before training if the token does not work."""
    if not table.push_to_hub:
        return None
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    token = token_of(table)
    api = HfApi(endpoint=endpoint, token=token)
    try:
        user = api.whoami()["name"]
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        answer = getattr(getattr(error, "response", None), "status_code", None)
        what = "does not accept the token" if answer in (401, 403) else "cannot be reached"
        raise ConfigError(f"push_to_hub: the hub {what} ({_first_line(error, token)})") from None
    return Destination(api, user, table.hub_model_id, table.hub_private)


def upload(destination: Destination, repository: str, files: dict[str, Path], message: str) -> str:
    """Make the repository if needed and add `files` (by their names there) in one commit; returns its address.

    Raises UserError if the hub refuses or is away; the files on the disk are what they were.
    """
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.errors import HfHubHTTPError

    token = str(destination.api.token)
    operations = [CommitOperationAdd(name, str(file)) for name, file in files.items()]
    try:
        url = destination.api.create_repo(repository, private=destination.private, exist_ok=True)
        destination.api.create_commit(repository, operations, commit_message=message)
    except (HfHubHTTPError, OSError) as error:
        raise UserError(
            f"the network is finished and saved, but uploading it to {repository} failed: {_first_line(error, token)}. "
            "Run the same command again to upload it"
        ) from None
    return str(url)


def _first_line(error: BaseException, token: str) -> str:
    """An error in one line, without the token."""
    lines = str(error).replace(token, "***").strip().splitlines()
    return lines[0] if lines else type(error).__name__
