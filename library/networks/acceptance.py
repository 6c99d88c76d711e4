"""What becomes of every key of a network's file in the programs that load it, and which modules look ill.

The rules are those the programs' own code was seen to follow (ComfyUI 0.30, Forge of June 2025, diffusers 0.42,
sd-scripts' lora_flux; Nunchaku's were read, not run). Only names and shapes are needed for the fates.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from library.networks import names, parts
from library.networks.change import Change
from library.networks.factors import DOWN, UP, Factors

PROGRAMS = ("ComfyUI", "Forge", "diffusers", "kohya", "Nunchaku")
LOADED = "loaded"
FILL_WIDTH = 384
_FORGE_LIMIT = 12
_LORA = ("lora_down.weight", "lora_up.weight", "alpha")
_PATCHES = (
    "lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha", "dora_scale", "hada_w1_a", "hada_w1_b",
    "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a",
    "lokr_w2_b", "lokr_t2", "a1.weight", "a2.weight", "b1.weight", "b2.weight", "oft_blocks", "rescale", "diff",
    "diff_b", "set_weight",
)  # fmt: skip
_IN_LAYERS = ("img_in", "txt_in", "time_in", "vector_in", "guidance_in")
_TORN = re.compile(r"\.(lora_A|lora_B|lora_down|lora_up)\b")


@dataclass(frozen=True)
class Entry:
    """One key: its name, what it means (None: nothing known), its shape, and whether it holds integers."""

    key: str
    meaning: names.Key | None
    shape: tuple[int, ...]
    is_integer: bool = False


@dataclass(frozen=True)
class Fates:
    """For every key and program: "loaded", or what happens instead; and programs that refuse the whole file."""

    keys: dict[str, dict[str, str]]
    refused: dict[str, str]

    def loaded_whole(self, program: str) -> bool:
        """Whether the program takes every key."""
        return program not in self.refused and all(fates[program] == LOADED for fates in self.keys.values())

    def lost(self, program: str) -> list[str]:
        """The keys that the program does not take."""
        return [key for key, fates in self.keys.items() if fates[program] != LOADED]


def fates(shapes: dict[str, tuple[int, ...]], integers: frozenset[str] = frozenset()) -> Fates:
    """The fate of every key of a file with these tensors (``integers``: those of integer type)."""
    entries = [Entry(key, names.parse(key), shape, key in integers) for key, shape in shapes.items()]
    found = {entry.key: {program: _RULES[program](entry, entries) for program in PROGRAMS} for entry in entries}
    return Fates(found, _refusals(entries, found))


def _comfy(entry: Entry, entries: list[Entry]) -> str:
    meaning = entry.meaning
    if meaning is None:
        return "not loaded: no such module (a warning)"
    if meaning.tensor == "lora_B.bias":
        return "not loaded: biases are read from .diff_b only"
    if meaning.tensor not in _PATCHES:
        return f"not loaded: .{meaning.tensor} is unknown"
    if meaning.tensor == "rescale":
        return "read, but not applied"
    if meaning.tensor == "dora_scale":
        return "loaded, but DoRA is computed differently from the trainer's"
    if _has_sibling(entry, entries, "diff") and meaning.tensor in _LORA:
        return "replaced by the .diff on the same module"
    if meaning.tensor == "diff_b" and meaning.place.part is not None:
        return "not loaded: the bias of a part of a fused module"
    if meaning.place.module == "img_in" and meaning.tensor == DOWN and entry.shape[-1] != FILL_WIDTH:
        return f"a shape error: img_in takes {FILL_WIDTH} channels in Fill, {entry.shape[-1]} here; the LoRA is skipped"
    return LOADED


def _forge(entry: Entry, entries: list[Entry]) -> str:
    meaning = entry.meaning
    if meaning is not None and meaning.place.spelling == "bare":
        return "not loaded: diffusers names need the prefix transformer."
    if meaning is not None and entry.key.startswith("base_model."):
        return "not loaded: the prefix base_model.model. is unknown"
    if meaning is not None and meaning.tensor in ("oft_blocks", "rescale"):
        return "not loaded: no OFT"
    if meaning is not None and meaning.tensor == "alpha" and _has_sibling(entry, entries, "oft_blocks"):
        return "not loaded: no OFT"
    fate = _comfy(entry, entries)
    return LOADED if fate.startswith("a shape error") else fate  # narrower img_in is padded


def _diffusers(entry: Entry, entries: list[Entry]) -> str:
    meaning = entry.meaning
    if meaning is None:
        return "the whole file is refused: an unknown key" if _is_kohya(entries) else "ignored"
    if meaning.tensor == "dora_scale":
        return "dropped: the LoRA is applied undecomposed"
    if _is_kohya(entries):
        return _diffusers_kohya(entry, entries)
    if not entry.key.startswith(("transformer.", "text_encoder.")):
        return "ignored: the prefix transformer. is missing"
    if meaning.tensor == "lora_B.bias" and not _every_module_has_bias(entries):
        return "loads, but the pipeline cannot run: biases on some modules only"
    if meaning.tensor not in (*_LORA, "lora_B.bias"):
        return "ignored: only LoRA is read"
    if meaning.tensor == "alpha" and entry.is_integer:
        return "the whole file is refused: an integer alpha"
    return LOADED


def _diffusers_kohya(entry: Entry, entries: list[Entry]) -> str:
    place, tensor = entry.meaning.place, entry.meaning.tensor
    if any(other.key.startswith("transformer.") for other in entries):
        return LOADED if entry.key.startswith("transformer.") else "discarded beside keys with transformer."
    if place.spelling == "onetrainer":
        return (
            LOADED if ".attn." in names_of(place) else "the whole file is refused: OneTrainer's names beyond attention"
        )
    if place.spelling == "lycoris":
        return "the whole file is refused: lycoris_ names"
    if tensor in ("diff", "diff_b", "set_weight"):
        return f"the whole file is refused: .{tensor}"
    if tensor not in _LORA or not _is_lora_module(entry, entries):
        return "not loaded: only LoRA is read"
    if place.spelling == "text_encoder" or parts.is_block(place.module):
        return LOADED
    return "dropped silently: outside the blocks (use the _diffusers file)"


def names_of(place: names.Place) -> str:
    """The diffusers name of a place."""
    return parts.diffusers_names(place.module)[place.part or 0]


def _kohya(entry: Entry, entries: list[Entry]) -> str:
    meaning = entry.meaning
    if meaning is None or not entry.key.startswith(("lora_unet_", "lora_te1_")):
        return "not loaded: sd-scripts reads lora_unet_ and lora_te1_ only"
    if meaning.tensor not in _LORA or not _is_lora_module(entry, entries):
        return "ignored: sd-scripts reads plain LoRA only"
    if not _has_sibling(entry, entries, "alpha"):
        return "the whole file is refused: alpha is missing"
    top = meaning.place.module.split(".")[0]
    if meaning.place.spelling == "text_encoder" or parts.is_block(meaning.place.module) or top in _IN_LAYERS:
        return LOADED
    return "ignored: the final layer is not trained by sd-scripts"


def _nunchaku(entry: Entry, entries: list[Entry]) -> str:
    """As read in its loader: LoRA in the blocks under kohya's or PEFT's names; lora_unet_img_in is rejected."""
    if entry.meaning is None or entry.meaning.tensor not in _LORA or not _is_lora_module(entry, entries):
        return "not loaded: only LoRA is read"
    if entry.key.startswith("lora_unet_") and not parts.is_block(entry.meaning.place.module):
        return f"the whole file is refused: {entry.key.split('.')[0]} (use the _diffusers file)"
    if entry.meaning.place.spelling not in ("kohya", "peft", "text_encoder"):
        return "not loaded: names other than kohya's and PEFT's"
    return LOADED


_RULES: dict[str, Callable[[Entry, list[Entry]], str]] = {
    "ComfyUI": _comfy,
    "Forge": _forge,
    "diffusers": _diffusers,
    "kohya": _kohya,
    "Nunchaku": _nunchaku,
}


def _refusals(entries: list[Entry], found: dict[str, dict[str, str]]) -> dict[str, str]:
    refused = {}
    for program in PROGRAMS:
        reasons = {fate[program] for fate in found.values() if fate[program].startswith("the whole file is refused")}
        if reasons:
            refused[program] = sorted(reasons)[0].partition(": ")[2]
    unmatched = [entry.key for entry in entries if found[entry.key]["Forge"].startswith("not loaded")]
    if len(unmatched) > _FORGE_LIMIT:
        refused["Forge"] = (
            f"{len(unmatched)} unknown keys, more than the {_FORGE_LIMIT} it allows, first {unmatched[0]}"
        )
    if entries and not any(found[entry.key]["diffusers"] == LOADED for entry in entries):
        refused.setdefault("diffusers", "it finds nothing to load, and says so in a warning at most")
    return refused


def _is_kohya(entries: list[Entry]) -> bool:
    """Whether diffusers takes the file for kohya's (any lora_down), or for one it cannot place at all."""
    return any(".lora_down.weight" in entry.key for entry in entries) or not any(
        entry.key.startswith(("transformer.", "text_encoder.")) or _TORN.search(entry.key) for entry in entries
    )


