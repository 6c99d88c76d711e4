"""The words of captions that T5 does not see, found with its tokenizer alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from library.config.tables import ModelTable
from library.errors import ModelError
from library.models.hub import component_folder


def lost_words(captions: list[str], model: ModelTable, length: int | None) -> dict[str, str] | None:
    """What does not fit ``length`` tokens, by caption; None if the base's tokenizer is not on this machine."""
    tokenizer = _tokenizer(model)
    if tokenizer is None or length is None:
        return None
    lost = {}
    for caption, ids in zip(captions, tokenizer(captions, verbose=False).input_ids, strict=True):
        if len(ids) > length:
            lost[caption] = tokenizer.decode(ids[length - 1 : -1])
    return lost


def _tokenizer(model: ModelTable) -> Any | None:
    folder = _folder(model)
    if folder is None or not any((folder / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        return None
    from transformers import T5TokenizerFast

    try:
        return T5TokenizerFast.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"no T5 tokenizer can be read from {folder}: {error}") from error


def _folder(model: ModelTable) -> Path | None:
    """Where the tokenizer is; nothing is downloaded for it."""
    if model.t5_tokenizer is not None:
        return Path(model.t5_tokenizer)
    if not model.pretrained_model_name_or_path:
        return None
    try:
        return component_folder(model.model_copy(update={"local_files_only": True}), "tokenizer_2")
    except ModelError:
        return None
