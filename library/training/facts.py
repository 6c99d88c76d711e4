"""What can be said about a data set in a few lines: for the report, the metadata and the model card."""

from collections import Counter
from dataclasses import dataclass, field

from library.data.cached import CachedDataset
from library.data.manifest import ManifestItem
from library.data.plan import all_subsets

_LOOKED_AT = 16  # items of edit mode whose masks are read
_MOST_TAGS, _LONGEST_TAG = 300, 200  # ComfyUI serves no header over 1 MiB


@dataclass(frozen=True)
class DataFacts:
    """What a network's file says about the data that it was trained on: regularisation and held-out items apart.

    modes and edit_mask_values: the commonest first. edits_regions: whether edits have masks. prompt: the first
    preview's. largest: (width, height) of the largest bucket. kohya: fields that kohya's and Forge's tools show.
    """

    modes: tuple[str, ...] = ()
    edit_mask_values: tuple[float, ...] = ()
    edits_regions: bool = False
    prompt: str | None = None
    largest: tuple[int, int] | None = None
    kohya: dict[str, object] = field(default_factory=dict)


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


def data_facts(dataset: CachedDataset) -> DataFacts:
    """The facts of a data set, from its cache alone."""
    subsets = all_subsets(dataset.datasets)
    own = [item for item in dataset.items if not subsets[item.subset].is_reg] or list(dataset.items)
    modes = Counter(subsets[item.subset].mode for item in own)
    edits = [item for item in own if subsets[item.subset].mode == "edit"]
    values = Counter(subsets[item.subset].edit_mask_value for item in edits)
    buckets = bucket_counts(dataset)
    previews = dataset.manifest.previews
    step = -(-len(edits) // _LOOKED_AT) or 1
    return DataFacts(
        modes=tuple(mode for mode, _ in modes.most_common()),
        edit_mask_values=tuple(value for value, _ in values.most_common()),
        edits_regions=any(_has_region(dataset, item) for item in edits[::step]),
        prompt=str(previews[0].request["prompt"]) if previews else None,
        largest=max(buckets, key=lambda size: size[0] * size[1]),
        kohya={
            "ss_num_train_images": len(dataset.items),
            "ss_tag_frequency": _tags(dataset),
            "ss_dataset_dirs": {
                share.name: {"n_repeats": round(share.repeats), "img_count": share.num_items}
                for share in dataset.shares
                if share.num_items
            },
            "ss_bucket_info": {
                "buckets": {
                    str(number): {"resolution": list(size), "count": count}
                    for number, (size, count) in enumerate(buckets.items())
                }
            },
        },
    )


def _has_region(dataset: CachedDataset, item: ManifestItem) -> bool:
    """Whether the item's mask tells parts of the picture apart; without a mask file all of it has one value."""
    bits = dataset.reader.read(item.sizes[0][0], "mask.0")
    return not bool((bits == bits.view(-1)[0]).all()) or int(bits.view(-1)[0]) not in (0, 255)


def _tags(dataset: CachedDataset) -> dict[str, dict[str, int]]:
    """How often each comma-separated part of the captions occurs, by subset; the commonest of them."""
    counts: dict[str, Counter[str]] = {}
    for item in dataset.items:
        tags = dataset.manifest.texts[item.texts[0]].caption.split(",") if item.texts else []
        own = counts.setdefault(dataset.manifest.subsets[item.subset], Counter())
        own.update(tag.strip() for tag in tags if 0 < len(tag.strip()) <= _LONGEST_TAG)
    return {name: dict(own.most_common(_MOST_TAGS)) for name, own in counts.items() if own}
