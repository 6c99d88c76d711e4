"""How a key is declared: once, with its type, default, range, help, aliases and readers.

Validation, command line, help text, reference page and editor schema are all read from these declarations.
A table is a frozen pydantic model; the docstring under a field is the field's help.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo

if TYPE_CHECKING:
    from library.config.run import Run

Command = Literal["cache", "train", "infer"]
COMMANDS: tuple[Command, ...] = ("cache", "train", "infer")

PathKind = Literal["path", "model", "output"]
"""`path`: relative to the file that names it. `model`: the same, unless it reads like a hub id.
`output`: relative to output_dir."""


@dataclass(frozen=True)
class KeyInfo:
    """What a declaration says beyond what pydantic needs. Pydantic calls it to complete the JSON schema."""

    aliases: tuple[str, ...] = ()
    reads: frozenset[str] | None = None
    secret: bool = False
    path: PathKind | None = None
    not_yet: str | None = None
    command_line_only: bool = False
    short: str | None = None
    range: str = ""
    kohya: str | None = None
    seed: str | None = None
    comma: bool = False
    rerun: bool = False
    inexact: bool = False
    section: str | None = None
    only_with: str | None = None
    exists: frozenset[str] = frozenset()

    def __call__(self, schema: dict[str, Any]) -> None:
        if self.aliases:
            schema["x-aliases"] = list(self.aliases)


def key(
    default: Any,
    *,
    aliases: tuple[str, ...] = (),
    reads: str | None = None,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    multiple_of: int | None = None,
    secret: bool = False,
    path: PathKind | None = None,
    not_yet: str | None = None,
    command_line_only: bool = False,
    short: str | None = None,
    kohya: object = None,
    seed: object = None,
    comma: bool = False,
    rerun: bool = False,
    inexact: bool = False,
    section: str | None = None,
    only_with: str | None = None,
    exists: str = "",
) -> Any:
    """Declare one key.

    aliases: other spellings accepted in TOML and on the command line.
    reads: the commands that read it ("cache train infer"); the table's own `reads` if not given.
    secret: never stored, printed or hashed.
    path: how a relative path is resolved (see PathKind).
    not_yet: the key is known but its work is not built; setting it is refused with this text.
    command_line_only: an action of one call, refused in TOML.
    short: a name that means this key inside its own table, and on the command line of the one command that reads it.
    kohya, seed: the default in kohya's sd-scripts, and in InFluxEdit (the seed of InFlux), where it differs from ours.
    comma: a list whose entries never hold a comma, so that a comma string is split as InFluxEdit does.
    rerun: may change when a run is continued (more steps, other save intervals); no part of a run's identity.
    inexact: may change when a run is continued, with a warning: what follows is not what it would have been to the bit.
    section: the TOML table it stands in, if that is not its own.
    only_with: "other_key" or "other_key=this|that": where it cannot act otherwise, setting it is a loud warning.
    exists: the commands for which this path has to exist.
    """
    bounds = {"ge": ge, "gt": gt, "le": le, "lt": lt, "multiple_of": multiple_of}
    given = {name: bound for name, bound in bounds.items() if bound is not None}
    signs = {
        "ge": "at least {}",
        "gt": "above {}",
        "le": "at most {}",
        "lt": "below {}",
        "multiple_of": "a multiple of {}",
    }
    info = KeyInfo(
        aliases=aliases,
        reads=None if reads is None else frozenset(reads.split()),
        secret=secret,
        path=path,
        not_yet=not_yet,
        command_line_only=command_line_only,
        short=short,
        range=", ".join(signs[name].format(bound) for name, bound in given.items()),
        kohya=None if kohya is None else str(kohya),
        seed=None if seed is None else str(seed),
        comma=comma,
        rerun=rerun,
        inexact=inexact,
        section=section,
        only_with=only_with,
        exists=frozenset(exists.split()),
    )
    return Field(default, json_schema_extra=info, repr=not secret, **given)


class Table(BaseModel):
    """A frozen, strictly typed group of keys. Each part of the program receives its own table and nothing else."""

    model_config = ConfigDict(
        strict=True,
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        validate_default=True,
    )

    section: ClassVar[str]
    reads: ClassVar[str] = "cache train infer"

    @classmethod
    def entries(cls) -> Iterator[tuple[str, FieldInfo, KeyInfo]]:
        """Every declared key, in the order of the file."""
        for name, field in cls.model_fields.items():
            if isinstance(field.json_schema_extra, KeyInfo):
                yield name, field, field.json_schema_extra

    @classmethod
    def readers(cls, info: KeyInfo) -> frozenset[str]:
        """The commands that read a key."""
        return frozenset(cls.reads.split()) if info.reads is None else info.reads

    def problems(self, run: Run) -> Iterator[tuple[list[str], str]]:
        """What cannot work together: the keys concerned, and a message that says what to do."""
        yield from ()

    def cautions(self, run: Run) -> Iterator[tuple[list[str], str]]:
        """What works but deserves a loud warning."""
        yield from ()

    def changed(self, name: str) -> bool:
        """Whether this key has another value than its default.

        Rules ask this, not whether a key was written: a resolved configuration states every key, and loads again.
        """
        return getattr(self, name) != type(self).model_fields[name].get_default()


def as_tuple(value: object) -> object:
    """Lists may be written as a TOML array, as one value, or as a string split on `;`. Never on a comma."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(";") if part.strip())
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, tuple) or value is None:
        return value
    return (value,)


def as_path(value: object) -> object:
    """Paths are written as strings; the loader has already made them absolute."""
    return Path(value) if isinstance(value, str) else value


def as_paths(value: object) -> object:
    """A list of paths, written as strings."""
    parts = as_tuple(value)
    return tuple(as_path(part) for part in parts) if isinstance(parts, tuple) else parts


def as_pair(value: object) -> object:
    """A TOML array stands for a fixed-size tuple."""
    return tuple(value) if isinstance(value, list) else value


def as_arguments(value: object) -> object:
    """`name=value` texts; a TOML table of them means the same."""
    if isinstance(value, dict):
        return tuple(f"{name}={_argument(entry)}" for name, entry in value.items())
    return as_tuple(value)


def _argument(value: object) -> str:
    if isinstance(value, list):
        return ",".join(_argument(entry) for entry in value)
    return str(value)


def with_equals(value: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse an argument without a name or a value."""
    for text in value:
        name, equals, rest = text.rpartition("=")
        if not equals or not name.strip() or not rest.strip():
            raise ValueError(f'"{text}" has not the form "name=value".')
    return value


FilePath = Annotated[Path, BeforeValidator(as_path)]
FilePaths = Annotated[tuple[Path, ...], BeforeValidator(as_paths)]
Strings = Annotated[tuple[str, ...], BeforeValidator(as_tuple)]
Arguments = Annotated[tuple[str, ...], BeforeValidator(as_arguments), AfterValidator(with_equals)]
Integers = Annotated[tuple[int, ...], BeforeValidator(as_tuple)]
Floats = Annotated[tuple[float, ...], BeforeValidator(as_tuple)]
Size = Annotated[tuple[int, int], BeforeValidator(as_pair)]
Range = Annotated[tuple[float, float], BeforeValidator(as_pair)]
