"""What a network's file says about itself: kohya's `ss_*`, `modelspec.*`, the hashes, and InFlux's own fields.

Programs show most of it and obey none of it, except InFlux's own fields, which inference obeys. `lora_adapter_metadata`
is never written: diffusers would scale the network by it.
"""

import base64
import datetime
import io
import json
import os
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

TIME_FIELDS = ("ss_training_started_at", "ss_training_finished_at", "ss_session_id", "modelspec.date")
"""The fields that differ between two equal runs, unless SOURCE_DATE_EPOCH is set."""
IMPLEMENTATION = "https://github.com/black-forest-labs/flux"
_THUMBNAIL_SIDE = 384
_MINIMAL = (
    "ss_v2", "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args",
    "influx_modes", "influx_mode", "influx_edit_mask_value", "influx_train_guidance", "influx_sample_guidance",
    "influx_resolution", "influx_trained_scale", "influx_t5xxl_max_token_length", "modelspec.architecture",
    "modelspec.sai_model_spec", "modelspec.implementation",
)  # fmt: skip


@dataclass(frozen=True)
class Description:
    """Everything a file says about the run that made it. Paths are file names only; no secret ever gets here.

    modes: the conditioning modes it was trained in. resolution: (width, height) of the largest training size.
    trained_scales: scale (alpha / rank, or with rsLoRA alpha / sqrt(rank)) each module was trained at; the file's own
    is 1, whatever rank the module has there.
    edits_regions: whether edit mode was trained with masks, so that only a region changes.
    trains_text_encoder: whether CLIP-L's part has to be loaded as well.
    prompt, sample_steps: what the workflow beside the file begins with.
    extra: further `ss_*` fields as plain values.
    """

    output_name: str
    modes: tuple[str, ...] = ()
    edit_mask_value: float | None = None
    train_guidance: float | None = None
    sample_guidance: float | None = None
    resolution: tuple[int, int] | None = None
    t5xxl_max_token_length: int | None = None
    network_module: str = "networks.lora_flux"
    network_dim: int | None = None
    network_args: Mapping[str, object] = field(default_factory=dict)
    trained_scales: Mapping[str, float] = field(default_factory=dict)
    base_model: str = "FLUX.1-Fill-dev"
    resolved_toml: str = ""
    started_at: float | None = None
    finished_at: float | None = None
    steps: int | None = None
    epoch: int | None = None
    seed: int | None = None
    title: str | None = None
    author: str | None = None
    description: str | None = None
    license: str | None = None
    tags: tuple[str, ...] = ()
    trigger_words: tuple[str, ...] = ()
    comment: str | None = None
    thumbnail: str | None = None
    edits_regions: bool = False
    trains_text_encoder: bool = False
    prompt: str | None = None
    sample_steps: int | None = None
    extra: Mapping[str, object] = field(default_factory=dict)


def thumbnail(picture: Path) -> str:
    """A picture as a data URL small enough for a header: ComfyUI serves none over 1 MiB."""
    from PIL import Image, ImageOps

    with Image.open(picture) as opened:
        small = ImageOps.exif_transpose(opened).convert("RGB")
    small.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def now() -> float:
    """The current time, or SOURCE_DATE_EPOCH where it is set."""
    fixed = os.environ.get("SOURCE_DATE_EPOCH", "")
    return float(fixed) if fixed.strip().isdigit() else time.time()


def _time(value: float | None) -> float:
    return now() if value is None or os.environ.get("SOURCE_DATE_EPOCH", "").strip().isdigit() else value


def describe(description: Description, *, minimal: bool = False) -> dict[str, str]:
    """The metadata of a file, hashes apart. ``minimal``: only what loading and inference need."""
    fields = {**_kohya(description), **_modelspec(description), **_influx(description)}
    written = {name: _text(value) for name, value in fields.items() if value is not None}
    return {name: text for name, text in written.items() if not minimal or name in _MINIMAL}


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value)
    return str(value)


def _kohya(description: Description) -> dict[str, object]:
    finished = _time(description.finished_at)
    return {
        "ss_v2": False,
        "ss_base_model_version": "flux1",
        "ss_output_name": description.output_name,
        "ss_sd_model_name": description.base_model,
        "ss_network_module": description.network_module,
        "ss_network_dim": description.network_dim,
        "ss_network_alpha": description.network_dim,
        "ss_network_args": dict(description.network_args) or None,
        "ss_training_started_at": _time(description.started_at),
        "ss_training_finished_at": finished,
        "ss_session_id": int(_time(description.started_at)) % 2**32,
        "ss_steps": description.steps,
        "ss_epoch": description.epoch,
        "ss_seed": description.seed,
        "ss_guidance_scale": description.train_guidance,
        "ss_training_comment": description.comment,
        **description.extra,
    }


