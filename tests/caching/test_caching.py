"""The caching command on a tiny base: what is cached is what the modes ask for, and a second run does nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from library import caching
from library.conditioning import MODES, ModeSettings
from library.data.cached import open_cache
from library.data.pixels import to_tensor
from library.data.reader import Reader
from library.data.store import Store
from library.errors import CacheError
from library.models.base import Base
from tests.caching.conftest import EDIT, SIDE, picture


def cached(run):
    assert caching.run(run) == 0
    return open_cache(run)


def contents(folder: Path) -> dict[str, bytes]:
    store = Store(folder)
    reader = Reader(store)
    return {
        f"{fingerprint}/{part}": tensor.view(-1).view(torch.uint8).numpy().tobytes()
        for fingerprint in store.where
        for part, tensor in reader.entry(fingerprint).items()
    }


def test_edit_items_hold_target_source_and_a_white_mask(pairs, configured) -> None:
    run = configured(dataset="train_batch_size = 4")
    dataset = cached(run)
    batch = dataset.batch(0)
    vae = Base.open(run.model).load_vae(parts="encoder")
    for row, key in enumerate(batch.item_keys):
        number = int(key.rsplit("/", 1)[1])
        mean, std = vae.encode(to_tensor(picture(100 + number))[None])
        source, _ = vae.encode(to_tensor(picture(number))[None])
        torch.testing.assert_close(batch.mean[row].float(), mean[0], atol=0.02, rtol=0.02)
        torch.testing.assert_close(batch.std[row].float(), std[0], atol=0.02, rtol=0.02)
        torch.testing.assert_close(batch.condition.latents[row].float(), source[0], atol=0.02, rtol=0.02)
        assert batch.captions[row] == f"red circle number {number % 3}"
    assert batch.condition.mask.min() == 1 and batch.bucket == (SIDE, SIDE)
    assert batch.condition.channels().shape == (4, SIDE * SIDE // 256, 320)


def test_second_run_encodes_nothing_and_changes_no_file(pairs, configured, tmp_path, monkeypatch) -> None:
    run = configured()
    caching.run(run)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}
    monkeypatch.setattr(Base, "load_vae", None)
    monkeypatch.setattr(Base, "load_text_encoders", None)
    monkeypatch.setattr("library.data.ledger.inspect", None)  # not even decoded
    assert caching.run(run) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}


@pytest.mark.parametrize("latents_as", ["distribution", "sample", "mean"])
def test_target_latents_are_kept_as_asked(latents_as: str, pairs, configured) -> None:
    batch = cached(configured(rest=f'cache_latents_as = "{latents_as}"')).batch(0)
    assert (batch.std is None) == (latents_as != "distribution")
    assert batch.mean.shape[1:] == (16, SIDE // 8, SIDE // 8)


def test_edit_within_a_region(pairs, configured) -> None:
    batch = cached(configured(EDIT + 'mask_dir = "data/masks"', "train_batch_size = 4")).batch(0)
    for row, key in enumerate(batch.item_keys):
        number = int(key.rsplit("/", 1)[1])
        expected = np.zeros((SIDE, SIDE))
        expected[8 : 24 + 4 * number, 8:40] = 1
        assert np.array_equal(batch.condition.mask[row, 0].numpy(), expected)


def test_mask_mode_blanks_what_is_repainted(pairs, configured) -> None:
    subset = 'image_dir = "data/train_A"\nmask_dir = "data/masks"\ninstance_prompt = "red"\nmode = "mask"'
    run = configured(subset, "train_batch_size = 1")
    dataset = cached(run)
    batch = dataset.batch(0)
    number = int(batch.item_keys[0].rsplit("/", 1)[1])
    image, mask = to_tensor(picture(number)), batch.condition.mask[0].float()
    vae = Base.open(run.model).load_vae(parts="encoder")
    torch.testing.assert_close(batch.mean.float(), vae.encode(image[None])[0], atol=0.02, rtol=0.02)
    expected, _ = vae.encode((image * (1 - mask))[None])
    torch.testing.assert_close(batch.condition.latents.float(), expected, atol=0.02, rtol=0.02)
    assert batch.captions == ("red",)


def test_mask_mode_with_a_target_of_its_own(pairs, configured) -> None:
    subset = EDIT.replace('"edit"', '"mask"') + 'mask_dir = "data/masks"'
    run = configured(subset, "train_batch_size = 1")
    batch = cached(run).batch(0)
    number = int(batch.item_keys[0].rsplit("/", 1)[1])
    vae = Base.open(run.model).load_vae(parts="encoder")
    target, _ = vae.encode(to_tensor(picture(100 + number))[None])
    torch.testing.assert_close(batch.mean.float(), target, atol=0.02, rtol=0.02)


def test_spatial_joined_and_separate_are_one(pairs, configured, tmp_path) -> None:
    from PIL import Image

    separate = cached(configured(EDIT.replace('"edit"', '"spatial"'), "train_batch_size = 1"))
    (pairs / "joined").mkdir()
    for number in range(4):
        canvas = Image.new("RGB", (2 * SIDE, SIDE))
        canvas.paste(picture(number), (0, 0))
        canvas.paste(picture(100 + number), (SIDE, 0))
        canvas.save(pairs / "joined" / f"{number}.png")
    joined = cached(
        configured('image_dir = "data/joined"\ncaption_dir = "data/prompts"\nmode = "spatial"', "train_batch_size = 1")
    )
    first = {item.key[-1]: joined.reader.entry(item.sizes[0][0]) for item in joined.items}
    other = {item.key[-1]: separate.reader.entry(item.sizes[0][0]) for item in separate.items}
    for key, parts in first.items():
        assert set(parts) == set(other[key])
        assert all(torch.equal(parts[name], other[key][name]) for name in parts)
    assert joined.batch(0).bucket == (2 * SIDE, SIDE)


def test_spatial_draws_both_sides_and_right_only_when_asked(pairs, configured) -> None:
    subset = EDIT.replace('"edit"', '"spatial"')
    both = cached(configured(subset, "train_batch_size = 1"))
    sides = {bool(both.batch(position).condition.mask[..., 0].max()) for position in range(32)}
    assert sides == {True, False}
    right = cached(configured(subset + "mask_only_right = true", "train_batch_size = 1"))
    assert {bool(right.batch(position).condition.mask[..., 0].max()) for position in range(8)} == {False}


def test_the_cache_agrees_with_the_condition_of_inference(pairs, configured) -> None:
    run = configured(EDIT.replace('"edit"', '"spatial"') + "mask_only_right = true", "train_batch_size = 1")
    batch = cached(run).batch(0)
    number = int(batch.item_keys[0].rsplit("/", 1)[1])
    item = MODES["spatial"].request(to_tensor(picture(number)), None, ModeSettings())
    vae = Base.open(run.model).load_vae(parts="encoder")
    latents, _ = vae.encode(item.condition_pixels()[None])
    torch.testing.assert_close(batch.condition.latents.float(), latents, atol=0.02, rtol=0.02)
    assert torch.equal(batch.condition.mask[0].float(), item.mask)


def test_text_is_cached_once_per_distinct_caption_and_always_empty(pairs, configured, tmp_path) -> None:
    dataset = cached(configured())
    assert [text.caption for text in dataset.manifest.texts] == [""] + [f"red circle number {n}" for n in range(3)]
    encoders = Base.open(configured().model).load_text_encoders(dtype=torch.bfloat16)
    for text in dataset.manifest.texts:
        encoded = encoders.encode([text.caption], 32)
        assert torch.equal(dataset.reader.read(text.fingerprint, "t5"), encoded.embeddings.t5[0])
        assert torch.equal(dataset.reader.read(text.fingerprint, "pooled"), encoded.embeddings.pooled[0])
        assert torch.equal(dataset.reader.read(text.fingerprint, "clip_ids"), encoded.clip_ids[0].int())


def test_editing_a_caption_encodes_only_text(pairs, configured, tmp_path, monkeypatch) -> None:
    run = configured()
    caching.run(run)
    images = sorted((tmp_path / "cache" / "image").rglob("*.safetensors"))
    (pairs / "prompts" / "0.txt").write_text("a blue square")
    monkeypatch.setattr(Base, "load_vae", None)
    dataset = cached(run)
    assert "a blue square" in [text.caption for text in dataset.manifest.texts]
    assert images == sorted((tmp_path / "cache" / "image").rglob("*.safetensors"))


def test_batches_are_a_function_of_seed_and_position(pairs, configured) -> None:
    subset = EDIT + "caption_dropout_rate = 0.5\nflip_aug = true"
    run = configured(subset, "train_batch_size = 3")
    first, again = cached(run), open_cache(run)
    ahead = list(again.batches(range(7), depth=3))
    for position in range(7):
        alone = first.batch(position)
        assert alone.item_keys == ahead[position].item_keys and alone.captions == ahead[position].captions
        assert torch.equal(alone.mean, ahead[position].mean)
    other = open_cache(
        configured(rest="[training]\nseed = 1", subset=EDIT + "caption_dropout_rate = 0.5\nflip_aug = true")
    )
    assert [b.item_keys for b in other.batches(range(7))] != [b.item_keys for b in ahead]


def test_every_item_comes_once_an_epoch(pairs, configured) -> None:
    dataset = cached(configured(dataset="train_batch_size = 3"))
    assert dataset.order.num_batches(0) == 2
    keys = [key for position in range(2) for key in dataset.batch(position).item_keys]
    assert sorted(keys) == sorted(item.key for item in dataset.items)


@pytest.mark.parametrize("spoil", ["missing", "other", "image", "entry", "vae"])
def test_the_trainer_refuses_a_cache_that_is_not_up_to_date(spoil, pairs, configured, tmp_path, base) -> None:
    run = configured()
    if spoil != "missing":
        caching.run(run)
    if spoil == "other":
        run = configured(dataset="bucket_no_upscale = true")
    if spoil == "image":
        picture(7).save(pairs / "train_A" / "0.png")
    if spoil == "entry":
        next((tmp_path / "cache" / "image").rglob("*.safetensors")).unlink()
    if spoil == "vae":
        run = configured(arguments=("--ae", str(_other_vae(base, tmp_path))))
    with pytest.raises(CacheError) as error:
        open_cache(run)
    assert "influx_cache.py --config_file" in str(error.value)
    words = {"missing": "no cache", "other": "bucket_no_upscale", "image": "0.png", "entry": "missing", "vae": "VAE"}
    assert words[spoil] in str(error.value)


def _other_vae(base: Path, tmp_path: Path) -> Path:
    from tests.tiny import tiny_vae

    tiny_vae(seed=9).save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"
