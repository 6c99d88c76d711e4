"""Optimizers by name or dotted path, their arguments checked against the signature before anything slow is loaded.

A run steps one `OptimizerSet`: usually a single optimizer, but one per learning rate where the algorithm estimates its
own step size and refuses unequal rates (Prodigy).
"""

import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from library.errors import ConfigError
from library.memory.bnb import bitsandbytes
from library.training.optimizer_arguments import BUILT_IN, NEEDS, check_names, path_of

# the library's own defaults would ignore the learning rate
DEFAULT_ARGUMENTS = {"Adafactor": {"scale_parameter": False, "relative_step": False, "warmup_init": False}}


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate. `weight_decay` None: the optimizer's own."""

    name: str
    learning_rate: float
    parameters: dict[str, nn.Parameter]
    weight_decay: float | None = None


@dataclass(frozen=True)
class OptimizerChoice:
    """An optimizer class that was found, and arguments that it takes."""

    name: str
    factory: type[torch.optim.Optimizer]
    arguments: dict[str, object] = field(default_factory=dict)

    @property
    def one_rate_each(self) -> bool:
        """Whether unequal learning rates need an instance each."""
        return self.factory.__module__.split(".")[0] == "prodigyopt"


def choose(optimizer_type: str, arguments: dict[str, object]) -> OptimizerChoice:
    """Find the class and check the arguments' names against its signature.

    Raises ConfigError for an unknown name, a dotted path to anything but a subclass of torch.optim.Optimizer, and
    arguments the class does not take.
    """
    path = path_of(optimizer_type)
    name = next((name for name, known in BUILT_IN.items() if known == path), None)
    factory = import_optimizer(path, optimizer_type)
    merged = {**(DEFAULT_ARGUMENTS.get(name, {}) if name else {}), **arguments}
    check_arguments(optimizer_type, factory, arguments)
    return OptimizerChoice(name or optimizer_type, factory, merged)


def import_optimizer(path: str, optimizer_type: str) -> type[torch.optim.Optimizer]:
    """The class at a dotted path. Nothing but a subclass of torch.optim.Optimizer is ever called."""
    module_name, _, attribute = path.rpartition(".")
    try:
        if module_name.partition(".")[0] == "bitsandbytes":
            bitsandbytes()
        found = getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        advice = NEEDS.get(module_name.split(".")[0], f"install the package that has {module_name!r}")
        raise ConfigError(
            f"optimizer_type = {optimizer_type!r}: there is no module {error.name!r} ({advice})"
        ) from error
    except AttributeError as error:
        raise ConfigError(
            f"optimizer_type = {optimizer_type!r}: module {module_name!r} has no {attribute!r}"
        ) from error
    if not (inspect.isclass(found) and issubclass(found, torch.optim.Optimizer)):
        raise ConfigError(f"optimizer_type = {optimizer_type!r} is not a subclass of torch.optim.Optimizer")
    return found


def check_arguments(optimizer_type: str, factory: type[torch.optim.Optimizer], arguments: dict[str, object]) -> None:
    """Raises ConfigError for argument names the class does not take, with the nearest one it does."""
    parameters = inspect.signature(factory.__init__).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    check_names(optimizer_type, list(parameters), takes_any, arguments)


def try_out(choice: OptimizerChoice, rate: float, device: torch.device) -> None:
    """Make the optimizer for a small parameter and step it, before anything large is loaded.

    Raises ConfigError if the class refuses the arguments' values, or cannot step as the trainer does.
    """
    parameter = nn.Parameter(torch.zeros(8, 8, device=device))
    stepped = OptimizerSet(choice, [ParameterGroup("trial", rate, {"trial": parameter})])
    stepped.training(True)
    parameter.grad = torch.ones_like(parameter)
    try:
        stepped.step()
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise ConfigError(f"optimizer_type = {choice.name} cannot take a step here: {error}") from error


