"""A LoRA on CLIP-L, on q, k, v and out of its attention, as the published trainer does it. T5 is never trained.

`Together` lets the trainer treat the transformer's network and CLIP's as one.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from library.config.tables.network import NetworkTable
from library.errors import NetworkFileError
from library.flow.draws import Key
from library.memory.linear import Adapter, Linear
from library.networks import lora
from library.networks.arguments import resolve
from library.networks.change import Change
from library.networks.dropout import Draws
from library.networks.inheritance import text_inherited
from library.networks.loading import LoadedNetwork, change_of, load_network
from library.networks.network import Network, ParameterGroup
from library.networks.targets import Inherited
from library.networks.text_targets import is_attention, text_targets
from library.networks.warm_start import load_text_into


def attention_linears(clip: nn.Module) -> dict[str, nn.Linear]:
    """The linears of CLIP's attention by name, as `encoder.layers.0.self_attn.q_proj`."""
    return {
        name: module for name, module in clip.named_modules() if isinstance(module, nn.Linear) and is_attention(name)
    }


def make_adaptable(clip: nn.Module) -> None:
    """Replace CLIP's attention linears by ones that can carry an adapter, over the same weights."""
    for name, linear in attention_linears(clip).items():
        if isinstance(linear, Linear):
            continue
        replacement = Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        replacement.weight, replacement.bias = linear.weight, linear.bias
        replacement.requires_grad_(False)
        parent, _, leaf = name.rpartition(".")
        setattr(clip.get_submodule(parent), leaf, replacement)


def build_clip(table: NetworkTable, clip: nn.Module, seed: int = 0) -> Network:
    """The LoRA that `train_text_encoder` asks for, not attached. Raises ConfigError if CLIP has no such linears.

    ``base_weights`` are merged into CLIP-L first; ``network_weights`` give the start its values.
    """
    make_adaptable(clip)
    settings, linears = resolve(table), attention_linears(clip)
    multipliers = table.base_weights_multiplier or (1.0,) * len(table.base_weights)
    merge_text(clip, [(load_network(path), by) for path, by in zip(table.base_weights, multipliers)])
    start = None if table.network_weights is None else load_network(table.network_weights)
    inherited = Inherited({}, {}, None) if start is None else text_inherited(table, start.metadata, start.change)
    sizes = {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}
    draws = Draws()
    adapters: dict[str, Adapter] = {}
    for target in text_targets(table, settings, sizes, inherited):
        linear = linears[target.module]
        assert isinstance(linear, Linear)
        adapters[target.module] = lora.make(settings, target, linear, draws, seed)
    network = Network(clip, adapters, draws, "text_encoder", {})
    if start is not None:
        load_text_into(network, start)
    return network


class Together:
    """Two networks with the interface of one. Names of CLIP's tensors cannot meet those of the transformer."""

    def __init__(self, transformer: Network, text: Network):
        self.transformer, self.text = transformer, text
        self._both = (transformer, text)

    @property
    def module_name(self) -> str:
        """The transformer's, which metadata tells."""
        return self.transformer.module_name

    def attach(self) -> list[nn.Parameter]:
        """Put both on their models; returns all trained parameters."""
        return [parameter for network in self._both for parameter in network.attach()]

    def trained(self) -> list[nn.Parameter]:
        """Every trained parameter."""
        return list(self.named_trained().values())

    def named_trained(self) -> dict[str, nn.Parameter]:
        """Every trained parameter by name."""
        return self.transformer.named_trained() | self.text.named_trained()

    def parameters_by_group(self) -> list[ParameterGroup]:
        """The trained parameters, grouped by learning rate."""
        return self.transformer.parameters_by_group() + self.text.parameters_by_group()

    def begin_step(self, seed: int, micro_step: int, item_keys: tuple[Key, ...]) -> None:
        """Draw this micro-step's dropout masks."""
        for network in self._both:
            network.begin_step(seed, micro_step, item_keys)

    @contextlib.contextmanager
    def at_rest(self) -> Iterator[None]:
        """No dropout inside the block."""
        with self.transformer.at_rest(), self.text.at_rest():
            yield

    def clamp_norms(self, largest: float) -> tuple[int, float, float]:
        """Shrink changes larger than `largest`; (how many, mean norm, largest norm) of the transformer's."""
        self.text.clamp_norms(largest)
        return self.transformer.clamp_norms(largest)

    def export(self) -> Change:
        """What both add, in one change."""
        change = self.transformer.export()
        change.text = {module: factors for (module, _), factors in self.text.export().entries.items()}
        return change

    def trained_scales(self) -> dict[str, float]:
        """The scale each adapter trains at."""
        return self.transformer.trained_scales() | self.text.trained_scales()

    def state(self) -> dict[str, Tensor]:
        """Every tensor a continued run needs."""
        return self.transformer.state() | self.text.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` returned."""
        names = self.text.state().keys()
        self.text.load_state({name: tensor for name, tensor in state.items() if name in names})
        self.transformer.load_state({name: tensor for name, tensor in state.items() if name not in names})


@torch.no_grad()
def merge_text(clip: nn.Module, networks: Sequence[tuple[LoadedNetwork, float]]) -> int:
    """Merge the networks' part for CLIP-L into its weights; returns how many modules changed."""
    make_adaptable(clip)
    linears = {name: module for name, module in clip.named_modules() if isinstance(module, Linear)}
    merged = 0
    for network, strength in networks:
        for module, factors in network.change.text.items():
            linear = linears.get(module)
            if linear is None:
                raise NetworkFileError(f"{network.path} trains {module} of CLIP-L, which this base does not have")
            linear.add_to_weight(change_of(factors, linear, (0, linear.out_features)) * strength)
            merged += 1
    return merged
