"""What can be done to networks outside training: resize, add up, turn into a LoRA, extract from two checkpoints."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from library.errors import NetworkFileError
from library.models.checkpoint_file import TransformerFile
from library.networks import factors as arithmetic
from library.networks import parts
from library.networks.change import Change
from library.networks.factors import Factors
from library.networks.forms import fused
from library.networks.loading import LoadedNetwork
from library.networks.metadata import compact, trained_scale

_AGREED = (
    "influx_edit_mask_value", "influx_train_guidance", "influx_sample_guidance", "influx_resolution",
    "influx_t5xxl_max_token_length",
)  # fmt: skip


def resized(change: Change, rank: int | None = None, energy: float | None = None) -> tuple[Change, dict[str, float]]:
    """The network as LoRAs of at most ``rank``, or of the least rank that keeps ``energy``; and each module's error.

    x_embedder's exact factorisation is left as it is: no rank is too large for it.
    """
    made, errors = Change(sizes=dict(change.sizes), biases=dict(change.biases)), {}
    for (module, rows), factors in change.entries.items():
        if module == "img_in" and (factors.kind == "full" or factors.rank == min(factors.shape)):
            made.entries[(module, rows)] = factors
            continue
        made.entries[(module, rows)], errors[module] = _as_lora(module, factors, rank, energy)
    for module, factors in change.text.items():
        made.text[module], errors[f"text encoder {module}"] = _as_lora(module, factors, rank, energy)
    return made, errors


def _as_lora(module: str, factors: Factors, rank: int | None, energy: float | None) -> tuple[Factors, float]:
    if factors.kind in ("glora", "oft") or factors.is_dora:
        what = "DoRA" if factors.is_dora else factors.kind
        raise NetworkFileError(
            f"{module}: {what} changes the weight in proportion to it, so the base checkpoint is needed: make a LoRA of"
            " the file first, with python -m tools.convert_lora IN OUT --rank 32 --base CHECKPOINT"
        )
    return arithmetic.as_lora(factors.to(torch.float32), rank, energy)


def with_base(change: Change, base: TransformerFile) -> Change:
    """The same network with everything that depends on the base weight turned into plain changes of it."""
    made = Change(sizes=dict(change.sizes), biases=dict(change.biases), text=dict(change.text))
    entries = {entry.name: entry for entry in base.entries}
    for (module, rows), factors in change.entries.items():
        if factors.kind in ("glora", "oft") or factors.is_dora:
            weight = base.read(entries[f"{module}.weight"]).float()[rows[0] : rows[1]]
            factors = Factors("full", {"diff": factors.to(torch.float32).delta(weight)})
        made.entries[(module, rows)] = factors
    return made


def without_text(change: Change) -> Change:
    """The same network without its part for CLIP-L."""
    return replace(change, text={})


def carried(network: LoadedNetwork, change: Change) -> dict[str, str]:
    """What the file says about itself, as far as it is true of the ``change`` that was made of it."""
    metadata = dict(network.metadata)
    before, after = _kinds(network.change), _kinds(change)
    alphas = metadata.pop("influx_trained_alpha", None)
    if before != after:  # another algorithm: neither its arguments nor the scale it was trained at mean anything here
        for name in ("ss_network_args", "influx_trained_scale"):
            metadata.pop(name, None)
        if after <= {"lora", "full"}:
            metadata["ss_network_module"] = "networks.lora_flux"
    elif alphas is not None and "influx_trained_scale" not in metadata:
        scales = {
            module: trained_scale(network.metadata, module, max(factors.rank for _, factors in pieces))
            for module, pieces in network.change.by_module().items()
        }
        metadata["influx_trained_scale"] = json.dumps(compact({name: by for name, by in scales.items() if by}))
    return metadata


def _kinds(change: Change) -> set[str]:
    """The algorithms on the transformer; x_embedder's exact factorisation goes with every one."""
    return {factors.kind for (module, _), factors in change.entries.items() if module != "img_in"}


def agreed(networks: Sequence[LoadedNetwork]) -> tuple[dict[str, str], list[str]]:
    """InFlux's fields for a network that is several added up: (metadata, lines on what they disagree about).

    It is one for every mode that any of them was trained in; what they say differently is not written.
    """
    if len(networks) == 1:
        return {name: text for name, text in networks[0].metadata.items() if name.startswith("influx_")}, []
    modes = list(dict.fromkeys(mode for network in networks for mode in network.guide.modes))
    metadata = {"influx_modes": json.dumps(modes)} if modes else {}
    if len(modes) == 1:
        metadata["influx_mode"] = modes[0]
    notes = []
    for name in _AGREED:
        said = list(dict.fromkeys(network.metadata[name] for network in networks if name in network.metadata))
        if len(said) == 1:
            metadata[name] = said[0]
        elif said:
            notes.append(f"{name} differs ({', '.join(said)}) and is left out: say it to inference yourself")
    return metadata, notes


def added(networks: Sequence[tuple[Change, float]]) -> Change:
    """One network that is exactly the weighted sum of several; its ranks are the sums of theirs."""
    made = Change()
    for change, weight in networks:
        for module, pieces in change.by_module().items():
            size = made.sizes.setdefault(module, change.sizes[module])
            if size != change.sizes[module]:
                raise NetworkFileError(f"{module} has {change.sizes[module]} in one network, {size} in another")
            part = fused(change, module, [(rows, _lora(module, factors)) for rows, factors in pieces])
            _accumulate(made.entries, (module, (0, size[0])), part, weight)
        for module, factors in change.text.items():
            _accumulate(made.text, module, _lora(module, factors), weight)
        for module, bias in change.biases.items():
            made.biases[module] = made.biases.get(module, torch.zeros_like(bias)) + bias * weight
    return made


def _lora(module: str, factors: Factors) -> Factors:
    return _as_lora(module, factors, None, None)[0]


def _accumulate(entries: dict, slot: object, part: Factors, weight: float) -> None:
    if slot in entries:
        entries[slot] = arithmetic.stacked(entries[slot], part, weight)
    else:
        entries[slot] = arithmetic.scaled("lora", part.tensors, part.scale * weight)


def extracted(
    base: TransformerFile, tuned: TransformerFile, rank: int | None, energy: float | None
) -> Iterator[tuple[str, tuple[int, int], Factors | None, float]]:
    """Module by module, the LoRA that leads from ``base`` to ``tuned``: (module, size, factors or None, error).

    None: the weight did not change. Reads one weight of each file at a time.
    """
    if base.shape != tuned.shape:
        raise NetworkFileError(f"{base.source} and {tuned.source} are models of different shapes")
    others = {entry.name: entry for entry in tuned.entries}
    for entry in base.entries:
        module, _, leaf = entry.name.rpartition(".")
        if leaf != "weight" or not parts.is_known(module):
            continue
        delta = tuned.read(others[entry.name]).float() - base.read(entry).float()
        size = (delta.shape[0], delta.shape[1])
        if not torch.any(delta):
            yield module, size, None, 0.0
        elif module == "img_in":
            yield module, size, arithmetic.exact_lora(delta), 0.0
        else:
            yield module, size, *arithmetic.svd_lora(delta, rank, energy)


def other_changes(base: TransformerFile, tuned: TransformerFile) -> list[str]:
    """Tensors other than linears' weights that differ: a LoRA cannot carry them."""
    others = {entry.name: entry for entry in tuned.entries}
    found = []
    for entry in base.entries:
        if len(entry.shape) == 1 and not _equal(base.read(entry), tuned.read(others[entry.name])):
            found.append(entry.name)
    return found


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.float(), b.float())
