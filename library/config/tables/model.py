"""Which base model: a folder, a hub id, or single files."""

from __future__ import annotations

from typing import ClassVar

from library.config.table import FilePath, Table, key


class ModelTable(Table):
    """The base model and where its parts come from."""

    section: ClassVar[str] = "model"

    pretrained_model_name_or_path: str | None = key(None, path="model")
    """The base: a folder in diffusers layout, a hub id (black-forest-labs/FLUX.1-Fill-dev), or a single file with
    the transformer (.safetensors, .gguf); a single file needs ae, clip_l and t5xxl beside it, if it does not hold them.
    Required."""
    revision: str | None = key(None)
    """Branch, tag or commit on the hub, if the base is a hub id."""
    variant: str | None = key(None)
    """Variant of the weight files in the folder, for example fp16."""
    cache_dir: FilePath | None = key(None, path="path")
    """Where downloaded models and data sets are kept (the hub's own folder if not set). Encoded data goes to
    dataset_cache_dir."""
    local_files_only: bool = key(False, rerun=True)
    """Never ask the hub; use what is on this machine."""
    transformer: FilePath | None = key(
        None, aliases=("unet",), reads="cache train infer", path="path", exists="train infer"
    )
    """A transformer to use instead of the base's: diffusers folder, single file in the original layout, or GGUF."""
    ae: FilePath | None = key(None, aliases=("vae",), path="path", exists="cache train infer")
    """A VAE to use instead of the base's: diffusers folder or ae.safetensors."""
    clip_l: FilePath | None = key(None, reads="cache train infer", path="path", exists="cache infer")
    """A CLIP-L text encoder to use instead of the base's: folder or clip_l.safetensors."""
    t5xxl: FilePath | None = key(None, reads="cache infer", path="path", exists="cache infer")
    """A T5-XXL text encoder to use instead of the base's: folder, t5xxl_fp16.safetensors, (scaled) fp8 or GGUF."""
    clip_tokenizer: FilePath | None = key(None, reads="cache train infer", path="path", exists="cache infer")
    """Folder of the CLIP tokenizer, if it is not in the base and the built-in vocabulary is not wanted."""
    t5_tokenizer: FilePath | None = key(None, reads="cache infer", path="path", exists="cache infer")
    """Folder of the T5 tokenizer, if it is not in the base and the built-in vocabulary is not wanted."""
