"""What a step draws from the cache: variants, captions, dropout, full masks, resolutions, held-out items."""

from __future__ import annotations

import gc
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from library import caching
from library.data.cached import open_cache
from library.data.listing import listed
from library.data.pictures import pictures_of
from library.models.base import Base
from library.training.plan import data_lines
from tests.caching.conftest import EDIT, SIDE, picture, write_pairs
from tests.caching.test_caching import cached

MASK = 'image_dir = "data/train_A"\ninstance_prompt = "red"\nmode = "mask"\n'


def drawn(dataset, count: int):
    return [dataset.batch(position) for position in range(count)]


def test_captions_are_dropped_to_the_embeddings_of_the_empty_prompt(pairs, configured) -> None:
    dataset = cached(configured(EDIT + "caption_dropout_rate = 0.25", "train_batch_size = 1"))
    batches = drawn(dataset, 400)
    empty = [batch for batch in batches if batch.captions == ("",)]
    assert 70 <= len(empty) <= 130
    assert all(torch.equal(batch.text.t5, dataset.empty_text.t5) for batch in empty)
    encoded = Base.open(configured().model).load_text_encoders(dtype=torch.bfloat16).encode([""], 32)
    assert torch.equal(dataset.empty_text.t5[0], encoded.embeddings.t5[0])


def test_captions_can_be_dropped_in_every_nth_epoch(pairs, configured) -> None:
    dataset = cached(configured(EDIT + "caption_dropout_every_n_epochs = 3", "train_batch_size = 4"))
    dropped = [set(batch.captions) == {""} for batch in drawn(dataset, 7)]
    assert dropped == [False, False, True, False, False, True, False]  # counted from 1, as kohya's scripts do


def test_the_share_of_full_masks(pairs, configured) -> None:
    subset = MASK + 'generate_mask = ["box", "brush"]\nmask_variants = 2\nfull_mask_rate = 0.3'
    dataset = cached(configured(subset, "train_batch_size = 1"))
    batches = drawn(dataset, 300)
    assert 60 <= sum(bool(batch.condition.mask.min()) for batch in batches) <= 120
    masks = {batch.condition.mask.numpy().tobytes() for batch in batches if batch.item_keys == batches[0].item_keys}
    assert len(masks) == 3


def test_mirror_images_crops_and_captions_are_all_drawn(pairs, configured) -> None:
    picture(0, 128, SIDE).save(pairs / "train_A" / "0.png")
    picture(1, 128, SIDE).save(pairs / "train_B" / "0.png")
    (pairs / "prompts" / "0.txt").write_text("one\ntwo\nthree")
    subset = EDIT + "flip_aug = true\nrandom_crop = true\ncrop_variants = 2\ncaption_per_line = true"
    dataset = cached(configured(subset, "train_batch_size = 1\nenable_bucket = false"))
    of_first = [batch for batch in drawn(dataset, 160) if batch.item_keys == ("train_A/0",)]
    assert {batch.captions for batch in of_first} == {("one",), ("two",), ("three",)}
    assert len({batch.mean.view(torch.uint8).numpy().tobytes() for batch in of_first}) == 4


def test_a_batch_draws_one_of_several_resolutions(pairs, configured) -> None:
    dataset = cached(configured(dataset="resolutions = [32, 48, 64]\ntrain_batch_size = 2"))
    sizes = Counter(batch.bucket for batch in drawn(dataset, 60))
    assert set(sizes) == {(32, 32), (48, 48), (64, 64)} and min(sizes.values()) > 8


def test_held_out_items_are_never_trained_on(configured, tmp_path) -> None:
    write_pairs(tmp_path / "data", 10)
    dataset = cached(configured(dataset="validation_split = 0.3\nvalidation_seed = 5"))
    held = {item.key for item in dataset.held_out_items}
    assert len(held) == 3
    trained = {key for batch in drawn(dataset, 12) for key in batch.item_keys}
    assert not held & trained and len(trained) == 7
    measured = [key for batch in dataset.held_out_batches() for key in batch.item_keys]
    assert sorted(measured) == sorted(held)
    other = open_cache(configured(dataset="validation_split = 0.3\nvalidation_seed = 6"))
    assert {item.key for item in other.held_out_items} != held
    whole = cached(configured(f"{EDIT}---{EDIT}is_validation = true"))
    assert {item.key.split("/")[0] for item in whole.held_out_items} == {"train_A-2"}


