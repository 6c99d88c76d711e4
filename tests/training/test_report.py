"""The page in a real browser: rows, filter, slider, curves, and no error on the console."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from library.training.report import Column, Page, Row, write

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None and os.environ.get("INFLUX_REQUIRE_CHROMIUM") != "1", reason="chromium is not installed"
)
INJECTION = '</script><script>document.title="owned"</script><img src=x onerror=alert(1)>'


def page(folder: Path) -> Path:
    """A run with curves, previews, and a caption that tries to be code."""
    pictures = []
    for index, colour in enumerate(["#aa3333", "#3333aa", "#33aa33", "#aaaa33"]):
        path = folder / f"{index}.png"
        Image.new("RGB", (96, 64), colour).save(path)
        pictures.append(path)
    metrics = [
        {"step": s, "loss": 1 / s, "loss_average": 1 / s, "lr/transformer": 1e-4, "seconds": 0.5, "skipped": 0}
        for s in range(1, 301)
    ] + [{"step": 300, "validation_loss": 0.3, "validation_loss_changed": 0.5}]
    return write(
        folder,
        Page(
            name="my <b>run</b>",
            status="running",
            step=300,
            total=1000,
            metrics=metrics,
            columns=(Column(INJECTION, pictures[0], pictures[1]), Column("a second prompt")),
            rows=(Row(100, (pictures[2], None)), Row(200, (pictures[3], pictures[2]))),
            dataset=(("items", "12"), ("buckets", "64x64: 12")),
            configuration=(
                ("network_dim", "32", "run.toml:4"),
                ("network_alpha", "None", "default"),
                ("learning_rate", "0.0001", "--learning_rate"),
            ),
        ),
    )


def browse(path: Path, view: str = "", *extra: str) -> tuple[str, str]:
    """(DOM after its scripts ran, console) of the page in headless Chromium."""
    assert CHROMIUM is not None, "INFLUX_REQUIRE_CHROMIUM=1, but there is no chromium"
    done = subprocess.run(
        [
            CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
            "--virtual-time-budget=4000", f"--user-data-dir={path.parent / 'profile'}", "--window-size=1200,1700",
            *extra, f"file://{path}{view}",
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@needs_chromium
def test_the_page_shows_everything_without_errors(tmp_path):
    """Rows, cells, charts and tiles are there; the caption stayed a caption."""
    dom, console = browse(page(tmp_path), "", "--dump-dom")
    assert 'data-ready="yes"' in dom
    assert console == ""
    assert "<title>my &lt;b&gt;run&lt;/b&gt;" in dom
    pictures = re.search(r'<table id="pictures">.*?</table>', dom, re.S)[0]
    assert re.findall(r"<th>(source|target|step \d+)</th>", pictures) == ["source", "target", "step 100", "step 200"]
    assert pictures.count('<img src="data:image/jpeg') == 5
    assert "&lt;/script&gt;" in pictures
    assert "onerror=alert" not in pictures.replace("&lt;img src=x onerror=alert(1)&gt;", "")
    charts = re.findall(r"<h3>(.*?)</h3>", dom)
    assert charts == ["Loss", "Learning rate", "Validation loss", "Seconds per step"]
    assert dom.count("<svg") == 4
    assert "step 300 of 1000" in dom


@needs_chromium
def test_slider_and_filter_follow_the_view(tmp_path):
    """What a click or a drag sets can also be linked to; the DOM holds it."""
    dom, console = browse(page(tmp_path), "#slider=30&filter=network&changed=1&smoothing=0", "--dump-dom")
    assert console == ""
    assert "clip-path: inset(0px 70% 0px 0px)" in dom
    assert 'id="edge" style="left: 30%;"' in dom
    rows = re.findall(r'<tr data-key="(\w+)" data-origin="[^"]*"( hidden="")?>', dom)
    assert [(key, hidden == "") for key, hidden in rows] == [
        ("network_dim", True),
        ("network_alpha", False),
        ("learning_rate", False),
    ]
    assert "1 of 3" in dom


def test_the_page_needs_nothing_from_outside(tmp_path):
    """No address of another file or server in it: it can be mailed."""
    text = page(tmp_path).read_text(encoding="utf-8")
    outside = [url for url in re.findall(r"(?:https?:)?//[\w.]+\.\w+[^\s\"']*", text) if "www.w3.org" not in url]
    assert outside == []
    assert not re.search(r'(?:src|href)="(?!data:)', text)
