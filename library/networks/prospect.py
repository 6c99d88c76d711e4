"""Everything a configuration will train, with what its files say, checked before any weight is loaded.

The training command, `--dry_run`, `--list_modules` and the memory forecast all ask here, so they refuse the same
mistakes and count the same parameters. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from library.config.tables.network import NetworkTable
from library.errors import ConfigError, UserError
from library.networks.change import require_fit
from library.networks.inheritance import inherited_from, require_base_weights, require_held
from library.networks.stored import StoredNetwork, look
from library.networks.targets import Inherited, Plan, plan
from library.networks.text_targets import text_targets


def look_ahead(
    table: NetworkTable, linears: dict[str, tuple[int, int]], clip: Mapping[str, tuple[int, int]] | None = None
) -> Plan:
    """What ``table`` trains on linears of these (out, in) sizes, ranks and scales of ``network_weights`` included.

    clip: CLIP-L's linears, for train_text_encoder; None counts the transformer alone. Raises ConfigError, naming the
    key first, for whatever training would refuse or could not do exactly.
    """
    texts = dict(clip or {})
    for path in table.base_weights:
        base = _looked_at("base_weights", path, linears)
        if clip is not None:
            require_base_weights(table, base, texts)
    start = None if table.network_weights is None else _looked_at("network_weights", table.network_weights, linears)
    nothing = Inherited({}, {}, None)
    inherited = nothing if start is None else inherited_from(table, start, linears)
    settled = plan(table, linears, inherited)
    if clip is not None:
        settled = replace(settled, text=text_targets(table, settled.settings, texts, inherited))
    if start is not None:
        require_held(settled, start, linears, with_text=clip is not None)
    return settled


def _looked_at(key: str, path: object, linears: dict[str, tuple[int, int]]) -> StoredNetwork:
    try:
        network = look(path)
        require_fit(network.path, network.change, linears)
    except UserError as error:
        raise ConfigError(f"{key}: {error}") from error
    return network
