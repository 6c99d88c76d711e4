"""What the page says about each item beside its pictures."""

from __future__ import annotations

from dataclasses import dataclass

from library.config.tables import DatasetTable
from library.data.lint import Examined, Finding
from library.data.manifest import Manifest, Text
from library.data.plan import Plan, PlannedItem
from library.data.shares import held_out


@dataclass(frozen=True)
class Card:
    """One item. entry: fingerprint of the entry that is shown, the first of its first resolution.

    captions: with the words T5 does not see. sizes: what the model sees at each resolution, in pixels. variants: crops
    and mirror images cached of it. changed: share of pixels that the edit changes, None without a target.
    """

    name: str
    entry: str
    subset: str
    mode: str
    captions: tuple[Text, ...]
    sizes: tuple[tuple[int, int], ...]
    variants: int
    masks: int
    cropped: float
    enlarged: float
    changed: float | None
    held_out: bool
    findings: tuple[Finding, ...]


def make_cards(
    plan: Plan, manifest: Manifest, examined: Examined, datasets: tuple[DatasetTable, ...], seed: int
) -> list[Card]:
    """A card for each item of a plan, in its order."""
    texts = {text.caption: text for text in manifest.texts}
    found: dict[str, list[Finding]] = {}
    for finding in examined.findings:
        found.setdefault(finding.item, []).append(finding)
    held = held_out(manifest.items, datasets, seed)
    return [
        _card(
            item,
            plan.subset_names[item.subset],
            tuple(texts[caption] for caption in item.captions),
            examined.changed.get(item.key),
            item.key in held,
            tuple(found.get(item.key, ())),
        )
        for item in plan.items
    ]


def _card(
    item: PlannedItem,
    subset: str,
    captions: tuple[Text, ...],
    changed: float | None,
    held: bool,
    findings: tuple[Finding, ...],
) -> Card:
    recipe = item.sizes[0][0]
    return Card(
        name=item.key,
        entry=recipe.fingerprint,
        subset=subset,
        mode=recipe.mode.name,
        captions=captions,
        sizes=tuple(dict.fromkeys(choices[0].size for choices in item.sizes)),
        variants=len(item.sizes[0]),
        masks=recipe.num_masks,
        cropped=max(recipe.crop_share for recipe in item.recipes),
        enlarged=max(recipe.enlargement for recipe in item.recipes),
        changed=changed,
        held_out=held,
        findings=findings,
    )


def shown_first(cards: list[Card], most: int) -> list[int]:
    """Numbers of the cards that get pictures: those with warnings before all others, the others evenly spread."""
    warned = [number for number, card in enumerate(cards) if card.findings][:most]
    others = [number for number, card in enumerate(cards) if not card.findings]
    room = most - len(warned)
    if len(others) > room:
        others = [others[index * len(others) // room] for index in range(room)]
    return sorted([*warned, *others])