def _modelspec(description: Description) -> dict[str, object]:
    date = datetime.datetime.fromtimestamp(_time(description.finished_at), datetime.UTC)
    modes = ", ".join(description.modes)
    hint = f"for FLUX.1 Fill{f', mode {modes}' if modes else ''}"
    if description.sample_guidance is not None:
        hint += f", guidance {description.sample_guidance:g}"
    size = description.resolution
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "flux-1-dev/lora",
        "modelspec.implementation": IMPLEMENTATION,
        "modelspec.title": description.title or f"{description.output_name} (FLUX.1 Fill LoRA)",
        "modelspec.author": description.author,
        "modelspec.description": description.description,
        "modelspec.license": description.license,
        "modelspec.tags": ", ".join(description.tags) or None,
        "modelspec.trigger_phrase": ", ".join(description.trigger_words) or None,
        "modelspec.usage_hint": hint,
        "modelspec.date": date.replace(tzinfo=None).isoformat(timespec="seconds"),
        "modelspec.resolution": None if size is None else f"{size[0]}x{size[1]}",
        "modelspec.thumbnail": description.thumbnail,
        "ssmd_cover_images": None if description.thumbnail is None else [description.thumbnail.partition(",")[2]],
        "trained_words": list(description.trigger_words) or None,
    }


def _influx(description: Description) -> dict[str, object]:
    size = description.resolution
    return {
        "influx_modes": list(description.modes) or None,
        "influx_mode": description.modes[0] if len(description.modes) == 1 else None,
        "influx_edit_mask_value": description.edit_mask_value,
        "influx_train_guidance": description.train_guidance,
        "influx_sample_guidance": description.sample_guidance,
        "influx_resolution": None if size is None else f"{size[0]}x{size[1]}",
        "influx_t5xxl_max_token_length": description.t5xxl_max_token_length,
        "influx_trained_scale": compact(description.trained_scales) or None,
        "influx_config": description.resolved_toml or None,
    }


def compact(values: Mapping[str, float]) -> dict[str, float]:
    """Numbers by module with the commonest one said once, under ""."""
    if not values:
        return {}
    numbers = list(values.values())
    common = max(set(numbers), key=numbers.count)
    return {"": common, **{module: value for module, value in values.items() if value != common}}


def trained_scale(metadata: Mapping[str, str], module: str, rank: int) -> float | None:
    """The scale ``module`` was trained at, if the file says so; older files say alpha, of the file's ``rank``."""
    scale = _by_module(metadata, "influx_trained_scale", module)
    if scale is not None:
        return scale
    alpha = _by_module(metadata, "influx_trained_alpha", module)
    return None if alpha is None else alpha / rank


def _by_module(metadata: Mapping[str, str], name: str, module: str) -> float | None:
    try:
        values = json.loads(metadata.get(name, "{}"))
    except json.JSONDecodeError:
        return None
    value = values.get(module, values.get("")) if isinstance(values, dict) else None
    return float(value) if isinstance(value, int | float) else None


@dataclass(frozen=True)
class Guide:
    """What a file tells inference: the modes it was trained in, the edit mask's value, guidance, size, token length.

    base_weights: names of the files that were merged into the base it was trained on.
    """

    modes: tuple[str, ...] = ()
    edit_mask_value: float | None = None
    sample_guidance: float | None = None
    resolution: tuple[int, int] | None = None
    t5xxl_max_token_length: int | None = None
    base_weights: tuple[str, ...] = ()


def guide(metadata: Mapping[str, str]) -> Guide:
    """Read the fields that inference obeys; what is missing or malformed is None."""
    try:
        modes = json.loads(metadata.get("influx_modes", "[]"))
    except json.JSONDecodeError:
        modes = []
    width, times, height = metadata.get("influx_resolution", "").partition("x")
    size = (int(width), int(height)) if times and width.isdigit() and height.isdigit() else None
    length = metadata.get("influx_t5xxl_max_token_length", "")
    return Guide(
        tuple(str(mode) for mode in modes) if isinstance(modes, list) else (),
        _number(metadata.get("influx_edit_mask_value")),
        _number(metadata.get("influx_sample_guidance")),
        size,
        int(length) if length.isdigit() else None,
        _base_weights(metadata.get("influx_config", "")),
    )


def _base_weights(config: str) -> tuple[str, ...]:
    try:
        names = tomllib.loads(config).get("network", {}).get("base_weights", [])
    except (tomllib.TOMLDecodeError, AttributeError):
        return ()
    return tuple(map(str, names)) if isinstance(names, list) else (str(names),)


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
