"""Whether the keys make sense together. The rules themselves stand beside the tables they concern."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

from library.config import catalogue
from library.config.run import Run
from library.config.table import KeyInfo, Table
from library.config.tables import DatasetTable

Problem = tuple[list[str], str]
"""The keys concerned (as `origins` names them) and the message."""


def each_table(run: Run) -> Iterator[tuple[str, Table, DatasetTable | None]]:
    """Every table of a run with the prefix of its keys in `origins`; a subset comes with its data set."""
    for name in catalogue.TABLES:
        yield "", getattr(run, name), None
    for index, dataset in enumerate(run.datasets):
        yield f"datasets.{index}.", dataset, None
        for number, subset in enumerate(dataset.subsets):
            yield f"datasets.{index}.subsets.{number}.", subset, dataset


def problems_of(run: Run, broken: Collection[str] = ()) -> Iterator[Problem]:
    """Everything that cannot work together, and everything this command needs and does not have.

    `broken` names tables with wrong values of their own, which were reported already.
    """
    yield from (problem for table_name, problem in _required(run) if table_name not in broken)
    for prefix, table, _ in each_table(run):
        if ("datasets" if prefix else type(table).section) in broken or not _concerns(run, table):
            continue
        for names, message in table.problems(run):
            own = [prefix + name if prefix and name in type(table).model_fields else name for name in names]
            yield [*own, prefix.rstrip(".")], message
        yield from _missing_paths(run, prefix, table)


def _required(run: Run) -> Iterator[tuple[str, Problem]]:
    """What a command cannot do without, by the table it is missing from."""
    if not run.model.pretrained_model_name_or_path:
        message = (
            "pretrained_model_name_or_path is not set: a folder in diffusers layout, a hub id such as "
            "black-forest-labs/FLUX.1-Fill-dev, or a checkpoint file."
        )
        yield "model", ([], message)
    if run.name in ("cache", "train"):
        if not run.datasets:
            message = "there is no data set: set image_dir (instance_data_dir), or write [[datasets]] tables."
            yield "datasets", ([], message)
    elif not run.inference.image:
        yield "inference", ([], "image is not set: the image to edit, or a folder of images.")


def _concerns(run: Run, table: Table) -> bool:
    """An experiment is cached and trained, so both check all of it; inference only what it reads itself."""
    return run.name != "infer" or "infer" in type(table).reads


def _missing_paths(run: Run, prefix: str, table: Table) -> Iterator[Problem]:
    for name, _, info in table.entries():
        if run.name not in info.exists:
            continue
        value = getattr(table, name)
        for path in value if isinstance(value, tuple) else (value,):
            if path is not None and path != run.cache.class_data_dir and not os.path.exists(path):
                yield [prefix + name], f"{name} = {path}: there is no such file or folder.{_near(Path(path))}"


def _near(path: Path) -> str:
    """The first folder on the way that does exist, so that a slip is easy to see."""
    parent = path.parent
    while parent != parent.parent and not parent.exists():
        parent = parent.parent
    return f" (The path exists up to {parent}.)" if parent != path.parent else ""


def warnings_of(run: Run) -> Iterator[str]:
    """Keys that were set, differ from their default, and can do nothing in this configuration."""
    for prefix, table, around in each_table(run):
        for name, _, info in table.entries():
            if not table.changed(name) or not info.only_with or run.name not in table.readers(info):
                continue
            if not _acts(run, table, around, info):
                where = run.origins.get(prefix + name, "")
                needs = info.only_with.replace("=", " = ").replace("|", " or ")
                yield f"{where}: {name} does nothing here: it acts only with {needs}."
        keys = {name: info for name, _, info in table.entries()}
        for names, message in table.cautions(run):
            read_here = run.name in type(table).reads or any(run.name in table.readers(keys[name]) for name in names)
            if not read_here:
                continue
            where = ", ".join(run.origins[prefix + name] for name in names if prefix + name in run.origins)
            yield f"{where}: {message}" if where else message


def _acts(run: Run, table: Table, around: DatasetTable | None, info: KeyInfo) -> bool:
    """Whether the condition of only_with holds; it is looked up in the table itself, around it, then everywhere."""
    for condition in (info.only_with or "").split(" or "):
        name, _, wanted = condition.partition("=")
        value = _look_up(run, table, around, name)
        if wanted and {str(one) for one in (value if isinstance(value, tuple) else (value,))} & {*wanted.split("|")}:
            return True
        if not wanted and value not in (None, False, (), 0, "none"):
            return True
    return False


def _look_up(run: Run, table: Table, around: DatasetTable | None, name: str) -> object:
    for place in (table, around, *(getattr(run, other) for other in catalogue.TABLES)):
        if place is not None and name in type(place).model_fields:
            return getattr(place, name)
    raise AssertionError(f"only_with names {name}, which is no key")
