"""`influx_cache.py --lint`: look at the data set, print what was found, write it as JSON if asked."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from tqdm import tqdm

from library.config.run import Run
from library.data.ledger import Ledger
from library.data.lint.captions import lost_words
from library.data.lint.examine import Examined, examine
from library.data.lint.findings import KINDS
from library.data.plan import Plan, PlannedItem, make_plan
from library.data.recipe import ImageEncoding
from library.data.report import printable
from library.errors import ModelError
from library.files import atomic_write
from library.models.base import Base, Defaults

log = logging.getLogger("influx")

MOST_LISTED = 20  # items of each kind in the terminal; the JSON file has all
FORMAT = "influx-lint"
VERSION = 1


def run(run: Run) -> int:
    """Print the findings; 1 if there are any and `strict` is set. Writes nothing but the ledger of an existing cache
    and the JSON file; needs no base model."""
    workers = run.cache.cache_workers or max(1, min(8, os.cpu_count() or 1))
    plan = _plan(run, workers)
    length = run.cache.t5xxl_max_token_length or _base_length(run)
    lost = lost_words(plan.captions, run.model, length)
    with tqdm(total=len(plan.items), desc="looking at pairs", unit="item", disable=None, leave=False) as bar:
        examined = examine(plan, lost, workers=workers, progress=bar.update)
    for notice in plan.notices:
        log.info("note: %s", notice)
    if lost is None:
        log.info("note: caption lengths are not checked: the base's T5 tokenizer is not on this machine")
    print(summary(plan, examined), flush=True)
    if run.command.lint_json is not None:
        atomic_write(run.command.lint_json, json.dumps(as_json(plan, examined), indent=1, ensure_ascii=False) + "\n")
    return 1 if run.command.strict and examined.findings else 0


def _plan(run: Run, workers: int) -> Plan:
    """The plan that caching would make. Its fingerprints are of no base, and not used."""
    folder = Path(run.cache.dataset_cache_dir or run.saving.output_dir / "dataset_cache")
    ledger = Ledger(folder / "files.json")
    encoding = ImageEncoding("none", latents_as=run.cache.cache_latents_as)
    with tqdm(desc="looking at images", unit="image", disable=None, leave=False) as bar:
        plan = make_plan(
            run.datasets, run.cache, encoding, ledger, seed=run.training.seed or 0, workers=workers, progress=bar.update
        )
    if folder.is_dir():
        ledger.save()
    return plan


def _base_length(run: Run) -> int:
    """The T5 length that the base asks for; FLUX.1 Fill's if there is none here."""
    try:
        return Base.open(run.model).defaults.t5xxl_max_token_length
    except ModelError:
        return Defaults().t5xxl_max_token_length


def summary(plan: Plan, examined: Examined) -> str:
    """The findings as text: each kind with its count, what to do, and the items."""
    if not examined.findings:
        return f"{len(plan.items)} items, nothing found"
    affected = {finding.item for finding in examined.findings}
    lines = [f"{len(plan.items)} items, {len(affected)} of them with warnings"]
    for name, kind in KINDS.items():
        found = [finding for finding in examined.findings if finding.kind == name]
        if not found:
            continue
        lines.append(f"\n{name}: {kind.title} ({len(found)})\n  {kind.advice}")
        lines += [f"    {printable(finding.item)}: {printable(finding.message)}" for finding in found[:MOST_LISTED]]
        if len(found) > MOST_LISTED:
            lines.append(f"    ... and {len(found) - MOST_LISTED} more (--lint_json FILE lists all)")
    return "\n".join(lines)


def as_json(plan: Plan, examined: Examined) -> dict:
    """The findings for programs."""
    files = {item.key: _files(item) for item in plan.items}
    counts = {name: sum(finding.kind == name for finding in examined.findings) for name in KINDS}
    return {
        "format": FORMAT,
        "version": VERSION,
        "items": len(plan.items),
        "counts": counts,
        "findings": [
            {
                "item": finding.item,
                "kind": finding.kind,
                "message": finding.message,
                "values": finding.values,
                "files": files[finding.item],
            }
            for finding in examined.findings
        ],
    }


def _files(item: PlannedItem) -> dict[str, str]:
    pair = next(item.recipes).pair
    pictures = {"source": pair.source, "target": pair.target, "mask": pair.mask}
    return {role: picture.blob.key for role, picture in pictures.items() if picture is not None}
