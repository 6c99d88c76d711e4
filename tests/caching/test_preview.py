"""--preview and --lint as commands: the page shows what lies in the cache, beside what the data set is warned of."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library import caching
from library.data.cached import open_cache
from library.data.reader import Reader
from library.errors import ConfigError, DiskError
from library.models.base import Base
from tests.caching.conftest import EDIT, SIDE, picture


def read_page(path: Path) -> tuple[dict, list[dict | None]]:
    """The page's data, and the pictures of each item."""
    found = dict(re.findall(r'<script type="application/json" id="([\w-]+)">(.*?)</script>', path.read_text(), re.S))
    data = json.loads(found["data"])
    chunks = {int(name.split("-")[1]): json.loads(text) for name, text in found.items() if name != "data"}
    places = [item["place"] for item in data["items"]]
    return data, [place and chunks[place[0]][place[1]] for place in places]


def pixels(uri: str) -> np.ndarray:
    """A data URI as an array."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))))


def close(uri: str, decoded: torch.Tensor) -> bool:
    """Whether a picture of the page is a decoded one (1, 3, H, W), but for its compression."""
    expected = ((decoded[0].permute(1, 2, 0) + 1) * 127.5).numpy()
    shown = pixels(uri)
    assert shown.shape == expected.shape
    blocks = (shown - expected).reshape(SIDE // 8, 8, -1, 8, 3).mean(axis=(1, 3))
    return float(np.abs(blocks).mean()) < 4


@pytest.fixture
def preview(configured, tmp_path: Path):
    """A function from a configuration to the Run of --preview out.html."""

    def make(*arguments: str, **tables: str):
        return configured(arguments=("--preview", str(tmp_path / "out.html"), *arguments), **tables)

    return make


def test_pictures_are_decoded_from_the_cache(pairs, preview, tmp_path) -> None:
    run = preview(subset=EDIT + 'mask_dir = "data/masks"')
    assert caching.run(run) == 0
    data, pictures = read_page(tmp_path / "out.html")
    dataset = open_cache(run)
    vae = Base.open(run.model).load_vae(parts="decoder")
    assert [item["name"] for item in data["items"]] == [item.key for item in dataset.items]
    for item, shown in zip(dataset.items, pictures, strict=True):
        entry = dataset.reader.entry(item.sizes[0][0])
        assert close(shown["target"], vae.decode(entry["target.mean"][None]))
        assert close(shown["views"][0]["condition"], vae.decode(entry["condition.0"][None]))
        assert not close(shown["target"], vae.decode(entry["condition.0"][None]))
        mask = np.unpackbits(entry["mask.0"].numpy(), axis=-1) * 255
        assert np.array_equal(pixels(shown["views"][0]["mask"]), mask)
        assert np.array_equal(pixels(shown["changed"]), entry["changed"].numpy())


def test_the_page_shows_the_bytes_of_the_cache_not_the_files(pairs, preview, tmp_path, monkeypatch) -> None:
    run = preview()
    caching.run(run)
    _, before = read_page(tmp_path / "out.html")
    read = Reader.read

    def swapped(self, fingerprint, part, out=None):
        return read(self, fingerprint, {"target.mean": "condition.0"}.get(part, part), out)

    monkeypatch.setattr(Reader, "read", swapped)
    caching.run(run)
    _, after = read_page(tmp_path / "out.html")
    assert after[0]["target"] == before[0]["views"][0]["condition"] != before[0]["target"]


def test_spatial_shows_every_condition_variant(pairs, preview, tmp_path) -> None:
    caching.run(preview(subset=EDIT.replace('"edit"', '"spatial"')))
    data, pictures = read_page(tmp_path / "out.html")
    assert data["items"][0]["sizes"] == [[2 * SIDE, SIDE]] and data["items"][0]["masks"] == 2
    right, left = (pixels(view["mask"]) for view in pictures[0]["views"])
    assert right[:, SIDE:].min() == 255 and right[:, :SIDE].max() == 0
    assert np.array_equal(left, 255 - right)
    assert pictures[0]["views"][0]["condition"] != pictures[0]["views"][1]["condition"]


def test_an_edit_mask_of_half_is_shown_grey(pairs, preview, tmp_path) -> None:
    caching.run(preview(subset=EDIT + "edit_mask_value = 0.5"))
    _, pictures = read_page(tmp_path / "out.html")
    assert set(pixels(pictures[0]["views"][0]["mask"]).ravel()) == {128}


@pytest.mark.parametrize("latents_as", ["sample", "mean"])
def test_every_form_of_target_latents_is_shown(latents_as: str, pairs, preview, tmp_path) -> None:
    caching.run(preview(rest=f'cache_latents_as = "{latents_as}"'))
    _, pictures = read_page(tmp_path / "out.html")
    assert pixels(pictures[0]["target"]).shape == (SIDE, SIDE, 3)


def test_warnings_captions_and_numbers_stand_beside_the_pictures(pairs, preview, tmp_path) -> None:
    picture(0).save(pairs / "train_B" / "0.png")
    (pairs / "prompts" / "1.txt").write_text("red circle " * 40 + "teal square")
    picture(5, 24, 24).save(pairs / "train_A" / "2.png")
    picture(6, 24, 24).save(pairs / "train_B" / "2.png")
    caching.run(preview())
    data, _ = read_page(tmp_path / "out.html")
    kinds = [[kind for kind, _ in item["warnings"]] for item in data["items"]]
    assert kinds == [["identical"], ["long_caption"], ["enlarged"], []]
    caption, lost = data["items"][1]["captions"][0]
    assert caption.endswith("teal square") and lost.endswith("teal square") and caption.endswith(lost.strip())
    assert data["items"][0]["changed"] == 0.0 and data["items"][3]["changed"] > 0.5
    assert data["items"][2]["enlarged"] == pytest.approx(SIDE / 24, abs=0.01)


def test_only_so_many_pictures_and_those_with_warnings_first(pairs, preview, tmp_path, caplog) -> None:
    picture(3).save(pairs / "train_B" / "3.png")
    with caplog.at_level("INFO", "influx"):
        caching.run(preview("--preview_items", "2"))
    data, pictures = read_page(tmp_path / "out.html")
    assert len(data["items"]) == 4 and data["pictures"] == 2
    assert [shown is not None for shown in pictures] == [True, False, False, True]
    assert "pictures of 2 of 4 items" in caplog.text


def test_a_page_that_cannot_be_written_is_refused_before_anything_is_encoded(pairs, configured, tmp_path) -> None:
    (tmp_path / "file").write_text("no folder")
    for path, error in ((tmp_path / "data", ConfigError), (tmp_path / "file" / "out.html", DiskError)):
        with pytest.raises(error, match=str(path if error is ConfigError else path.parent)):
            caching.run(configured(arguments=("--preview", str(path))))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_fresh_cache_is_shown_without_encoding(pairs, configured, preview, tmp_path, monkeypatch) -> None:
    caching.run(configured())
    loaded = []
    load_vae = Base.load_vae
    monkeypatch.setattr(Base, "load_text_encoders", None)
    monkeypatch.setattr(Base, "load_vae", lambda *a, **k: loaded.append(k["parts"]) or load_vae(*a, **k))
    caching.run(preview())
    assert loaded == ["decoder"] and (tmp_path / "out.html").is_file()


def test_the_real_page_opens_without_errors(pairs, preview, tmp_path, browser) -> None:
    picture(0).save(pairs / "train_B" / "0.png")
    caching.run(preview(subset=EDIT + "flip_aug = true\n---" + EDIT.replace('"edit"', '"spatial"')))
    tab = browser.open(tmp_path / "out.html")
    tab.wait_for("document.querySelectorAll('.card[data-filled]').length === 8")
    tab.wait_for("[...document.images].filter(i => i.src).every(i => i.naturalWidth > 0)")
    assert tab.evaluate("count.textContent") == "8 of 8 items"
    tab.click('#kinds button[data-kind="identical"]')
    assert tab.evaluate("count.textContent") == "2 of 8 items"
    assert tab.errors == []
    tab.close()


def test_lint_needs_no_cache_and_no_encoder(pairs, configured, tmp_path, monkeypatch, capsys) -> None:
    picture(0).save(pairs / "train_B" / "0.png")
    monkeypatch.setattr(Base, "load_vae", None)
    monkeypatch.setattr(Base, "load_text_encoders", None)
    (pairs / "prompts" / "1.txt").write_text("red circle " * 40 + "teal square")
    assert caching.run(configured(arguments=("--lint",))) == 0
    assert not (tmp_path / "cache").exists()
    printed = capsys.readouterr().out
    assert "identical: " in printed and "long_caption: " in printed and 'T5 does not see "' in printed
    assert caching.run(configured(arguments=("--lint", "--strict"))) == 1


def test_lint_and_preview_warn_of_the_same(pairs, configured, preview, tmp_path) -> None:
    picture(0).save(pairs / "train_B" / "0.png")
    (pairs / "prompts" / "1.txt").write_text("red circle " * 40 + "teal square")
    report = tmp_path / "lint.json"
    caching.run(configured(arguments=("--lint", "--lint_json", str(report))))
    caching.run(preview())
    data, _ = read_page(tmp_path / "out.html")
    in_page = {(item["name"], kind, text) for item in data["items"] for kind, text in item["warnings"]}
    findings = json.loads(report.read_text())["findings"]
    assert in_page == {(one["item"], one["kind"], one["message"]) for one in findings} and len(in_page) == 2