class OptimizerSet:
    """One or more optimizers stepped and saved as one."""

    def __init__(self, choice: OptimizerChoice, groups: list[ParameterGroup]):
        """Builds the optimizers. Raises ConfigError if the class refuses the arguments' values."""
        self.choice = choice
        split = _by_rate(groups) if choice.one_rate_each else [groups]
        try:
            self.optimizers = [choice.factory([_as_group(g) for g in part], **choice.arguments) for part in split]
        except (TypeError, ValueError, IndexError, RuntimeError, AssertionError) as error:
            raise ConfigError(f"{choice.name} refuses its arguments {choice.arguments}: {error}") from error
        self.base_rates = {group.name: group.learning_rate for group in groups}

    def groups(self) -> Iterator[dict]:
        """Every optimizer's parameter groups, each with a `name`."""
        for optimizer in self.optimizers:
            yield from optimizer.param_groups

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters that are stepped."""
        for group in self.groups():
            yield from group["params"]

    def set_rates(self, factor: float) -> None:
        """Set every group's learning rate to its base rate times `factor`."""
        for group in self.groups():
            # an optimizer with lr=None (Adafactor's relative step) makes its own schedule
            if group["lr"] is not None:
                group["lr"] = self.base_rates[group["name"]] * factor

    def rates(self) -> dict[str, float]:
        """Learning rate by group name."""
        return {group["name"]: group["lr"] for group in self.groups() if group["lr"] is not None}

    def effective_rates(self) -> dict[str, float]:
        """The rate really applied, for optimizers that estimate it: d * lr (Prodigy), the relative step (Adafactor)."""
        found = {}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                if "d" in group:
                    found[group["name"]] = float(group["d"]) * float(group["lr"])
                elif group.get("relative_step"):
                    state = next((optimizer.state[p] for p in group["params"] if p in optimizer.state), None)
                    if state:
                        found[group["name"]] = float(optimizer._get_lr(group, state))
                elif "scheduled_lr" in group:
                    found[group["name"]] = float(group["scheduled_lr"])
        return found

    def step(self) -> None:
        """Step every optimizer."""
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def training(self, mode: bool) -> None:
        """Schedule-free optimizers hold other weights while training than to look at; a no-op for the rest."""
        for optimizer in self.optimizers:
            switch = getattr(optimizer, "train" if mode else "eval", None)
            if switch is not None:
                switch()

    @property
    def schedule_free(self) -> bool:
        """Whether the weights to look at differ from the weights being trained."""
        return any(hasattr(optimizer, "eval") for optimizer in self.optimizers)

    def state_dict(self) -> list[dict]:
        """Every optimizer's state, in order."""
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states: list[dict]) -> None:
        """Restore `state_dict`. The learning rates stay those of this run, which may have been changed."""
        assert len(states) == len(self.optimizers), "the state belongs to another set of optimizers"
        for optimizer, state in zip(self.optimizers, states, strict=True):
            rates = [group["lr"] for group in optimizer.param_groups]
            dtypes = {id(p): p for p in _parameters(optimizer)}
            optimizer.load_state_dict(state)
            _restore_dtypes(optimizer, state, dtypes)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate


def _as_group(group: ParameterGroup) -> dict:
    extra = {} if group.weight_decay is None else {"weight_decay": group.weight_decay}
    return {"params": list(group.parameters.values()), "lr": group.learning_rate, "name": group.name, **extra}


def _by_rate(groups: list[ParameterGroup]) -> list[list[ParameterGroup]]:
    rates: dict[float, list[ParameterGroup]] = {}
    for group in groups:
        rates.setdefault(group.learning_rate, []).append(group)
    return list(rates.values())


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _restore_dtypes(optimizer: torch.optim.Optimizer, state: dict, parameters: dict[int, nn.Parameter]) -> None:
    """torch casts loaded state to its parameter's dtype; put back the dtypes that were saved (fp32 moments of bf16)."""
    for index, parameter in enumerate(parameters.values()):
        saved = state["state"].get(index, {})
        for key, value in saved.items():
            held = optimizer.state[parameter].get(key)
            if isinstance(value, Tensor) and isinstance(held, Tensor) and held.dtype != value.dtype:
                optimizer.state[parameter][key] = value.to(held.device, copy=True)
