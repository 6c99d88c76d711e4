"""What can be said about a data set in a few lines: for the report, the metadata and the model card."""

from collections import Counter

from library.data.cached import CachedDataset


def bucket_counts(dataset: CachedDataset) -> dict[tuple[int, int], int]:
    """Items in each bucket (width, height); an item counts in every resolution it is cached at."""
    sizes = (dataset.reader.store.bucket(choices[0]) for item in dataset.items for choices in item.sizes)
    return dict(sorted(Counter(sizes).items()))


def dataset_facts(dataset: CachedDataset, buckets: dict[tuple[int, int], int]) -> tuple[tuple[str, str], ...]:
    """Label and value of what describes the data."""
    subsets = ", ".join(f"{share.name} ({share.num_items} items, {share.share:.0%})" for share in dataset.shares)
    return (
        ("items", str(len(dataset.items))),
        ("held-out items", str(len(dataset.held_out_items))),
        ("subsets", subsets),
        ("buckets", ", ".join(f"{width} x {height}: {count}" for (width, height), count in buckets.items())),
        ("captions", str(len(dataset.manifest.texts) - 1)),
    )
