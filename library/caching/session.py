"""What the steps of one caching run share."""

from __future__ import annotations

from dataclasses import dataclass

from library.config.run import Run
from library.data.plan import Plan
from library.data.recipe import ImageEncoding, TextEncoding
from library.data.scope import Scope
from library.data.store import Store
from library.models.base import Base


@dataclass(frozen=True)
class Session:
    """One run: its configuration, its base and the cache it works on."""

    run: Run
    base: Base
    scope: Scope
    store: Store
    images: ImageEncoding
    texts: TextEncoding
    workers: int


def wanted(plan: Plan, texts: TextEncoding) -> set[str]:
    """Every entry a plan needs."""
    previews = {preview.fingerprint for preview in plan.previews}
    return set(plan.recipes) | previews | {texts.fingerprint(caption) for caption in plan.captions}
