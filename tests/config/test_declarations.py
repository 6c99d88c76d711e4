"""The declarations themselves: names, help, conditions and commands hold together."""

import ast
import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from library.config import catalogue, load
from library.config.foreign import FOREIGN
from library.config.merge import EXCLUSIVE
from library.config.rewrites import REWRITES, SPELLINGS
from library.config.table import COMMANDS
from library.config.values import choices
from library.errors import ConfigError

LIBRARY = Path(catalogue.__file__).parents[1]
KEYS = catalogue.declared()


@pytest.mark.parametrize("name", KEYS)
def test_every_key_has_help_and_readers(name: str) -> None:
    key = KEYS[name]
    assert key.field.description and key.field.description.rstrip().endswith((".", ")"))
    assert key.readers and key.readers <= set(COMMANDS)


@pytest.mark.parametrize("name", KEYS)
def test_the_default_passes_its_own_validation(name: str) -> None:
    table = catalogue.ALL_TABLES[KEYS[name].table]
    default = KEYS[name].field.get_default()
    assert getattr(table.model_validate({name: default}), name) == getattr(table(), name)


def test_all_names_are_unique() -> None:
    names = list(itertools.chain(KEYS, catalogue.aliases(), REWRITES, FOREIGN))
    assert len(names) == len(set(names))


def test_conditions_name_real_keys_and_real_choices() -> None:
    for key in KEYS.values():
        for condition in filter(None, (key.info.only_with or "").split(" or ")):
            name, _, wanted = condition.partition("=")
            assert name in KEYS, f"{key.name} acts only with {name}, which is no key"
            known = choices(KEYS[name].field.annotation)
            if wanted and known:
                assert set(wanted.split("|")) <= set(known), f"{key.name}: {condition}"


def test_rewrites_spellings_and_groups_name_real_keys() -> None:
    for names in (*(how.keys for how in REWRITES.values()), SPELLINGS, *EXCLUSIVE):
        assert set(names) <= set(KEYS)


def test_secrets_do_not_show_in_a_table() -> None:
    secrets = [key for key in KEYS.values() if key.info.secret]
    assert {key.name for key in secrets} >= {"hub_token", "wandb_api_key"}
    for key in secrets:
        table = catalogue.ALL_TABLES[key.table].model_validate({key.name: "hf_very_secret"})
        assert "hf_very_secret" not in repr(table) + str(table)


def test_every_section_is_a_table_name() -> None:
    for name, table in catalogue.ALL_TABLES.items():
        assert table.section == name


def words_of_the_program() -> set[str]:
    """Every attribute and every text in the library's code, but for the declarations themselves."""
    found = set()
    for path in LIBRARY.rglob("*.py"):
        if path.parent.name != "tables" and path.name != "seed_options.py":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute):
                    found.add(node.attr)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.add(node.value.removeprefix("--"))
    return found


def test_no_key_is_dead() -> None:
    """A key that nothing reads would be accepted and ignored. `cache_latents` is read by its own refusal of false."""
    read = words_of_the_program() | {"cache_latents"}
    assert [name for name, key in KEYS.items() if name not in read and not key.info.not_yet] == []


def test_a_key_whose_work_is_not_built_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    key = KEYS["use_ema"]
    monkeypatch.setitem(KEYS, "use_ema", replace(key, info=replace(key.info, not_yet="averages are not built.")))
    with pytest.raises(ConfigError, match="--use_ema: use_ema does not work yet: averages are not built."):
        load(["--use_ema"], "train")
