"""Optimizers by name, and their arguments checked against what their source says they take. Needs no torch.

`--dry_run` and the run itself begin here. A package's source is parsed, never imported; where it says nothing (a class
that inherits its arguments, or takes any), the run tries them out on a parameter of its own before weights are loaded.
"""

import ast
import difflib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from library.errors import ConfigError

BUILT_IN = {
    "AdamW": "torch.optim.AdamW",
    "AdamW8bit": "bitsandbytes.optim.AdamW8bit",
    "PagedAdamW": "bitsandbytes.optim.PagedAdamW32bit",
    "PagedAdamW8bit": "bitsandbytes.optim.PagedAdamW8bit",
    "Lion": "bitsandbytes.optim.Lion",
    "Lion8bit": "bitsandbytes.optim.Lion8bit",
    "PagedLion8bit": "bitsandbytes.optim.PagedLion8bit",
    "Adafactor": "transformers.optimization.Adafactor",
    "Prodigy": "prodigyopt.Prodigy",
    "AdamWScheduleFree": "schedulefree.AdamWScheduleFree",
    "SGDScheduleFree": "schedulefree.SGDScheduleFree",
    "RAdamScheduleFree": "schedulefree.RAdamScheduleFree",
    "SGD": "torch.optim.SGD",
}
NEEDS = {
    "bitsandbytes": "pip install bitsandbytes",
    "prodigyopt": "pip install prodigyopt",
    "schedulefree": "pip install schedulefree",
    "transformers": "pip install transformers",
}
UNFIT = {
    "torch.optim.LBFGS": "its step calls the model again",
    "torch.optim.SparseAdam": "it takes sparse gradients alone",
}
OURS = ("params", "lr")  # the trainer's to give


@dataclass(frozen=True)
class Signature:
    """What a constructor takes: arguments with their defaults, None where a default is no literal or is missing."""

    defaults: dict[str, object]
    takes_any: bool


def check(optimizer_type: str, pairs: Sequence[str]) -> str:
    """Check name and arguments as far as the source tells. Returns what is left to the start of the run, if anything.

    Raises ConfigError for an unknown name, a missing package, an argument that is not taken, and a value of another
    kind than the default.
    """
    arguments = parse_arguments(pairs)
    path = path_of(optimizer_type)
    if path in UNFIT:
        raise ConfigError(f"optimizer_type = {optimizer_type} cannot train here: {UNFIT[path]}")
    signature = _signature(path, optimizer_type)
    if signature is None:
        return f"{optimizer_type} and its arguments are checked when the run starts"
    check_names(optimizer_type, list(signature.defaults), signature.takes_any, arguments)
    for name, value in arguments.items():
        _check_kind(optimizer_type, name, value, signature.defaults.get(name))
    return ""


def path_of(optimizer_type: str) -> str:
    """The dotted path of a name, in any case, or of a path itself."""
    by_lower = {name.lower(): name for name in BUILT_IN}
    name = by_lower.get(optimizer_type.lower())
    if name is None and "." not in optimizer_type:
        close = difflib.get_close_matches(optimizer_type.lower(), by_lower, n=1)
        hint = f"; did you mean {by_lower[close[0]]!r}?" if close else ""
        raise ConfigError(
            f"optimizer_type = {optimizer_type!r} is not known{hint} Known: {', '.join(BUILT_IN)}, "
            "or a dotted path such as 'torch.optim.NAdam'"
        )
    return BUILT_IN[name] if name else optimizer_type


def parse_arguments(pairs: Sequence[str]) -> dict[str, object]:
    """`["weight_decay=0.01", "betas=0.9,0.99"]` -> values by name; a value that is no literal stays a string."""
    parsed: dict[str, object] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f'optimizer_args: {pair!r} is not "name=value", for instance "weight_decay=0.01"')
        if name.strip() in parsed:
            raise ConfigError(f"optimizer_args: {name.strip()!r} is given twice")
        parsed[name.strip()] = literal(value.strip())
    return parsed


def literal(text: str) -> object:
    """A Python literal (numbers, booleans in either spelling, tuples, None), else the text itself."""
    spelled = {"true": "True", "false": "False", "none": "None"}.get(text.lower(), text)
    try:
        return ast.literal_eval(spelled)
    except (ValueError, SyntaxError):
        return text


def check_names(optimizer_type: str, taken: Sequence[str], takes_any: bool, arguments: dict[str, object]) -> None:
    """Raises ConfigError for argument names the class does not take, with the nearest one it does."""
    known = [name for name in taken if name not in ("self", *OURS)]
    for name in arguments:
        if name in OURS:
            raise ConfigError(f"optimizer_args: {name!r} is set by learning_rate and the network, not here")
        if name not in known and not takes_any:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ConfigError(f"optimizer_args: {optimizer_type} takes no {name!r}; {hint}It takes {', '.join(known)}")


def _check_kind(optimizer_type: str, name: str, value: object, default: object) -> None:
    """The default tells the kind: a switch, a number, or so many numbers."""
    wanted = ""
    if isinstance(default, bool):
        wanted = "" if isinstance(value, bool) else "true or false"
    elif isinstance(default, int | float):
        wanted = "" if _is_number(value) else "a number"
    elif isinstance(default, tuple) and all(map(_is_number, default)):
        fits = isinstance(value, tuple | list) and len(value) == len(default) and all(map(_is_number, value))
        wanted = "" if fits else f"{len(default)} numbers"
    if wanted:
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        raise ConfigError(
            f"optimizer_args: {name} = {value!r}: {optimizer_type} takes {wanted} there, as {name}={shown}"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _signature(path: str, optimizer_type: str) -> Signature | None:
    module, _, name = path.rpartition(".")
    found = _find(_source_of(module, optimizer_type), name)
    if found is None:
        return None
    made = [part for part in found.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"]
    if not made:
        return None
    spec = made[0].args
    positional = [*spec.posonlyargs, *spec.args]
    defaults = dict.fromkeys([one.arg for one in (*positional, *spec.kwonlyargs)])
    given = list(zip(positional[len(positional) - len(spec.defaults) :], spec.defaults))
    given += [(one, value) for one, value in zip(spec.kwonlyargs, spec.kw_defaults) if value is not None]
    for one, value in given:
        defaults[one.arg] = _value(value)
    return Signature(defaults, spec.kwarg is not None)


def _value(node: ast.expr) -> object:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


def _source_of(module: str, optimizer_type: str) -> Path | None:
    """The file of a module, found without importing anything of its package."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None:
        advice = NEEDS.get(top, f"install the package that has {module!r}")
        raise ConfigError(f"optimizer_type = {optimizer_type!r}: there is no module {top!r} ({advice})")
    if not spec.submodule_search_locations:
        return Path(spec.origin) if spec.origin and not rest else None
    place = Path(spec.submodule_search_locations[0]).joinpath(*rest)
    return next((file for file in (place / "__init__.py", place.with_suffix(".py")) if file.is_file()), None)


def _find(file: Path | None, name: str) -> ast.ClassDef | None:
    """A class in a file, or in the file beside it that it takes the name from."""
    if file is None:
        return None
    body = ast.parse(file.read_text(encoding="utf-8")).body
    own = [part for part in body if isinstance(part, ast.ClassDef) and part.name == name]
    if own:
        return own[0]
    for part in body:
        if isinstance(part, ast.ImportFrom) and part.module and any(alias.name == name for alias in part.names):
            beside = file.parent / f"{part.module.rpartition('.')[2]}.py"
            return _find(beside, name) if beside.is_file() and beside != file else None
    return None
