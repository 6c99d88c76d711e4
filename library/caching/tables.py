"""What the plan looks like, as tables for people: buckets with what was cut off, subsets with their shares."""

from __future__ import annotations

from collections.abc import Iterable

from library.config.tables import DatasetTable
from library.data.plan import Plan, PlannedItem, all_subsets
from library.data.recipe import Recipe
from library.data.shares import share_table, shares


def bucket_table(plan: Plan) -> str:
    """Each bucket: its size, how many entries it has, how much of their pictures was cropped and how far enlarged."""
    found: dict[tuple[int, int], list[Recipe]] = {}
    for item in plan.items:
        for recipe in item.recipes:
            found.setdefault(recipe.size, []).append(recipe)
    lines = ["  bucket      entries  cropped (mean, most)  enlarged most"]
    for (width, height), recipes in sorted(found.items(), key=lambda entry: -len(entry[1])):
        cropped = [recipe.crop_share for recipe in recipes]
        mean, most = sum(cropped) / len(cropped), max(cropped)
        lines.append(
            f"  {f'{width}x{height}':<10}  {len(recipes):>7}  {mean:>11.1%}, {most:>6.1%}"
            f"  {max(recipe.enlargement for recipe in recipes):>12.2f}x"
        )
    return "\n".join(["buckets:", *lines])


def subset_table(datasets: tuple[DatasetTable, ...], plan: Plan) -> str:
    """Each subset's items, repeats and share of an epoch."""
    counts = _counts(plan.items, len(plan.subset_names))
    return "subsets:\n" + share_table(shares(plan.subset_names, all_subsets(datasets), counts))


def _counts(items: Iterable[PlannedItem], num_subsets: int) -> list[int]:
    counts = [0] * num_subsets
    for item in items:
        counts[item.subset] += 1
    return counts
