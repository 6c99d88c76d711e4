"""A cache that knows when it is stale, gives up nothing unasked, and survives damage."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import threading
import time
from importlib import import_module
from pathlib import Path

import pytest

from library import caching
from library.caching.run import plan_of
from library.caching.session import Session
from library.caching.upkeep import Status, status_of
from library.config import load
from library.data.cached import open_cache
from library.data.manifest import config_hash
from library.data.scope import encodings, scope_of
from library.data.store import Store
from library.errors import CacheError, DataError
from library.models.base import Base
from tests.caching.conftest import EDIT, picture, write_pairs
from tests.caching.test_caching import contents


def status(run) -> Status:
    base = Base.open(run.model)
    scope = scope_of(run, base)
    store = Store(scope.folder)
    session = Session(run, base, scope, store, *encodings(run, base, scope), 1)
    return status_of(session, plan_of(session))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def same_stat(path: Path, change) -> None:
    """Change a file and put its times back, as a careful copy does."""
    before = path.stat()
    change(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def recaption(data: Path) -> None:
    same_stat(data / "prompts" / "1.txt", lambda path: path.write_text("red circle number 2"))


CHANGES = {
    "source": (lambda data: same_stat(data / "train_A" / "1.png", picture(50).save), {}, 1, "source image changed"),
    "target": (lambda data: picture(51).save(data / "train_B" / "1.png"), {}, 1, "target image changed"),
    "resolution": (None, {"arguments": ("--resolution", "48")}, 4, "width changed"),
    "flip": (None, {"subset": EDIT + "flip_aug = true"}, 4, "train_A/0"),
    "mask value": (None, {"subset": EDIT + "edit_mask_value = 0.0"}, 4, "settings changed"),
    "interpolation": (None, {"subset": EDIT + 'resize_interpolation = "bicubic"'}, 4, "interpolation changed"),
    "latents": (None, {"rest": 'cache_latents_as = "mean"'}, 4, "cache_latents_as changed"),
    "vae dtype": (None, {"rest": 'vae_dtype = "bf16"'}, 4, "dtype changed"),
    "caption": (lambda data: (data / "prompts" / "1.txt").write_text("a blue square"), {}, 1, "caption: a blue square"),
    "prefix": (None, {"subset": EDIT + 'caption_prefix = "scene"'}, 3, "caption: scene red circle"),
    "token length": (None, {"rest": "t5xxl_max_token_length = 16"}, 4, "caption: red circle"),
    "text precision": (None, {"rest": 't5xxl_precision = "fp32"'}, 4, "caption: red circle"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_exactly_what_changed_is_encoded_again_with_a_reason(name, pairs, configured, tmp_path) -> None:
    change, other, count, reason = CHANGES[name]
    caching.run(configured())
    before = set(Store(tmp_path / "cache").where)
    if change is not None:
        change(pairs)
    run = configured(**other)
    found = status(run)
    said = [*(f"{item} {why}" for item, why in found.stale.items()), *found.missing]
    assert len(said) == count and any(reason in line for line in said), said
    with pytest.raises(CacheError):
        open_cache(run)
    caching.run(run)
    added = set(Store(tmp_path / "cache").where) - before
    assert len(added) == count and before <= set(Store(tmp_path / "cache").where)
    assert status(run).fresh and not status(run).stale and not status(run).missing
    open_cache(run)


def test_files_that_were_only_touched_are_fresh(pairs, configured, monkeypatch) -> None:
    run = configured()
    caching.run(run)
    for path in pairs.rglob("*.png"):
        os.utime(path)
    open_cache(run)
    monkeypatch.setattr(Base, "load_vae", None)
    caching.run(run)


def test_a_moved_data_set_needs_no_encoding(pairs, configured, tmp_path, monkeypatch) -> None:
    caching.run(configured())
    pairs.rename(tmp_path / "moved")
    run = configured(EDIT.replace("data/", "moved/"))
    monkeypatch.setattr(Base, "load_vae", None)
    monkeypatch.setattr(Base, "load_text_encoders", None)
    caching.run(run)
    assert len(open_cache(run).items) == 4


def test_a_cache_without_its_sources_trains(pairs, configured, tmp_path) -> None:
    """On another machine: other folders, no images, no encoders."""
    caching.run(configured())
    for path in (*pairs.rglob("*.png"), *pairs.rglob("*.txt")):
        path.unlink()
    assert len(open_cache(configured()).batch(0)) == 4


def test_two_data_sets_share_a_folder_and_gc_takes_only_orphans(pairs, configured, tmp_path, caplog) -> None:
    mask = 'image_dir = "data/train_A"\nmask_dir = "data/masks"\ninstance_prompt = "red"\nmode = "mask"'
    caching.run(configured())
    caching.run(configured(mask))
    picture(77).save(pairs / "train_A" / "0.png")
    caching.run(configured())
    caching.run(configured(mask))
    assert len(status(configured(mask)).orphaned) == 2
    before = set(Store(tmp_path / "cache").where)
    caching.run(configured(mask, arguments=("--gc",)))
    assert len(before - set(Store(tmp_path / "cache").where)) == 2
    for subset in (EDIT, mask):
        assert len(open_cache(configured(subset)).batch(0)) == 4
        assert not status(configured(subset)).orphaned
    caching.run(configured(arguments=("--verify",)))


def test_gc_leaves_what_a_running_trainer_reads(pairs, configured, tmp_path, caplog) -> None:
    run = configured()
    caching.run(run)
    training = open_cache(run)
    (pairs / "prompts" / "1.txt").write_text("a blue square")
    picture(9).save(pairs / "train_A" / "2.png")
    caching.run(run)
    caplog.set_level("INFO")
    caching.run(configured(arguments=("--gc",)))
    assert "left 2 shards that running trainers (1) read" in caplog.text
    for position in range(3):
        assert len(training.batch(position)) == 4
    training.close()
    assert not list((tmp_path / "cache" / "readers").glob("*.lock"))
    before = len(shards(tmp_path / "cache"))
    caching.run(configured(arguments=("--gc",)))
    assert not status(run).orphaned and len(shards(tmp_path / "cache")) == before
    assert len(open_cache(run).batch(0)) == 4


def test_a_reader_that_was_killed_keeps_nothing(pairs, configured, tmp_path) -> None:
    run = configured()
    caching.run(run)
    code = (
        "import os, sys, signal\nfrom library.config import load\nfrom library.data.cached import open_cache\n"
        "kept = open_cache(load(sys.argv[1:], 'train'))\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    config = ["--config_file", str(tmp_path / "run.toml")]
    subprocess.run([sys.executable, "-c", code, *config], cwd=Path(__file__).parents[2], timeout=120)
    (held,) = (tmp_path / "cache" / "readers").glob("*.json")
    picture(9).save(pairs / "train_A" / "2.png")
    caching.run(run)
    caching.run(configured(arguments=("--gc",)))
    assert not held.exists() and not status(run).orphaned


def test_a_reader_that_begins_during_a_collection_waits_for_its_end(tmp_path) -> None:
    from library.data import readers

    order = []

    def read() -> None:
        order.append(readers.begin(tmp_path) is not None)

    with readers.none_begins(tmp_path) as held:
        assert held.count == 0 and "any" not in held
        thread = threading.Thread(target=read)
        thread.start()
        time.sleep(0.2)
        order.append("collected")
    thread.join(10)
    assert order == ["collected", True]
    reading = readers.begin(tmp_path)
    with readers.none_begins(tmp_path) as held:
        assert held.everything and "any" in held  # it has not said yet
    reading.holds(["text/a"])
    with readers.none_begins(tmp_path) as held:
        assert "text/a" in held and "text/b" not in held
    reading.close()


def test_every_configuration_is_listed_and_can_be_given_up(pairs, configured, tmp_path, caplog) -> None:
    caching.run(configured(dataset="min_bucket_reso = 48"))
    caching.run(configured(dataset="min_bucket_reso = 32", subset=EDIT + "flip_aug = true"))
    run = configured()
    caching.run(run)
    caplog.set_level("INFO")
    caching.run(configured(arguments=("--gc",)))
    assert caplog.text.count("there -> here: datasets[1].min_bucket_reso: ") == 2
    assert "min_bucket_reso: 48 -> null" in caplog.text and "subsets[1].flip_aug: true -> false" in caplog.text
    assert "4 items of train_A; 4 entries that only it names" in caplog.text  # the mirrored ones
    (flipped,) = re.findall(r"(\w{8})  [-\d]+ [:\d]+  4 items of train_A; 4 entries", caplog.text)
    own = config_hash(scope_of(run, Base.open(run.model)).config)[:8]
    for name, reason in (("xyz", "means 0 of them"), (own, "is the present one")):
        with pytest.raises(CacheError, match=f"give_up = {name} {reason}"):
            caching.run(configured(arguments=("--gc", "--give_up", name)))
    before = set(Store(tmp_path / "cache").where)
    caching.run(configured(arguments=("--gc", "--give_up", flipped)))
    assert len(before - set(Store(tmp_path / "cache").where)) == 4
    assert len(list((tmp_path / "cache" / "manifests").iterdir())) == 2
    assert len(open_cache(run).batch(0)) == 4
    open_cache(configured(dataset="min_bucket_reso = 48"))


def test_force_encodes_everything_again(pairs, configured, tmp_path) -> None:
    caching.run(configured())
    old = contents(tmp_path / "cache")
    names = set(shards(tmp_path / "cache"))
    caching.run(configured(arguments=("--force",)))
    store = Store(tmp_path / "cache")
    assert not {tmp_path / "cache" / name for name in store.where.values()} & names
    assert contents(tmp_path / "cache") == old


@pytest.mark.parametrize(
    ("kind", "keep"),
    [("image", 0), ("text", 3), ("image", 8), ("text", 20), ("image", 100), ("text", 0.5), ("image", -1)],
)
def test_a_truncated_shard_is_refused_by_the_trainer_and_rebuilt_by_caching(
    kind, keep, pairs, configured, tmp_path
) -> None:
    run = configured()
    caching.run(run)
    whole = contents(tmp_path / "cache")
    (path,) = (tmp_path / "cache" / kind).rglob("*.safetensors")
    size = path.stat().st_size
    os.truncate(path, size - 1 if keep == -1 else int(keep * size) if isinstance(keep, float) else keep)
    with pytest.raises(CacheError, match="damaged"):
        open_cache(run)
    caching.run(run)
    assert contents(tmp_path / "cache") == whole
    caching.run(configured(arguments=("--gc",)))
    assert not Store(tmp_path / "cache").broken


def test_a_flipped_byte_is_found_by_verify_and_mended(pairs, configured, tmp_path) -> None:
    run = configured()
    caching.run(run)
    whole = contents(tmp_path / "cache")
    draw = random.Random(0)
    for _ in range(3):
        path = draw.choice(shards(tmp_path / "cache"))
        content = bytearray(path.read_bytes())
        content[draw.randrange(len(content) // 2, len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        with pytest.raises(CacheError, match="set aside"):
            caching.run(configured(arguments=("--verify",)))
        caching.run(run)
        assert contents(tmp_path / "cache") == whole
        assert caching.run(configured(arguments=("--verify",))) == 0


@pytest.mark.parametrize("name", ["index.json", "files.json", "identities.json"])
@pytest.mark.parametrize("content", [None, b"{", b'{"version": 99}'])
def test_catalogues_can_be_lost(name, content, pairs, configured, tmp_path, monkeypatch) -> None:
    run = configured()
    caching.run(run)
    path = tmp_path / "cache" / name
    path.unlink() if content is None else path.write_bytes(content)
    assert len(open_cache(run).items) == 4
    path.unlink(missing_ok=True) if content is None else path.write_bytes(content)
    monkeypatch.setattr(Base, "load_vae", None)
    monkeypatch.setattr(Base, "load_text_encoders", None)
    assert caching.run(run) == 0


def test_a_damaged_manifest_is_said_and_rewritten(pairs, configured, tmp_path) -> None:
    run = configured()
    caching.run(run)
    (path,) = (tmp_path / "cache" / "manifests").iterdir()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CacheError, match="cannot be read"):
        open_cache(run)
    caching.run(run)
    open_cache(run)


def test_status_changes_nothing(pairs, configured, tmp_path) -> None:
    caching.run(configured())
    before = {path: path.stat().st_mtime_ns for path in shards(tmp_path / "cache")}
    time.sleep(0.01)
    picture(5).save(pairs / "train_A" / "0.png")
    assert caching.run(configured(arguments=("--status",))) == 0
    assert before == {path: path.stat().st_mtime_ns for path in shards(tmp_path / "cache")}


def test_a_file_that_changes_while_it_is_cached_is_an_error(pairs, configured, monkeypatch) -> None:
    command = import_module("library.caching.run")
    looked = command.plan_of

    def look_then_change(session, **options):
        plan = looked(session, **options)
        picture(60).save(pairs / "train_B" / "3.png")
        return plan

    monkeypatch.setattr(command, "plan_of", look_then_change)
    with pytest.raises(DataError, match=r"train_B/3\.png was changed"):
        caching.run(configured())


def test_a_full_disk_is_refused_before_anything_is_encoded(pairs, configured, monkeypatch) -> None:
    import shutil
    from collections import namedtuple

    from library.errors import DiskError

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**6))
    monkeypatch.setattr(Base, "load_text_encoders", None)
    with pytest.raises(DiskError, match="the cache needs about") as error:
        caching.run(configured())
    assert error.value.exit_code == 5


def test_a_disk_that_fills_up_while_encoding_is_a_plain_error(pairs, configured, tmp_path) -> None:
    resource = pytest.importorskip("resource")
    from library.errors import DiskError

    run = configured()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # captions fit, the shard of images does not
    try:
        with pytest.raises(DiskError, match=r"cannot write .*\.safetensors: File too large") as error:
            caching.run(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.exit_code == 5
    caching.run(run)
    assert len(open_cache(run).items) == 4


def test_a_folder_that_cannot_be_written_is_found_first(pairs, configured, tmp_path, monkeypatch) -> None:
    from library.errors import DiskError

    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.setattr(Base, "load_text_encoders", None)
    with pytest.raises(DiskError):
        caching.run(configured())


def test_an_item_of_every_kind_of_name_has_its_own_entry(configured, tmp_path) -> None:
    write_pairs(tmp_path / "data")
    (tmp_path / "data" / "train_A" / "below").mkdir()
    for folder in ("train_A", "train_B", "prompts"):
        (tmp_path / "data" / folder / "below").mkdir(exist_ok=True)
    picture(30).save(tmp_path / "data" / "train_A" / "below" / "0.png")
    picture(31).save(tmp_path / "data" / "train_B" / "below" / "0.png")
    (tmp_path / "data" / "prompts" / "below" / "0.txt").write_text("another")
    run = configured(EDIT + "recursive = true")
    caching.run(run)
    dataset = open_cache(run)
    assert len(dataset.items) == 5 and len({item.sizes[0][0] for item in dataset.items}) == 5


def test_the_resolved_configuration_lies_beside_the_manifest(pairs, configured, tmp_path) -> None:
    """It loads again to the same data; it goes when the configuration is given up."""
    run = configured()
    caching.run(run)
    (path,) = (tmp_path / "cache/configurations").glob("*.toml")
    text = path.read_text(encoding="utf-8")
    assert "run.toml:" in text and "dataset_cache_dir" in text
    again = load(["--config_file", str(path)], "cache")
    assert again.datasets == run.datasets
    caching.run(configured(dataset="flip_aug = true"))
    caching.run(configured(dataset="flip_aug = true", arguments=("--gc", "--give_up", path.stem[:8])))
    assert not path.exists() and len(list((tmp_path / "cache/configurations").glob("*.toml"))) == 1
