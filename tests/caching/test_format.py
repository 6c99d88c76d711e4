"""The cache as another program reads it: safetensors and json, by docs/cache_format.md, nothing of InFlux."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from library import caching
from tests.caching.conftest import EDIT, SIDE

DOCUMENT = (Path(__file__).parents[2] / "docs" / "cache_format.md").read_text(encoding="utf-8")


def read(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """All entries of a cache, and a check of everything the page says about shards."""
    entries: dict[str, dict[str, torch.Tensor]] = {}
    for path in [*folder.glob("image/*/*.safetensors"), *folder.glob("text/*.safetensors")]:
        with safe_open(path, "pt") as shard:
            metadata = shard.metadata()
            assert (metadata["format"], metadata["version"]) == ("influx-cache", "1")
            assert metadata["kind"] == path.relative_to(folder).parts[0]
            for name in shard.keys():
                entry, part = name.split("/", 1)
                entries.setdefault(entry, {})[part] = shard.get_tensor(name)
        facts = json.loads(metadata["entries"])
        for entry, fact in facts.items():
            parts = sorted(entries[entry].items())
            data = b"".join(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for _, tensor in parts)
            assert fact["sha256"] == sha256(data).hexdigest()
            if not fact.get("preview"):
                covered = {"caption": fact["caption"], "format": 1, "kind": "text"} if "caption" in fact else {}
                spelled = json.dumps({**covered, **fact["made_of"]}, sort_keys=True, separators=(",", ":"))
                assert entry == sha256(spelled.encode()).hexdigest()[:32]
    return entries


def test_another_program_can_read_it(pairs, configured, tmp_path) -> None:
    (tmp_path / "p.txt").write_text("red --ci data/train_A/0.png\n")
    subset = EDIT + 'mask_dir = "data/masks"\nflip_aug = true'
    caching.run(configured(subset, rest='[sampling]\nsample_prompts = "p.txt"'))
    folder = tmp_path / "cache"
    entries = read(folder)
    (path,) = (folder / "manifests").glob("*.json")
    manifest = json.loads(path.read_text())
    assert manifest["format"] == "influx-manifest" and manifest["texts"][0][1] == ""
    for key, subset_number, texts, sizes in manifest["items"]:
        assert key.startswith(manifest["subsets"][subset_number])
        for entry in (one for choices in sizes for one in choices):
            parts = entries[entry]
            assert set(parts) == {"target.mean", "target.std", "condition.0", "mask.0", "changed"}
            assert parts["target.mean"].shape == (16, SIDE // 8, SIDE // 8)
            mask = np.unpackbits(parts["mask.0"].numpy(), axis=-1)
            assert mask.shape == (SIDE, SIDE) and 0 < mask.mean() < 1
        for number in texts:
            entry, caption, lost = manifest["texts"][number]
            assert caption.startswith("red circle") and not lost
            assert set(entries[entry]) == {"t5", "pooled", "t5_ids", "clip_ids"}
            assert entries[entry]["clip_ids"].shape == (77,)
    ((request, mode, image, text, negative),) = manifest["previews"]
    assert (mode, negative) == ("edit", None) and request["prompt"] == "red"
    assert set(entries[image]) == {"condition.0", "mask.0"} and text in entries
    index = json.loads((folder / "index.json").read_text())
    assert {entry for _, *listed in index["shards"].values() for entry in listed} == set(entries)


def test_the_page_names_every_part_and_key(pairs, configured, tmp_path) -> None:
    caching.run(configured(EDIT + "edit_mask_value = 0.5"))
    names = {part for parts in read(tmp_path / "cache").values() for part in parts}
    assert "mask_value" in names
    (path,) = (tmp_path / "cache" / "manifests").glob("*.json")
    names |= set(json.loads(path.read_text()))
    for name in names:
        generic = name.replace("condition.0", "condition.<k>").replace("mask.0", "mask.<k>")
        assert f"`{generic}`" in DOCUMENT, name
