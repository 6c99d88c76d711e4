"""What a run will train and which files it becomes, before weights are loaded; mistakes name the place of their key.

Training, `--dry_run` and `--list_modules` begin here: what the end of a run would refuse is refused at its beginning.
Needs no torch.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from dataclasses import dataclass

from library.config.run import Run
from library.errors import ConfigError, UserError
from library.models.base import Base
from library.models.keymap import linear_shapes
from library.networks import Plan
from library.networks.arguments import Settings
from library.networks.metadata import thumbnail
from library.networks.outline import Spelling, saved_as
from library.networks.prospect import look_ahead
from library.networks.shapes import trained
from library.networks.size import file_sizes
from library.networks.targets import Target

_VALUE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
_ENDINGS = ("", "_diffusers")


@dataclass(frozen=True)
class Outlook:
    """The plan, and the files of each saved network: spelling and bytes."""

    plan: Plan
    name: str
    precision: str
    files: tuple[tuple[Spelling, int], ...]

    def file_lines(self) -> list[str]:
        """Name, size and precision of each file."""
        return [
            f"{self.name}{ending}.safetensors: {size / 1e6:.2f} MB in {self.precision} ({spelling}'s names)"
            for ending, (spelling, size) in zip(_ENDINGS, self.files)
        ]

    def network_lines(self) -> list[str]:
        """What is trained, with the scale that each change is really multiplied by, for every rank and alpha in it."""
        settings, plan = self.plan.settings, self.plan
        if settings.kind in ("full", "diag-oft"):  # no product of two factors, so nothing to scale
            counts = Counter({"": len(plan.targets)})
        else:
            counts = Counter(_scale_words(settings, target) for target in plan.targets)
        counts.update(f" on CLIP-L{_scale_words(settings, target)}" for target in plan.text)
        sizes = [f"{count} modules{words}" for words, count in counts.most_common() if count]
        sizes += ["x_embedder in full"] if plan.x_embedder is not None else []
        return [f"network: {settings.kind}, {'; '.join(sizes)}; {trained(plan)} trained parameters"]


def _scale_words(settings: Settings, target: Target) -> str:
    scale = settings.scale_of(target.rank, target.alpha)
    return f" of rank {target.rank}, alpha {target.alpha:g}: effective scale {scale:g}"


def outlook(run: Run, base: Base) -> Outlook:
    """Look ahead. Raises ConfigError for whatever of the network, its files and its metadata cannot be."""
    clip = base.clip_linears if run.network.train_text_encoder else {}
    precision = saved_as(run.saving, _mixed(run))
    try:
        plan = look_ahead(run.network, linear_shapes(base.shape), clip)
        _require_up_projections(run, plan)
        files = _files(run, plan, _VALUE_BYTES[precision])
        _require_thumbnail(run)
    except UserError as error:
        raise ConfigError(_placed(run, str(error))) from error
    return Outlook(plan, run.saving.output_name, precision, tuple(files))


def _mixed(run: Run) -> str:
    """The arithmetic's precision where it is known, else the one that a machine like this will choose."""
    if run.training.mixed_precision is not None:
        return run.training.mixed_precision
    return "no" if run.training.device == "cpu" or shutil.which("nvidia-smi") is None else "bf16"


def _files(run: Run, plan: Plan, value_bytes: int) -> list[tuple[Spelling, int]]:
    wanted = run.saving.save_format
    try:
        return file_sizes(plan, wanted, value_bytes)
    except UserError as error:
        raise ConfigError(
            f"save_format = {wanted}: {error}. For diffusers train network_module = lora, or save as kohya and make a"
            " LoRA of the file with python -m tools.convert_lora"
        ) from error


def _require_up_projections(run: Run, plan: Plan) -> None:
    """LoRA+ is about a LoRA's two factors; other kinds have none to tell apart."""
    ratio, settings = run.optimizer.loraplus_lr_ratio, plan.settings
    if ratio is not None and (settings.kind not in ("lora", "locon") or settings.dora) and not plan.text:
        kind = "DoRA" if settings.dora else settings.kind
        raise ConfigError(
            f"loraplus_lr_ratio = {ratio:g}: {kind} has no up-projection whose rate it could raise. Remove it, or use"
            " network_module = lora."
        )


def _require_thumbnail(run: Run) -> None:
    picture = run.saving.metadata_thumbnail
    if picture is None:
        return
    try:
        thumbnail(picture)
    except (OSError, ValueError, SyntaxError) as error:
        raise ConfigError(f"metadata_thumbnail = {picture}: it cannot be read as a picture ({error})") from error


def _placed(run: Run, message: str) -> str:
    """The message behind the place where the first of the keys it names was written."""
    keys = {name for table in (run.network, run.saving, run.optimizer) for name in type(table).model_fields}
    words = [*re.findall(r"\w+", message), "network_module"]
    where = next((run.origins[word] for word in words if word in keys and word in run.origins), "")
    return f"{where}: {message}" if where else message