def _siblings(entry: Entry, entries: list[Entry]) -> set[str]:
    return {other.meaning.tensor for other in entries if other.meaning and other.meaning.place == entry.meaning.place}


def _has_sibling(entry: Entry, entries: list[Entry], tensor: str) -> bool:
    return tensor in _siblings(entry, entries)


def _is_lora_module(entry: Entry, entries: list[Entry]) -> bool:
    return {DOWN, UP} <= _siblings(entry, entries)


def _every_module_has_bias(entries: list[Entry]) -> bool:
    places = {entry.meaning.place for entry in entries if entry.meaning and entry.meaning.tensor == UP}
    biased = {entry.meaning.place for entry in entries if entry.meaning and entry.meaning.tensor == "lora_B.bias"}
    return places <= biased


@dataclass(frozen=True)
class Health:
    """One module's size: its change's norm (NaN where it holds NaN), and what is wrong with it, if anything."""

    module: str
    norm: float
    problem: str | None


def health(change: Change, exploding: float = 30.0) -> list[Health]:
    """Every module's norm; NaN, all-zero, and more than ``exploding`` times the median are problems."""
    norms = {}
    for (module, rows), factors in change.entries.items():
        norms[f"{module}[{rows[0]}:{rows[1]}]"] = _norm(factors)
    norms |= {f"text encoder {module}": _norm(factors) for module, factors in change.text.items()}
    finite = sorted(norm for norm in norms.values() if norm == norm and norm not in (0.0, float("inf")))
    median = finite[len(finite) // 2] if finite else 0.0
    return [Health(module, norm, _problem(norm, median, exploding)) for module, norm in norms.items()]


def _problem(norm: float, median: float, exploding: float) -> str | None:
    if norm != norm or norm == float("inf"):
        return "holds NaN or infinity: the training that made it failed"
    if norm == 0:
        return "all zero: it was never trained"
    if norm > exploding * median:
        return f"{norm / median:.0f} times the median module: the training was diverging"
    return None


def _norm(factors: Factors) -> float:
    """Norm of the change; of a LoRA without building it, of what depends on the base weight from the factors alone."""
    tensors = {name: tensor.float() for name, tensor in factors.tensors.items()}
    if factors.kind == "lora":
        down, up = tensors[DOWN], tensors[UP]
        return float(((up.t() @ up) * (down @ down.t())).sum().clamp_min(0).sqrt()) * factors.scale
    if factors.kind in ("glora", "oft"):
        return sum(float(tensor.norm()) for tensor in tensors.values())
    return float(Factors(factors.kind, tensors, factors.alpha).delta().norm())
