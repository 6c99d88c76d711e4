"""Command line and TOML -> Run, or one ConfigError that lists everything wrong."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from library.config import arguments, catalogue, document
from library.config.combinations import problems_of, warnings_of
from library.config.document import Document
from library.config.given import Given, Problems
from library.config.merge import UNSET, Scope, one_level, recognise, rewrite, stack
from library.config.run import Run
from library.config.table import Command, Table
from library.config.tables import DatasetTable, SubsetTable
from library.config.values import describe, hint, show
from library.errors import ConfigError


@dataclass
class _Load:
    """What one call has read so far."""

    command: Command
    problems: Problems = field(default_factory=Problems)
    origins: dict[str, str] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)

    def level(self, given: Sequence[Given]) -> Scope:
        return one_level(recognise(given, self.command, self.problems), self.problems)


def load(argv: Sequence[str], command: Command) -> Run:
    """Read a command's configuration. Raises ConfigError with every problem found."""
    reading = _Load(command)
    words = arguments.parse(argv, command, reading.problems)
    typed = reading.level(words)
    main, data = _files(reading, typed)
    if main.unreadable or data.unreadable:
        raise _error(reading.problems)  # what else would be missing stands, most likely, in the file
    levels = [reading.level(main.keys)]
    if data is not main:
        levels.append(reading.level(data.keys))
        _only_data(levels[1], reading.problems)
    tables = _tables(reading, [*levels, typed])
    datasets = _datasets(reading, data, levels, typed)
    run = _complete(Run(name=command, datasets=datasets, origins=reading.origins, **tables))
    for names, message in problems_of(run, broken=reading.broken):
        reading.problems.add(_where(names, reading.origins), message)
    if reading.problems.messages:
        raise _error(reading.problems)
    to_cache = arguments.repeated(words, command, "cache")
    return run.model_copy(update={"warnings": tuple(warnings_of(run)), "to_cache": to_cache})


def _error(problems: Problems) -> ConfigError:
    found = problems.messages
    if len(found) == 1:
        return ConfigError(found[0])
    return ConfigError(f"{len(found)} things in the configuration need mending:\n" + "\n".join(f"- {x}" for x in found))


def _files(reading: _Load, typed: Scope) -> tuple[Document, Document]:
    """The configuration file and the one with the data sets (the same, unless dataset_config names another)."""
    main = Document()
    if "config_file" in typed and typed["config_file"].value is not UNSET:
        main = document.read(_toml_path(str(typed["config_file"].value)), reading.problems)
    named = typed.get("dataset_config")
    if named is None:
        found = recognise([one for one in main.keys if one.name == "dataset_config"], reading.command, Problems())
        named = found[0] if found else None
    if named is None or not isinstance(named.value, str):
        return main, main
    data = document.read(_toml_path(named.value), reading.problems)
    if data.datasets is None:
        data.datasets = []
    if main.datasets is not None:
        reading.problems.add(
            main.datasets_at, f"data sets stand here and in {named.value} (dataset_config). Keep one of them."
        )
    return main, data


def _toml_path(name: str) -> Path:
    path = Path(name)
    return path.with_name(path.name + ".toml") if not path.exists() and path.suffix != ".toml" else path


def _only_data(scope: Scope, problems: Problems) -> None:
    for name, one in list(scope.items()):
        keys = catalogue.REWRITES[name].keys if name in catalogue.REWRITES else (name,)
        if catalogue.declared()[keys[0]].table not in catalogue.DATA_TABLES:
            problems.add(one.where, f"{one.spelled} is no key of a data set; it belongs in the configuration file.")
            del scope[name]


def _tables(reading: _Load, levels: list[Scope]) -> dict[str, Table]:
    """The tables that exist once."""
    merged = rewrite(stack(_without_data(level) for level in levels), reading.problems)
    found = {}
    for name, table in catalogue.TABLES.items():
        own = {key: one for key, one in merged.items() if catalogue.declared()[key].table == name}
        reading.origins.update({key: one.where for key, one in own.items()})
        built = _build(table, own, reading.problems)
        if built is not None:
            found[name] = built
        else:
            reading.broken.add(name)
    return found


def _is_data(name: str) -> bool:
    key = catalogue.REWRITES[name].keys[0] if name in catalogue.REWRITES else name
    return catalogue.declared()[key].table in catalogue.DATA_TABLES


def _without_data(level: Scope) -> Scope:
    return {name: one for name, one in level.items() if not _is_data(name)}


def _only_in(level: Scope, table: str) -> Scope:
    found = {}
    for name, one in level.items():
        key = catalogue.REWRITES[name].keys[0] if name in catalogue.REWRITES else name
        if catalogue.declared()[key].table == table:
            found[name] = one
    return found


