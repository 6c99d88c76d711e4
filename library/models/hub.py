"""Find a component of a base: in its folder, or on the hub (only the files of that component are fetched)."""

from __future__ import annotations

from pathlib import Path

from library.config.tables.model import ModelTable
from library.errors import ModelError

WANTED = ("*.json", "*.safetensors", "*.txt", "*.model")


def component_folder(table: ModelTable, name: str) -> Path:
    """The folder of component `name` ('transformer', 'vae', 'tokenizer', ...) of the base that `table` names.

    Raises ModelError if the base is neither a folder with that component nor a hub id that has it.
    """
    base = table.pretrained_model_name_or_path or ""
    root = Path(base)
    if root.is_dir():
        folder = root / name
        if not folder.is_dir():
            raise ModelError(f"{root} has no folder {name}/: it is not laid out like FLUX.1-Fill-dev")
        return folder
    if root.is_absolute() or base.count("/") != 1 or base.startswith("."):
        raise ModelError(f"pretrained_model_name_or_path = {base}: there is no such folder, and it is no hub id")
    return _download(table, base, name) / name


def _download(table: ModelTable, repository: str, name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = snapshot_download(
            repository,
            revision=table.revision,
            cache_dir=None if table.cache_dir is None else str(table.cache_dir),
            local_files_only=table.local_files_only,
            allow_patterns=[f"{name}/{pattern}" for pattern in WANTED],
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        advice = "FLUX.1-Fill-dev needs its licence accepted on its page and a token (`hf auth login`)"
        raise ModelError(f"cannot get {name} of {repository} from the hub: {error}\n{advice}") from error
    if not (Path(found) / name).is_dir():
        raise ModelError(f"{repository} has no folder {name}/ (revision {table.revision or 'main'})")
    return Path(found)
