"""The last act of a run that is to be published: its card, its newest previews, its files, in one upload.

What is to go there is written down in the output folder first (README.md and upload.json), so that a hub that is away
when the run ends takes nothing: the same command uploads what is left.
"""

import json
import logging
import re
from pathlib import Path

from library.config import resolved
from library.files import atomic_write
from library.models.base import Base
from library.networks.metadata import Description
from library.networks.outline import LOW_RANK
from library.networks.shapes import FILE_KINDS
from library.training import hub
from library.training.conduct import Conduct
from library.training.hub import Destination
from library.training.model_card import Card, render
from library.training.outlook import outlook

log = logging.getLogger(__name__)
CARD, LEFT = "README.md", "upload.json"
_MOST_PICTURES = 6
_ENDINGS = r"(?:-best|-ema|_diffusers|_text_encoder|_(?:edit|mask|spatial)|_workflow|_api)*\.(?:safetensors|json)"


def publish(destination: Destination, conduct: Conduct, description: Description) -> str:
    """Write the card, then upload; returns the repository's address."""
    prepare(destination, conduct, description)
    address = publish_left(destination, conduct.folder)
    assert address is not None
    return address


def publish_left(destination: Destination, folder: Path) -> str | None:
    """Upload what `prepare` wrote down in a folder; None if nothing is left there."""
    path = folder / LEFT
    if not path.is_file():
        return None
    left = json.loads(path.read_text(encoding="utf-8"))
    files = {name: folder / file for name, file in left["files"].items()}
    address = hub.upload(destination, left["repository"], files, left["message"])
    path.unlink()
    log.info("uploaded to %s", address)
    return address


def prepare(destination: Destination, conduct: Conduct, description: Description) -> None:
    """The card, and the list of all that goes to the hub, in the output folder."""
    name, folder = conduct.run.saving.output_name, conduct.folder
    own = re.compile(re.escape(name) + _ENDINGS)
    files = {path.name: path.name for path in sorted(folder.iterdir()) if own.fullmatch(path.name)}
    pictures = _newest(conduct)
    files |= {f"images/{path.name}": str(path.relative_to(folder)) for path, _ in pictures}
    repository = destination.repository(folder)
    card = Card(
        name=description.title or name,
        file=f"{name}.safetensors",
        repository=repository,
        diffusers_file=_for_diffusers(conduct, files),
        base_model=description.base_model,
        modes=description.modes,
        guidance=description.sample_guidance or 30.0,
        steps=description.steps or 0,
        rank=description.network_dim or 0,
        resolution=description.resolution or (1024, 1024),
        trigger_words=description.trigger_words,
        license=description.license,
        pictures=[(f"images/{path.name}", caption) for path, caption in pictures],
        settings=[(s.key.name, _shown(s.value)) for s in resolved.changed(conduct.run)],
        dataset=conduct.dataset_facts,
        extra_files=[file for file in files if "/" not in file and file != f"{name}.safetensors"],
    )
    atomic_write(folder / CARD, render(card))
    message = f"{name} after {description.steps} steps"
    left = {"repository": repository, "message": message, "files": {**files, CARD: CARD}}
    atomic_write(folder / LEFT, json.dumps(left, indent=1, ensure_ascii=False))


def _for_diffusers(conduct: Conduct, files: dict[str, str]) -> str | None:
    """The file that diffusers loads whole: a second one with its names where there is one (the first then holds a
    trained x_embedder that diffusers would drop without a word); None where it cannot load such a network."""
    run = conduct.run
    plan = outlook(run, Base.open(run.model)).plan
    second = f"{run.saving.output_name}_diffusers.safetensors"
    if second in files:
        return second
    return f"{run.saving.output_name}.safetensors" if FILE_KINDS[plan.settings.kind] in LOW_RANK else None


def _newest(conduct: Conduct) -> list[tuple[Path, str]]:
    gallery = conduct.painter.gallery()
    if not gallery.rows:
        return []
    cells = zip(gallery.rows[-1].cells, gallery.columns, strict=True)
    return [(cell, column.prompt) for cell, column in cells if cell is not None][:_MOST_PICTURES]


def _shown(value: object) -> str:
    """A setting without the folders of the machine it was used on."""
    if isinstance(value, tuple):
        return ", ".join(_shown(item) for item in value)
    return Path(str(value)).name if isinstance(value, Path) or str(value).startswith(("/", "~")) else str(value)
