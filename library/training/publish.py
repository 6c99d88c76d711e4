"""The last act of a run that is to be published: its card, its newest previews, its files, in one upload."""

import logging
from pathlib import Path

from library.config import resolved
from library.networks.metadata import Description
from library.training import hub
from library.training.conduct import Conduct
from library.training.hub import Destination
from library.training.model_card import Card, render

log = logging.getLogger(__name__)
_MOST_PICTURES = 6


def publish(destination: Destination, conduct: Conduct, description: Description) -> str:
    """Upload; returns the repository's address."""
    name, folder = conduct.run.saving.output_name, conduct.folder
    files: dict[str, Path | bytes] = {
        path.name: path for path in sorted(folder.glob(f"{name}*.safetensors")) if "-step" not in path.name
    }
    pictures = _newest(conduct)
    files |= {f"images/{path.name}": path for path, _ in pictures}
    card = Card(
        name=description.title or name,
        file=f"{name}.safetensors",
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
    )
    files["README.md"] = render(card).encode("utf-8")
    address = hub.upload(destination, files, f"{name} after {description.steps} steps")
    log.info("uploaded to %s", address)
    return address


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
