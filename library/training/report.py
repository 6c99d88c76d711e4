"""report.html: one self-contained page in the output folder, rewritten during the run.

Made from metrics.jsonl and the preview files alone, so that it can be made again at any time, by any program.
"""

import base64
import datetime
import io
import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from library.files import atomic_write

FILE = "report.html"
TEMPLATE = Path(__file__).with_name("report_page.html")
MAX_POINTS = 1500  # per curve: more cannot be seen, and the page is rewritten often
PICTURE_SIDE = 512
_SCORE_NAMES = {
    "validation_psnr": "Held-out pictures: PSNR, dB",
    "validation_ssim": "Held-out pictures: SSIM",
    "validation_colour_distance": "Held-out pictures: colour distance",
    "validation_lpips": "Held-out pictures: LPIPS",
}
MAX_ROWS = 40  # preview rows in the page; the files keep all


@dataclass(frozen=True)
class Column:
    """One preview prompt: what it says, the picture it starts from and the one it should become, where there is one."""

    prompt: str
    source: Path | None = None
    target: Path | None = None


@dataclass(frozen=True)
class Row:
    """The previews of one step, one file per column; None where there is none."""

    step: int
    cells: tuple[Path | None, ...]


@dataclass(frozen=True)
class Page:
    """Everything the page shows."""

    name: str
    status: str
    step: int
    total: int
    metrics: list[dict]
    columns: tuple[Column, ...] = ()
    rows: tuple[Row, ...] = ()
    dataset: tuple[tuple[str, str], ...] = ()
    configuration: tuple[tuple[str, str, str], ...] = ()


def write(folder: Path, page: Page) -> Path:
    """Write the page to `folder`."""
    path = folder / FILE
    # "<" inside the JSON would end the script element; JSON may spell it as an escape
    spelled = json.dumps(_values(page), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    atomic_write(path, TEMPLATE.read_text(encoding="utf-8").replace("/*DATA*/", spelled))
    return path


def _values(page: Page) -> dict:
    rows = _thinned(list(page.rows), MAX_ROWS)
    return {
        "name": page.name,
        "status": page.status,
        "step": page.step,
        "total": page.total,
        "updated": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        "tiles": _tiles(page.metrics),
        "charts": _charts(page.metrics),
        "previews": {
            "columns": [
                {"prompt": c.prompt, "source": _picture(c.source), "target": _picture(c.target)} for c in page.columns
            ],
            "rows": [{"step": row.step, "cells": [_picture(cell) for cell in row.cells]} for row in rows],
        },
        "dataset": page.dataset,
        "configuration": page.configuration,
    }


def _tiles(metrics: list[dict]) -> list[tuple[str, str]]:
    latest: dict = {}
    for line in metrics:
        latest.update(line)
    shown = (
        ("average loss", "loss_average", "{:.4f}"),
        ("seconds per step", "seconds", "{:.2f}"),
        ("peak GPU memory", "vram_gb", "{:.1f} GB"),
        ("validation loss", "validation_loss", "{:.4f}"),
        ("steps skipped", "skipped", "{:d}"),
    )
    return [(label, form.format(latest[key])) for label, key, form in shown if key in latest]


def _charts(metrics: list[dict]) -> list[dict]:
    names = sorted({name for line in metrics for name in line})
    wanted = [
        ("Loss", ["loss"], True),
        ("Learning rate", [name for name in names if name.startswith("lr/")], False),
        ("Validation loss", [name for name in names if name.startswith("validation_loss")], False),
        *((_SCORE_NAMES.get(name, name), [name], False) for name in names if _is_score(name)),
        ("Gradient norm", ["gradient_norm"], True),
        ("Seconds per step", ["seconds"], True),
        ("Peak GPU memory, GB", ["vram_gb"], False),
    ]
    charts = []
    for title, series, smooth in wanted:
        curves = [{"name": name, "points": _curve(metrics, name)} for name in series]
        curves = [curve for curve in curves if curve["points"]]
        if curves:
            charts.append({"title": title, "series": curves, "smooth": smooth})
    return charts


def _is_score(name: str) -> bool:
    return name.startswith("validation_") and not name.startswith("validation_loss")


def _curve(metrics: list[dict], name: str) -> list[tuple[int, float]]:
    points = [(line["step"], line[name]) for line in metrics if isinstance(line.get(name), int | float)]
    return _thinned([point for point in points if abs(point[1]) < float("inf")], MAX_POINTS)


def _thinned(values: list, most: int) -> list:
    """At most `most` of the values, evenly spread, the last one among them."""
    if len(values) <= most:
        return values
    return [values[round(index * (len(values) - 1) / (most - 1))] for index in range(most)]


def _picture(path: Path | None) -> str | None:
    if path is None or not path.exists():
        return None
    with Image.open(path) as image:
        small = image.convert("RGB")
        small.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