def test_printed_shares_are_those_of_training(pairs, configured, caplog) -> None:
    """Held-out subsets have no share, and need no weight."""
    caplog.set_level("INFO")
    mask = f'{MASK}generate_mask = ["half"]\nsubset_weight = 1.0'
    run = configured(f"{EDIT}subset_weight = 3.0---{mask}---{EDIT}is_validation = true")
    caching.run(run)
    lines = ["train_A        4 items x 3 repeats =  75.0%", "train_A-2       4 items x 1 repeats =  25.0%"]
    assert all(" ".join(line.split()) in " ".join(caplog.text.split()) for line in lines)
    assert "4 items are held out for validation" in caplog.text and "train_A-3 " not in caplog.text
    planned = " ".join(" ".join(data_lines(run, listed(run))).split())
    assert all(" ".join(line.split()) in planned for line in lines)
    assert "items: 8 (4 edit, 4 mask), 4 of them pairs; 4 held out" in planned


def test_pairs_from_a_table_are_counted(pairs, configured) -> None:
    rows = "".join(f"train_A/{number}.png,train_B/{number}.png,red\n" for number in range(4))
    (pairs / "items.csv").write_text("image,target,caption\n" + rows)
    for mode in ('"edit"', '"mask"\ngenerate_mask = ["half"]'):
        run = configured(f'metadata_file = "data/items.csv"\nmode = {mode}')
        caching.run(run)
        assert ", 4 of them pairs" in data_lines(run, listed(run))[0]


def test_modes_mix_in_one_batch(pairs, configured) -> None:
    subsets = f'{EDIT}---{MASK}mask_dir = "data/masks"---{MASK}generate_mask = ["half"]'
    dataset = cached(configured(subsets, "train_batch_size = 12"))
    (batch,) = drawn(dataset, 1)
    assert len(batch) == 12 and batch.condition.mask.shape == (12, 1, SIDE, SIDE)
    for row, key in enumerate(batch.item_keys):
        mask = batch.condition.mask[row].float()
        assert (mask.mean() == 1) == key.startswith("train_A/")
        if not key.startswith("train_A/"):  # one picture: what changes is what is repainted
            expected = torch.nn.functional.avg_pool2d(mask[None], 8)[0]
            torch.testing.assert_close(batch.changed[row], expected)


def test_the_changed_area_is_where_the_pair_differs(pairs, configured) -> None:
    for number in range(4):
        edited = picture(number)
        edited.paste("lime", (16, 24, 48, 40))
        edited.save(pairs / "train_B" / f"{number}.png")
    (batch,) = drawn(cached(configured(dataset="train_batch_size = 4")), 1)
    inside = torch.zeros(8, 8)
    inside[3:5, 2:6] = 1
    assert (batch.changed[:, 0][:, inside == 0] == 0).all() and batch.changed[:, 0][:, inside == 1].mean() > 0.9


@pytest.mark.parametrize("how", ["crop", "pad"])
def test_a_source_of_another_aspect_is_fitted_never_stretched(how, pairs, configured) -> None:
    from importlib import import_module

    from library.caching.session import Session
    from library.data.scope import encodings, scope_of
    from library.data.store import Store

    wide = Image.new("RGB", (128, SIDE), "black")
    wide.paste("white", (54, 22, 74, 42))
    wide.save(pairs / "train_A" / "1.png")
    run = configured(EDIT + f'size_mismatch = "{how}"\nbackground_color = "#000000"')
    base = Base.open(run.model)
    scope = scope_of(run, base)
    scope.folder.mkdir()
    session = Session(run, base, scope, Store(scope.folder), *encodings(run, base, scope), 1)
    plan = import_module("library.caching.run").plan_of(session)
    source = np.asarray(pictures_of(plan.items[1].first).source)[..., 0] > 128
    if how == "crop":
        assert source.any(axis=0).sum() == source.any(axis=1).sum() == 20
    else:
        assert source.any(axis=0).sum() == source.any(axis=1).sum() == 10


def test_encoders_are_never_in_memory_together(pairs, configured, monkeypatch) -> None:
    from diffusers import AutoencoderKL
    from transformers import T5EncoderModel

    load = Base.load_vae

    def watched(self, *arguments, **options):
        gc.collect()
        assert not [one for one in gc.get_objects() if isinstance(one, T5EncoderModel)]
        return load(self, *arguments, **options)

    monkeypatch.setattr(Base, "load_vae", watched)
    caching.run(configured())
    gc.collect()
    assert not [one for one in gc.get_objects() if isinstance(one, T5EncoderModel | AutoencoderKL)]


def test_an_error_while_reading_ahead_surfaces_at_its_own_batch(pairs, configured, tmp_path) -> None:
    dataset = cached(configured(dataset="train_batch_size = 1"))
    ahead = dataset.batches(iter([0, 1, -1]), depth=3)
    assert next(ahead).position == 0 and next(ahead).position == 1
    with pytest.raises((IndexError, AssertionError, ValueError)):
        next(ahead)
