"""Previews are cached with the data: prompts in kohya's formats, conditions as inference would make them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from library import caching
from library.caching.run import plan_of
from library.caching.session import Session
from library.conditioning import MODES, ModeSettings
from library.config.tables import SamplingTable
from library.data.cached import open_cache
from library.data.pixels import to_tensor
from library.data.prompts import parse_line, preview_requests
from library.data.scope import encodings, scope_of
from library.data.store import Store
from library.errors import CacheError, ConfigError, DataError
from library.models.base import Base
from tests.caching.conftest import EDIT, SIDE, picture

LINE = "a red circle, --ish --w 64 --h 48 --d 7 --s 9 --g 12.5 --l 1.5 --n blurred --ci data/in.png --mask data/m.png"


def test_a_line_in_kohyas_format() -> None:
    request = parse_line(LINE.replace(" --ish", ""), Path("/x"))
    assert request.prompt == "a red circle," and request.negative == "blurred"
    assert (request.width, request.height, request.seed, request.steps) == (64, 48, 7, 9)
    assert (request.guidance, request.cfg_scale) == (12.5, 1.5)
    assert (request.image, request.mask) == (Path("/x/data/in.png"), Path("/x/data/m.png"))


@pytest.mark.parametrize("line", [LINE, "a --w many", "a --h 8", "a --s 0", "a --ci", "a --d 1.5"])
def test_what_is_no_option_is_refused(line: str) -> None:
    with pytest.raises(ValueError):
        parse_line(line, Path("."))


def test_the_three_formats_say_the_same(tmp_path) -> None:
    (tmp_path / "p.txt").write_text("# comment\n\na --w 64 --d 1\nb --w 32 --g 2\n")
    (tmp_path / "p.toml").write_text(
        "[prompt]\nwidth = 64\n[[prompt.subset]]\nprompt = 'a'\nseed = 1\n"
        "[[prompt.subset]]\nprompt = 'b'\nwidth = 32\nguidance_scale = 2.0\n"
    )
    content = [{"prompt": "a", "width": 64, "seed": 1}, {"prompt": "b", "width": 32, "guidance_scale": 2}]
    (tmp_path / "p.json").write_text(json.dumps(content))
    found = {
        preview_requests(SamplingTable(sample_prompts=tmp_path / f"p.{ending}")) for ending in ("txt", "toml", "json")
    }
    assert len(found) == 1 and len(found.pop()) == 2


def test_everything_wrong_in_a_prompt_file_is_listed_at_once(tmp_path) -> None:
    (tmp_path / "p.txt").write_text("a --w 8\nb --ci nowhere.png\nc --zz 1\n")
    with pytest.raises(DataError, match=r"(?s)3 things.*line 1.*line 3.*nowhere\.png"):
        preview_requests(SamplingTable(sample_prompts=tmp_path / "p.txt"))


def test_validation_lists_are_spread(tmp_path) -> None:
    picture(1).save(tmp_path / "a.png")
    table = SamplingTable(validation_prompt=("x", "y"), validation_image=(tmp_path / "a.png",), num_validation_images=2)
    assert [(one.prompt, one.copy) for one in preview_requests(table)] == [("x", 0), ("x", 1), ("y", 0), ("y", 1)]
    with pytest.raises(ConfigError, match="validation_prompt has 2"):
        preview_requests(SamplingTable(validation_prompt=("x", "y"), validation_mask=(tmp_path / "a.png",) * 3))


def test_previews_are_encoded_as_inference_would(pairs, configured, tmp_path, monkeypatch) -> None:
    (tmp_path / "p.txt").write_text("red circle --ci data/train_A/0.png --n blue --d 5\n")
    rest = '[sampling]\nsample_prompts = "p.txt"'
    run = configured(rest=rest)
    caching.run(run)
    (preview,) = open_cache(run).previews
    item = MODES["edit"].request(to_tensor(picture(0)), None, ModeSettings())
    latents, _ = Base.open(run.model).load_vae(parts="encoder").encode(item.condition_pixels()[None])
    torch.testing.assert_close(preview.condition.latents.float(), latents, atol=0.02, rtol=0.02)
    assert preview.condition.mask.min() == 1 and preview.condition.mask.shape == (1, 1, SIDE, SIDE)
    assert preview.request.seed == 5 and preview.negative is not None and preview.mode == "edit"
    monkeypatch.setattr(Base, "load_vae", None)
    monkeypatch.setattr(Base, "load_text_encoders", None)
    caching.run(run)  # nothing left to encode
    (tmp_path / "p.txt").write_text("green circle --ci data/train_A/0.png\n")
    with pytest.raises(CacheError, match="sample prompts"):
        open_cache(run)


@pytest.mark.parametrize(
    ("mode", "line", "reason"),
    [
        ("edit", "a", "needs a condition image"),
        ("spatial", "a", "needs a condition image"),
        ("mask", "a --ci data/train_A/0.png", "needs a mask"),
        ("mask", "a --mask data/masks/0.png", "without --ci"),
        ("edit", "a --ci data/train_A/0.png --mode paint", "unknown"),
    ],
)
def test_previews_that_cannot_be_made_are_refused(mode, line, reason, pairs, configured, tmp_path) -> None:
    (tmp_path / "p.txt").write_text(line + "\n")
    subset = EDIT.replace('"edit"', f'"{mode}"') + ('mask_dir = "data/masks"' if mode == "mask" else "")
    with pytest.raises(DataError, match=reason):
        caching.run(configured(subset, rest='[sampling]\nsample_prompts = "p.txt"'))


def test_a_mask_preview_without_an_image_paints_from_the_prompt(pairs, configured, tmp_path) -> None:
    (tmp_path / "p.txt").write_text("red --w 64 --h 32\n")
    subset = 'image_dir = "data/train_A"\nmask_dir = "data/masks"\ninstance_prompt = "red"\nmode = "mask"'
    run = configured(subset, rest='[sampling]\nsample_prompts = "p.txt"')
    caching.run(run)
    (preview,) = open_cache(run).previews
    assert preview.condition.mask.shape == (1, 1, 32, 64) and preview.condition.mask.min() == 1


def test_what_is_wrong_with_data_and_previews_is_one_report(pairs, configured, tmp_path) -> None:
    """skip_bad is offered for items alone: a preview is not gone on without."""
    (pairs / "train_A" / "2.png").write_bytes(b"no picture")
    (pairs / "train_A" / "0.txt").write_text("x")
    (tmp_path / "p.txt").write_text(
        "a --ci nowhere.png\nb --zz 1\nc --ci data/train_A/0.txt\nd --ci data/train_A/1.png\n"
    )
    rest = '[sampling]\nsample_prompts = "p.txt"'
    with pytest.raises(DataError) as error:
        caching.run(configured(rest=rest))
    message = str(error.value)
    assert message.startswith("4 things that cannot be used") and "not without previews" in message
    assert all(part in message for part in ("train_A/2.png", "nowhere.png", "p.txt line 2", "preview 1 (c), 0.txt"))
    with pytest.raises(DataError) as error:
        caching.run(configured(rest=rest, arguments=("--skip_bad",)))
    assert str(error.value).startswith("3 things") and "skip_bad" not in str(error.value)
    (tmp_path / "p.txt").write_text("d --ci data/train_A/1.png\n")
    with pytest.raises(DataError, match=r"(?s)^1 thing.*train_A/2\.png.*or set skip_bad = true"):
        caching.run(configured(rest=rest))
    caching.run(configured(rest=rest, arguments=("--skip_bad",)))


def test_previews_have_the_background_and_the_masks_of_the_data(pairs, configured, tmp_path) -> None:
    from library.data.pixels import preview_item

    source = picture(0)
    source.putalpha(Image.new("L", (SIDE, SIDE), 0))
    source.save(tmp_path / "clear.png")
    (tmp_path / "p.txt").write_text("red --ci clear.png --mask data/masks/0.png\n")
    rest = '[sampling]\nsample_prompts = "p.txt"'
    items, entries = {}, set()
    for keys in ("", 'background_color = "#ff0000"\n', "invert_mask = true\n"):
        run = configured(EDIT + 'mask_dir = "data/masks"\n' + keys, rest=rest)
        base = Base.open(run.model)
        scope = scope_of(run, base)
        scope.folder.mkdir(exist_ok=True)
        (preview,) = plan_of(Session(run, base, scope, Store(scope.folder), *encodings(run, base, scope), 1)).previews
        items[keys[:6]] = preview_item(preview)
        entries.add(preview.fingerprint)
    assert len(entries) == 3
    assert (items[""].condition_pixels() == 1).all()
    red = items["backgr"].condition_pixels()
    assert (red[0] == 1).all() and (red[1:] == -1).all()
    assert torch.equal(items["invert"].mask, 1 - items[""].mask)


def test_a_mask_that_no_mode_takes_is_said(pairs, configured, tmp_path, caplog) -> None:
    caplog.set_level("INFO")
    (tmp_path / "p.txt").write_text("red --ci data/train_A/0.png --mask data/masks/0.png\n")
    rest = '[sampling]\nsample_prompts = "p.txt"'
    caching.run(configured(EDIT.replace('"edit"', '"spatial"'), rest=rest))
    assert "preview 1 (red): its mask does nothing here: mode spatial makes its own" in caplog.text
    caplog.clear()
    run = configured(EDIT.replace('"edit"', '"spatial"') + "---" + EDIT, rest=rest)
    caching.run(run)
    assert [one.mode for one in open_cache(run).previews] == ["edit"] and "its mask" not in caplog.text


def test_two_experiments_share_a_cache(pairs, configured, tmp_path, monkeypatch) -> None:
    """One with previews and one without, cached in turn: neither takes from the other. --force forgets the others."""
    (tmp_path / "p.txt").write_text("red circle --ci data/train_A/0.png\nblue --ci data/train_A/1.png\n")
    (tmp_path / "q.txt").write_text("blue --ci data/train_A/1.png\n")

    def prompted(name: str, *words: str):
        return configured(rest=f'[sampling]\nsample_prompts = "{name}"' if name else "", arguments=words)

    def painted(name: str) -> list[str]:
        dataset = open_cache(prompted(name))
        try:
            return [preview.request.prompt for preview in dataset.previews]
        finally:
            dataset.close()

    caching.run(prompted("p.txt"))
    assert painted("") == [], "prompts of another run are none of this one"
    monkeypatch.setattr(Base, "load_vae", None)
    monkeypatch.setattr(Base, "load_text_encoders", None)
    for name in ("", "q.txt", "p.txt"):
        caching.run(prompted(name))  # nothing is left to encode
        assert painted("p.txt") == ["red circle", "blue"] and painted("q.txt") == ["blue"] and painted("") == []
    monkeypatch.undo()
    (tmp_path / "r.txt").write_text("gone --ci extra.png\n")
    picture(50).save(tmp_path / "extra.png")
    caching.run(prompted("r.txt"))
    (tmp_path / "extra.png").unlink()
    caching.run(prompted(""))  # a condition of another run that is no more keeps nobody from caching
    assert painted("p.txt") == ["red circle", "blue"]
    caching.run(prompted("", "--force"))
    with pytest.raises(CacheError, match="lacks 1 of the 1 sample prompts"):
        open_cache(prompted("q.txt"))
