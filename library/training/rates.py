"""Which learning rate and weight decay every trained parameter gets, from the keys of [optimizer]."""

from collections.abc import Iterable

from library.config.tables import OptimizerTable
from library.errors import ConfigError
from library.networks.network import ParameterGroup as NetworkGroup
from library.training.optimizer_arguments import check, parse_arguments
from library.training.optimizers import OptimizerChoice, ParameterGroup, choose

_ADAM_FAMILY = (
    "AdamW",
    "AdamW8bit",
    "PagedAdamW",
    "PagedAdamW8bit",
    "AdamWScheduleFree",
    "RAdamScheduleFree",
    "Prodigy",
)
_PRODIGY_KEYS = (
    "prodigy_beta3",
    "prodigy_decouple",
    "prodigy_use_bias_correction",
    "prodigy_safeguard_warmup",
)


def choose_optimizer(table: OptimizerTable) -> OptimizerChoice:
    """The optimizer class with its arguments, from `optimizer_args` and the adam_* and prodigy_* keys.

    Raises ConfigError for unknown names and arguments.
    """
    check(table.optimizer_type, table.optimizer_args)
    given = parse_arguments(table.optimizer_args)
    choice = choose(table.optimizer_type, given)
    arguments = {**choice.arguments, **_from_keys(table, choice.name), **given}
    return OptimizerChoice(choice.name, choice.factory, arguments)


def _from_keys(table: OptimizerTable, name: str) -> dict[str, object]:
    """The adam_* and prodigy_* keys as arguments, for the optimizers that take them."""
    if name not in _ADAM_FAMILY:
        return {}
    arguments: dict[str, object] = {
        "betas": (table.adam_beta1, table.adam_beta2),
        "eps": table.adam_epsilon,
        "weight_decay": table.adam_weight_decay,
    }
    if name == "Prodigy":
        arguments |= {key.removeprefix("prodigy_"): getattr(table, key) for key in _PRODIGY_KEYS}
    return arguments


def parameter_groups(
    table: OptimizerTable, network_groups: Iterable[NetworkGroup], scale: float = 1.0
) -> list[ParameterGroup]:
    """The optimizer's groups, each with its base rate. `scale` multiplies every rate (scale_lr)."""
    rates = {
        "transformer": table.learning_rate if table.unet_lr is None else table.unet_lr,
        "x_embedder": table.learning_rate if table.x_embedder_lr is None else table.x_embedder_lr,
        "text_encoder": table.text_encoder_lr,
    }
    made: list[ParameterGroup] = []
    for group in network_groups:
        rate = rates[group.role] if group.learning_rate is None else group.learning_rate
        ratio = table.loraplus_lr_ratio if group.is_up and table.loraplus_lr_ratio else 1.0
        decay = table.adam_weight_decay_text_encoder if group.role == "text_encoder" else None
        made.append(ParameterGroup(_name(group, made), rate * ratio * scale, group.parameters, decay))
    merged = _merged(made)
    if all(group.learning_rate == 0 for group in merged):
        raise ConfigError("every learning rate is 0: nothing would be trained")
    return merged


def _name(group: NetworkGroup, made: list[ParameterGroup]) -> str:
    own = "" if group.learning_rate is None else f"_{group.learning_rate:g}"
    return f"{group.role}{own}" + ("_up" if group.is_up else "")


def _merged(groups: list[ParameterGroup]) -> list[ParameterGroup]:
    """Groups of one role with one rate become one, named after the first without `_up`."""
    merged: dict[tuple[str, float, float | None], ParameterGroup] = {}
    for group in groups:
        role = group.name.removesuffix("_up")
        key = (role, group.learning_rate, group.weight_decay)
        if key in merged:
            both = {**merged[key].parameters, **group.parameters}
            merged[key] = ParameterGroup(role, group.learning_rate, both, group.weight_decay)
        else:
            merged[key] = group
    names = [group.name for group in merged.values()]
    assert len(set(names)) == len(names), f"two groups share a name: {names}"
    return list(merged.values())
