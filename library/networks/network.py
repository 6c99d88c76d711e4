"""The network on a model: adapters on its linears, the parameters they train, and what they add up to.

`attach` puts the adapters on and returns exactly the tensors that require a gradient; nothing becomes trainable later,
and nothing trainable is left out of the optimizer.
"""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from library.flow.draws import Key
from library.memory.linear import Adapter, Linear
from library.networks.change import Change
from library.networks.dropout import Draws
from library.networks.factors import Factors, as_lora

logger = logging.getLogger(__name__)
Role = Literal["transformer", "x_embedder", "text_encoder"]


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that learn at one rate.

    role: which of the optimizer's rates applies (unet_lr, x_embedder_lr, text_encoder_lr).
    learning_rate: a rate of their own (network_reg_lrs); None: the role's.
    is_up: whether LoRA+'s ratio applies.
    """

    role: Role
    learning_rate: float | None
    is_up: bool
    parameters: dict[str, nn.Parameter]


class Network(nn.Module):
    """Adapters by module path. Made by `library.networks.build`; idle until `attach`."""

    def __init__(
        self,
        model: nn.Module,
        adapters: dict[str, Adapter],
        draws: Draws,
        role: Role,
        rates: dict[str, float],
        module_name: str = "networks.lora_flux",
    ):
        super().__init__()
        self.paths = list(adapters)
        self.adapters = nn.ModuleList(adapters.values())
        self.draws = draws
        self.role = role
        self.module_name = module_name
        self.rates = rates
        self._model = (model,)

    @property
    def by_path(self) -> dict[str, Adapter]:
        """The adapters by the module path they belong to."""
        return dict(zip(self.paths, self.adapters))

    def attach(self) -> list[nn.Parameter]:
        """Put the adapters on the model and return the trained parameters: exactly those that require grad.

        Raises AssertionError if a linear is already adapted, or the model trains anything else.
        """
        linears = self._linears()
        for path, adapter in self.by_path.items():
            assert linears[path].adapter is None, f"{path} already carries a network"
            linears[path].adapter = adapter
        trained = self.trained()
        ours = {id(parameter) for parameter in trained}
        stray = [name for name, p in self._model[0].named_parameters() if p.requires_grad and id(p) not in ours]
        assert not stray, f"these require gradients but are not trained: {stray[:5]}"
        assert all(parameter.requires_grad for parameter in trained), "a trained parameter is frozen"
        return trained

    def detach(self) -> None:
        """Take the adapters off again; the base model is then as it was."""
        for path, linear in self._linears().items():
            if linear.adapter is not None and linear.adapter is self.by_path.get(path):
                linear.adapter = None

    def _linears(self) -> dict[str, Linear]:
        return {name: module for name, module in self._model[0].named_modules() if isinstance(module, Linear)}

    def trained(self) -> list[nn.Parameter]:
        """Every trained parameter."""
        return list(self.named_trained().values())

    def named_trained(self) -> dict[str, nn.Parameter]:
        """Every trained parameter by "module path:tensor"."""
        return {
            f"{path}:{name}": parameter
            for path, adapter in self.by_path.items()
            for name, parameter in adapter.named_parameters()
        }

    def parameters_by_group(self) -> list[ParameterGroup]:
        """The trained parameters, grouped by learning rate."""
        groups: dict[tuple[Role, float | None, bool], dict[str, nn.Parameter]] = {}
        for name, parameter in self.named_trained().items():
            path, tensor = name.split(":")
            role: Role = "x_embedder" if self._is_x_embedder(path) else self.role
            key = (role, self.rates.get(path), tensor == "up")
            groups.setdefault(key, {})[name] = parameter
        return [ParameterGroup(*key, parameters) for key, parameters in groups.items()]

    def _is_x_embedder(self, path: str) -> bool:
        return path == "img_in" and hasattr(self.by_path[path], "change")

    def begin_step(self, seed: int, micro_step: int, item_keys: tuple[Key, ...]) -> None:
        """Draw this micro-step's dropout masks; without a call nothing is dropped."""
        self.draws.begin(seed, micro_step, item_keys)

    @contextlib.contextmanager
    def at_rest(self) -> Iterator[None]:
        """No dropout inside the block: previews, validation."""
        before = self.draws.items
        self.draws.rest()
        try:
            yield
        finally:
            self.draws.items = before

    def clamp_norms(self, largest: float) -> tuple[int, float, float]:
        """Shrink changes larger than ``largest``; returns how many were, and the mean and largest norm after it."""
        clamped, norms = 0, []
        for adapter in self.adapters:
            count, norm = adapter.clamp_norm(largest)
            clamped += count
            norms.append(norm)
        return clamped, (sum(norms) / len(norms) if norms else 0.0), max(norms, default=0.0)

    @torch.no_grad()
    def export(self) -> Change:
        """What the network adds to the model, in fp32 on the CPU; alpha = rank, scale folded in.

        A change that is no product of factors (the kind `full`, DoRA) becomes a LoRA where it has an `export_rank`;
        what that loses is logged.
        """
        change, errors = Change(), {}
        linears = self._linears()
        for path, adapter in self.by_path.items():
            change.sizes[path] = (linears[path].out_features, linears[path].in_features)
            for rows, factors in adapter.factors():
                rank = getattr(adapter, "export_rank", None)
                if rank is not None:
                    factors, errors[path] = as_lora(factors, rank)
                tensors = {name: tensor.detach().float().cpu().clone() for name, tensor in factors.tensors.items()}
                change.entries[(path, rows)] = Factors(factors.kind, tensors, factors.alpha)
            if getattr(adapter, "bias_change", None) is not None:
                change.biases[path] = adapter.bias_change.detach().float().cpu().clone()
        if errors:
            worst = max(errors, key=errors.get)
            mean = sum(errors.values()) / len(errors)
            logger.info("saved as LoRA: relative error %.2g on average, %.2g at worst (%s)", mean, errors[worst], worst)
        return change

    def trained_scales(self) -> dict[str, float]:
        """The scale each adapter trains at, which files fold into the factors."""
        return {path: adapter.scale for path, adapter in self.by_path.items() if hasattr(adapter, "scale")}

    def state(self) -> dict[str, Tensor]:
        """Every tensor a continued run needs, by "module path:tensor"."""
        return {
            f"{path}:{name}": tensor.detach().cpu().clone()
            for path, adapter in self.by_path.items()
            for name, tensor in adapter.state_dict().items()
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` returned. Raises AssertionError if names or shapes are not this network's."""
        own = self.state()
        assert own.keys() == state.keys(), f"the state is of another network: {sorted(own.keys() ^ state.keys())[:5]}"
        for path, adapter in self.by_path.items():
            prefix = f"{path}:"
            tensors = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            adapter.load_state_dict(tensors)
