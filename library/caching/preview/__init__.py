"""WHAT THE MODEL SEES: one HTML page of the cached targets, conditions and masks, decoded again, with every warning.

cards says in words what each item is, decoded turns cached latents back into pictures, page writes both into one file
that opens from the disk, anywhere.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from tqdm import tqdm

from library.data.lint import examine
from library.data.manifest import manifest_path, read_manifest

if TYPE_CHECKING:
    from pathlib import Path

    from library.caching.session import Session
    from library.data.plan import Plan

log = logging.getLogger("influx")


def write(session: Session, plan: Plan, path: Path, most_pictures: int) -> None:
    """Write the page of a plan whose entries are all in the cache. All items are listed; most_pictures are shown."""
    from library.caching.preview.cards import make_cards, shown_first
    from library.caching.preview.decoded import decoded_pictures
    from library.caching.preview.page import Heading, write_page
    from library.data.reader import Reader

    manifest = read_manifest(manifest_path(session.scope.folder, session.scope.config))
    lost = {text.caption: text.lost for text in manifest.texts if text.lost}
    with tqdm(total=len(plan.items), desc="looking at pairs", unit="item", disable=None, leave=False) as bar:
        examined = examine(plan, lost, workers=session.workers, progress=bar.update)
    cards = make_cards(plan, manifest, examined, session.run.datasets, session.run.training.seed or 0)
    shown = shown_first(cards, most_pictures)
    heading = Heading(str(session.run.command.config_file or ""), str(session.scope.folder), session.base.name)
    pictures = decoded_pictures(session, Reader(session.store), [(number, cards[number].entry) for number in shown])
    with tqdm(pictures, total=len(shown), desc="decoding", unit="item", disable=None) as bar:
        write_page(path, heading, cards, bar)
    if len(shown) < len(cards):
        log.info("pictures of %d of %d items are in the page (preview_items)", len(shown), len(cards))
    log.info("preview: %s (%.1f MB)", path, path.stat().st_size / 1e6)
