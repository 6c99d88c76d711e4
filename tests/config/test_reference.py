"""The generated pages are current and complete, and the editor schema accepts what the loader accepts."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from library.config import catalogue
from library.config.reference import home_of, pages, schema, seed_default
from library.config.rewrites import REWRITES
from library.config.seed_options import SEED_OPTIONS

DOCS = Path(__file__).parents[2] / "docs"
EXAMPLES = sorted((DOCS.parent / "config_examples").rglob("*.toml"))


@pytest.mark.parametrize("path", pages(DOCS), ids=lambda path: path.name)
def test_the_committed_page_is_what_the_declarations_say(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == pages(DOCS)[path], "run: python -m library.config.reference"


def test_the_reference_names_every_key_and_alias() -> None:
    page = (DOCS / "configuration.md").read_text(encoding="utf-8")
    for name in (*catalogue.declared(), *catalogue.aliases(), *REWRITES):
        assert f"`{name}`" in page, name


def test_the_page_of_87_options_has_a_row_for_each() -> None:
    page = (DOCS / "seed_options.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `--")]
    assert [row.split("`")[1].removeprefix("--") for row in rows] == list(SEED_OPTIONS)
    assert len(rows) == 87
    assert all(row.count(" | ") == 5 and row.split(" | ")[1].startswith("`") for row in rows)


def test_a_default_that_differs_from_the_seed_is_told() -> None:
    """Every default of an option is the seed's, but for these, and the reference says so."""
    differing = {
        option
        for option in SEED_OPTIONS
        if option not in REWRITES and seed_default(home_of(option)) is not None
    }  # fmt: skip
    assert differing == {"max_sequence_length", "cache_latents", "size", "validation_width", "validation_height"}


def accepts(rule: dict[str, Any], value: object, root: dict[str, Any]) -> bool:
    """As much of JSON schema as the generated file uses."""
    if "$ref" in rule:
        return accepts(root["$defs"][rule["$ref"].rpartition("/")[2]], value, root)
    if "anyOf" in rule:
        return any(accepts(option, value, root) for option in rule["anyOf"])
    kind = rule.get("type")
    if kind == "object":
        properties = rule["properties"]
        return isinstance(value, dict) and all(
            name in properties and accepts(properties[name], entry, root) for name, entry in value.items()
        )
    if kind == "array":
        entries = rule.get("prefixItems") or [rule.get("items", {})] * (len(value) if isinstance(value, list) else 0)
        return isinstance(value, list) and all(accepts(*pair, root) for pair in zip(entries, value, strict=True))
    kinds: dict[str, tuple[type, ...]] = {
        "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,),
    }  # fmt: skip
    if kind and (not isinstance(value, kinds[kind]) or (isinstance(value, bool) and kind != "boolean")):
        return False
    if "enum" in rule or "const" in rule:
        return value in rule.get("enum", [rule.get("const")])
    return not isinstance(value, (int, float)) or value >= rule.get("minimum", value)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_schema_accepts_the_shipped_examples(path: Path) -> None:
    made = schema()
    assert accepts(made, tomllib.loads(path.read_text(encoding="utf-8")), made), path


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("rank = 4\n[network]\nnetwork_alpha = 4\n", True),
        ("rnk = 4\n", False),
        ('rank = "4"\n', False),
        ("rank = 0\n", False),
        ("[optimizer]\nrank = 4\n", False),
        ("resolution = [512, 768]\nresolutions = [512]\nreport_to = 'wandb'\n", True),
        ("[[datasets]]\nresolution = 512\nflip_aug = true\n[[datasets.subsets]]\nimage_dir = 'x'\n", True),
        ("[[datasets]]\n[[datasets.subsets]]\nresolution = 512\n", False),
        ("timestep_sampling = 'flux_shift'\nblocks_to_swap = 'all'\ncheckpointing_steps = 5\n", True),
        ("timestep_sampling = 'flux'\n", False),
        ("dry_run = true\n", False),
        ("[dataset]\ndataset_config = 'x.toml'\nuse_split_mask = true\n", True),
    ],
)
def test_the_schema_knows_right_from_wrong(text: str, fits: bool) -> None:
    made = json.loads((DOCS / "config.schema.json").read_text(encoding="utf-8"))
    assert accepts(made, tomllib.loads(text), made) is fits
