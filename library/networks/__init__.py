"""WHAT IS TRAINED: networks on the linears of the base model, and the files they travel in.

Reading order: parts (names of the linears), arguments (what the user wrote), targets and text_targets (which linears),
kinds (one weight's change), factors (its arithmetic), dropout, lora, dense, lycoris (the adapters), network (all on a
model), clip (CLIP-L's); names, change, forms, metadata, file (what is written), loading, warm_start (what is read
and applied); stored, inheritance, shapes, outline, size, prospect (what is known before anything is loaded); graph,
workflow (the ComfyUI graph beside a file); acceptance, surgery, baking (what the tools do to files).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from library.config.tables.network import NetworkTable
from library.networks.targets import Plan, plan

if TYPE_CHECKING:
    from library.memory.linear import Adapter, Linear
    from library.models.flux import FluxTransformer
    from library.networks.dropout import Draws
    from library.networks.network import Network
    from library.networks.targets import Target

__all__ = ["NETWORKS", "Plan", "build", "plan"]

AdapterMaker = Callable[["Plan", "Target", "Linear", "Draws", int], "Adapter"]


def _lora(settings: Plan, target: Target, linear: Linear, draws: Draws, seed: int) -> Adapter:
    from library.networks.lora import make

    return make(settings.settings, target, linear, draws, seed)


def _lycoris(settings: Plan, target: Target, linear: Linear, draws: Draws, seed: int) -> Adapter:
    from library.networks.lycoris import make

    return make(settings.settings, target, linear, draws, seed)


def _full(settings: Plan, target: Target, linear: Linear, draws: Draws, seed: int) -> Adapter:
    from library.networks.dense import make

    return make(settings.settings, target, linear, draws)


NETWORKS: dict[str, AdapterMaker] = {
    "lora": _lora,
    "locon": _lora,
    "loha": _lycoris,
    "lokr": _lycoris,
    "glora": _lycoris,
    "diag-oft": _lycoris,
    "full": _full,
}
"""Every kind of network: how an adapter for one target is made. Torch is loaded by the first call."""


def build(table: NetworkTable, transformer: FluxTransformer, seed: int = 0) -> Network:
    """The network that ``table`` describes, on ``transformer`` but not attached; its start depends on ``seed`` alone.

    CLIP-L's part is `library.networks.clip.build_clip`'s.

    ``base_weights`` are merged into the transformer first; ``network_weights`` give the start its values.
    Raises ConfigError if the table selects nothing or asks for what cannot be made right.
    """
    from library.networks import warm_start
    from library.networks.dense import DenseAdapter
    from library.networks.dropout import Draws
    from library.networks.loading import home_of, load_network, merge_networks
    from library.networks.network import Network
    from library.networks.prospect import look_ahead

    linears = transformer.linears()
    sizes = {path: (linear.out_features, linear.in_features) for path, linear in linears.items()}
    settled = look_ahead(table, sizes)
    if table.base_weights:
        multipliers = table.base_weights_multiplier or (1.0,) * len(table.base_weights)
        merge_networks(transformer, [(load_network(path), by) for path, by in zip(table.base_weights, multipliers)])
    draws = Draws()
    make = _lycoris if settled.settings.dora else NETWORKS[settled.settings.kind]
    adapters: dict[str, Adapter] = {}
    for target in settled.targets:
        adapter = make(settled, target, linears[target.module], draws, seed)
        home = home_of(transformer, target.module, linears[target.module])
        is_there = all(parameter.device == home for parameter in adapter.parameters())
        adapters[target.module] = adapter if is_there else adapter.to(home)
    if settled.x_embedder is not None:
        linear = linears["img_in"]
        adapters["img_in"] = DenseAdapter(
            "img_in", [(0, linear.out_features)], linear.in_features, transformer.device, bias=settled.x_embedder_bias
        )
    rates = {target.module: target.learning_rate for target in settled.targets if target.learning_rate is not None}
    network = Network(transformer, adapters, draws, "transformer", rates, settled.settings.module_name)
    if table.network_weights is not None:
        warm_start.load_into(network, load_network(table.network_weights))
    return network