def _datasets(reading: _Load, data: Document, levels: list[Scope], typed: Scope) -> tuple[DatasetTable, ...]:
    """Data sets with their subsets: [general] < [[datasets]] < [[datasets.subsets]] < command line."""
    if data.datasets is None and not any(_is_data(name) for level in (*levels, typed) for name in level):
        return ()
    written = data.datasets if data.datasets is not None else [document.GivenDataset()]
    if not written:
        reading.problems.add(_where(["dataset_config"], {"dataset_config": ""}), "there is no [[datasets]] table.")
    _reject_ambiguous(written, typed, reading.problems)
    found = []
    for index, dataset in enumerate(written):
        own = reading.level(dataset.keys)
        prefix = f"datasets.{index}"
        reading.origins[prefix] = dataset.where
        subsets = []
        for number, keys in enumerate(dataset.subsets or [[]]):
            reading.origins[f"{prefix}.subsets.{number}"] = (dataset.subsets_where or [dataset.where])[number]
            layers = [*levels, own, reading.level(keys), typed]
            subset = rewrite(stack(_only_in(layer, "subset") for layer in layers), reading.problems)
            reading.origins.update({f"{prefix}.subsets.{number}.{name}": one.where for name, one in subset.items()})
            subsets.append(_build(SubsetTable, subset, reading.problems))
        merged = rewrite(stack(_only_in(layer, "dataset") for layer in (*levels, own, typed)), reading.problems)
        reading.origins.update({f"{prefix}.{name}": one.where for name, one in merged.items()})
        built = _build(DatasetTable, merged, reading.problems, subsets=tuple(s for s in subsets if s is not None))
        if built is None or None in subsets:
            reading.broken.add("datasets")
        if built is not None:
            found.append(built)
    return tuple(found)


def _reject_ambiguous(written: list[document.GivenDataset], typed: Scope, problems: Problems) -> None:
    subsets = sum(max(1, len(dataset.subsets)) for dataset in written)
    for table, count, what in (("dataset", len(written), "[[datasets]]"), ("subset", subsets, "subsets")):
        if count > 1:
            for one in _only_in(typed, table).values():
                problems.add(one.where, f"there are {count} {what}; say it in the table it is meant for.")


def _build(table: type[Table], scope: Scope, problems: Problems, **more: Any) -> Any:
    """One table, or None with a problem for each key that does not fit its declaration."""
    values = {name: one.value for name, one in scope.items()}
    try:
        return table.model_validate({**values, **more})
    except ValidationError as error:
        names = {str(entry["loc"][0]): entry for entry in error.errors(include_url=False)}
        for name, entry in names.items():
            key = catalogue.declared()[name]
            one = scope[name]
            said = "" if key.info.secret else f" = {show(one.value)}"
            needs = entry["msg"] if entry["type"] == "value_error" else f"needs {describe(key.field, key.info)}"
            advice = "" if key.info.secret else hint(one.value, key.field)
            problems.add(one.where, f"{one.spelled}{said}: {needs.removeprefix('Value error, ')}.{advice}")
        return None


def _where(names: Sequence[str], origins: dict[str, str]) -> str:
    """Where the keys stand; if none was written, the table they are missing from."""
    tables = [name for name in names if name.rpartition(".")[2].isdigit()]
    found = [origins[name] for name in names if name in origins and name not in tables]
    return ", ".join(dict.fromkeys(found or [origins[name] for name in tables if name in origins]))


def _complete(run: Run) -> Run:
    """Fill in what follows from other keys: folders inside output_dir, the subset of class images."""
    output = Path(os.path.abspath(run.saving.output_dir))
    update: dict[str, Any] = {"saving": _with(run.saving, output_dir=output)}
    update["logging"] = _with(run.logging, logging_dir=output / run.logging.logging_dir)
    if run.cache.dataset_cache_dir is None:
        update["cache"] = _with(run.cache, dataset_cache_dir=output / "dataset_cache")
    if run.cache.with_prior_preservation and run.datasets and run.cache.class_data_dir and run.cache.class_prompt:
        update["datasets"] = (_with_class_images(run), *run.datasets[1:])
    return run.model_copy(update=update)


def _with(table: Any, **values: object) -> Any:
    """The same table with derived values, which do not count as given."""
    given = set(table.model_fields_set)
    copy = table.model_copy(update=values)
    object.__setattr__(copy, "__pydantic_fields_set__", given)
    return copy


def _with_class_images(run: Run) -> DatasetTable:
    """Class images train as an ordinary subset: a blank condition, a full mask, weighed by prior_loss_weight."""
    wanted = SubsetTable(
        image_dir=run.cache.class_data_dir,
        instance_prompt=run.cache.class_prompt,
        mode="mask",
        generate_mask=("full",),
        is_reg=True,
    )
    first = run.datasets[0]
    there = any(subset.is_reg and subset.image_dir == wanted.image_dir for subset in first.subsets)
    return first if there else _with(first, subsets=(*first.subsets, wanted))
