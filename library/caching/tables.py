"""What the plan looks like, as tables for people: buckets with what was cut off, subsets with their shares."""

from __future__ import annotations

from library.config.tables import DatasetTable
from library.data.plan import Plan, all_subsets
from library.data.recipe import Recipe
from library.data.shares import share_table, shares, trained_counts


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


def subset_table(datasets: tuple[DatasetTable, ...], plan: Plan, seed: int) -> str:
    """Each subset's items in training, repeats and share of an epoch; and what is held out."""
    counts = trained_counts(plan.items, datasets, seed)
    table = "subsets:\n" + share_table(shares(plan.subset_names, all_subsets(datasets), counts))
    held = len(plan.items) - sum(counts)
    return table + (f"\n  {held} items are held out for validation" if held else "")
