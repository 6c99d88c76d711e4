"""Every key against every kind of wrong value, made from the declarations: refused, with the key and the line."""

import re
from pathlib import Path

import pytest

from library.config import catalogue, load
from library.config.catalogue import Declared
from library.config.values import choices, element, is_pair, options
from library.errors import ConfigError

WRONG: dict[type, tuple[str, ...]] = {
    bool: ('"true"', "1", "0.0", "[true]", '"yes"'),
    int: ('"16"', "16.5", "true", "nan", "inf", "[1]", "2020-01-01"),
    float: ('"1e-4"', "true", "nan", "-inf", "[1.0]"),
    str: ("1", "1.5", "true", '["a"]'),
    Path: ("1", "1.5", "true", '["a"]'),
}
ELEMENT_WRONG: dict[type, str] = {int: '[512, "768"]', float: '[1.0, "x"]', str: '["a", 1]', Path: '["a", 1]'}
KEYS = [key for key in catalogue.declared().values() if not key.info.command_line_only]


def wrong_values(key: Declared) -> list[str]:
    """TOML values that cannot be this key's, whatever else it accepts."""
    kinds = options(key.field.annotation)
    lists = [kind for kind in kinds if element(kind) is not None]
    if choices(key.field.annotation):
        return ['"no such word"', "1.25", "[[1]]"]
    if lists and len(lists) == len(kinds):
        inner = element(lists[0]) or []
        return [ELEMENT_WRONG[inner[0]], "[[1]]"] + (["[1]", "[1, 2, 3]"] if is_pair(lists[0]) else [])
    found = set.intersection(*(set(WRONG[kind]) for kind in kinds if kind in WRONG))
    return sorted(found - ({"[1]", "[1.0]"} if lists else set())) or ["[[1]]"]


CASES = [(key, value) for key in KEYS for value in wrong_values(key)]


@pytest.mark.parametrize(("key", "value"), CASES, ids=[f"{key.name}={value}" for key, value in CASES])
def test_a_wrong_type_is_refused_with_its_place(key: Declared, value: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(f'# a comment\npretrained_model_name_or_path = "a/b"\n\n{key.name} = {value}\n'.replace(
        'pretrained_model_name_or_path = "a/b"\n', "" if key.name == "pretrained_model_name_or_path" else
        'pretrained_model_name_or_path = "a/b"\n'))  # fmt: skip
    line = 3 if key.name == "pretrained_model_name_or_path" else 4
    with pytest.raises(ConfigError) as caught:
        load(["--config_file", str(path)], "train")
    assert re.search(rf"run\.toml:{line}: {key.name}\b", str(caught.value)), caught.value


BOUNDED = [key for key in KEYS if key.info.range]


@pytest.mark.parametrize("key", BOUNDED, ids=lambda key: key.name)
def test_a_value_out_of_range_is_refused_with_the_range(key: Declared, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    low = key.info.range.startswith(("at least", "above"))
    path.write_text(f"{key.name} = {-1000000 if low else 10**12}\n")
    with pytest.raises(ConfigError, match=re.escape(key.info.range)) as caught:
        load(["--config_file", str(path)], "train")
    assert f"run.toml:1: {key.name} = " in str(caught.value)


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ('network_dim = "16"', "Write it without quotes: 16."),
        ("network_dim = 16.0", "Write 16."),
        ("gradient_checkpointing = 1", "Write true."),
        ('gradient_checkpointing = "false"', "Write it without quotes: false."),
        ("revision = 2", 'Write it in quotes: "2".'),
        ('timestep_sampling = "flux_shft"', "Did you mean flux_shift?"),
        ('learning_rate = "1e-4"', "Write it without quotes: 0.0001."),
    ],
)
def test_common_slips_come_with_the_cure(line: str, advice: str, load_toml) -> None:
    with pytest.raises(ConfigError) as caught:
        load_toml(line)
    assert advice in str(caught.value)
