"""Keys of network files: every spelling that trainers write, read into one form and written in the chosen one.

A key is prefix + module + suffix. Five families name the same weights: kohya (`lora_unet_` + BFL name with
underscores), PEFT (`transformer.` + diffusers name), LyCORIS on diffusers names (`lycoris_`), OneTrainer
(`lora_transformer_`) and BFL names with dots (`diffusion_model.`, `base_model.model.` or bare).
"""

import re
from dataclasses import dataclass

from library.networks import parts

SUFFIXES = (
    "lora_down.weight", "lora_up.weight", "lora_mid.weight", "lora_A.weight", "lora_B.weight", "lora_B.bias",
    "lora_A.default.weight", "lora_B.default.weight", "lora_magnitude_vector.weight", "lora_magnitude_vector",
    "lora.down.weight", "lora.up.weight", "alpha", "dora_scale",
    "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
    "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
    "a1.weight", "a2.weight", "b1.weight", "b2.weight", "oft_blocks", "rescale",
    "diff", "diff_b", "set_weight", "reshape_weight",
)  # fmt: skip
_SAME = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora_A.default.weight": "lora_down.weight",
    "lora_B.default.weight": "lora_up.weight",
    "lora.down.weight": "lora_down.weight",
    "lora.up.weight": "lora_up.weight",
    "lora_magnitude_vector.weight": "dora_scale",
    "lora_magnitude_vector": "dora_scale",
}
_LONGEST_FIRST = sorted(SUFFIXES, key=len, reverse=True)

_FLAT_OWN = {
    "double": {own.replace(".", "_"): own for own in parts._DOUBLE},
    "single": {own.replace(".", "_"): own for own in parts._SINGLE},
}
_FLAT_TOP = {name.replace(".", "_"): name for name in parts._TOP}
_FLAT_DIFFUSERS = {
    "double": {name.replace(".", "_"): name for names in parts._DOUBLE.values() for name in names},
    "single": {name.replace(".", "_"): name for names in parts._SINGLE.values() for name in names},
    "top": {name.replace(".", "_"): name for name in parts._TOP.values()},
}
_FLAT_BLOCK = re.compile(r"(double|single)_blocks_(\d+)_(.+)")
_FLAT_DIFFUSERS_BLOCK = re.compile(r"(single_transformer_blocks|transformer_blocks)_(\d+)_(.+)")

_CLIP_LAYER = re.compile(r"(?:text_model[._])?encoder[._]layers[._](\d+)[._](self_attn|mlp)[._](\w+)")
_TEXT_PREFIXES = ("lora_te1_", "lora_te_", "text_encoder.", "text_encoders.clip_l.transformer.")
_OTHER_TEXT = ("lora_te2_", "lora_te3_", "text_encoder_2.", "text_encoders.t5xxl.")


@dataclass(frozen=True)
class Place:
    """Where a key points: a BFL module, the part of it (None: all rows), how it was spelt; or a CLIP module."""

    module: str
    part: int | None
    spelling: str


@dataclass(frozen=True)
class Key:
    """A key of a file, understood: its place and the canonical name of the tensor there."""

    place: Place
    tensor: str


def split_suffix(key: str) -> tuple[str, str] | None:
    """(module part, suffix) of a key; None if it ends in no known suffix."""
    for suffix in _LONGEST_FIRST:
        if key.endswith("." + suffix):
            return key[: -len(suffix) - 1], suffix
    return None


def parse(key: str) -> Key | None:
    """What ``key`` means; None for a key that names no linear of FLUX or CLIP-L."""
    split = split_suffix(key)
    if split is None:
        return None
    stem, suffix = split
    place = _text_place(stem) or _flat_place(stem) or _dotted_place(stem)
    return None if place is None else Key(place, _SAME.get(suffix, suffix))


def is_other_text_encoder(key: str) -> bool:
    """Whether the key is of T5 (or of a second CLIP), which InFlux never trains."""
    return key.startswith(_OTHER_TEXT)


def _text_place(stem: str) -> Place | None:
    for prefix in _TEXT_PREFIXES:
        if stem.startswith(prefix):
            match = _CLIP_LAYER.fullmatch(stem[len(prefix) :])
            if match:
                return Place(f"encoder.layers.{match[1]}.{match[2]}.{match[3]}", None, "text_encoder")
    return None


def _flat_place(stem: str) -> Place | None:
    if stem.startswith("lora_unet_"):
        flat = stem.removeprefix("lora_unet_")
        if flat in _FLAT_TOP:
            return Place(_FLAT_TOP[flat], None, "kohya")
        match = _FLAT_BLOCK.fullmatch(flat)
        if match and match[3] in _FLAT_OWN[match[1]]:
            return Place(f"{match[1]}_blocks.{match[2]}.{_FLAT_OWN[match[1]][match[3]]}", None, "kohya")
    for prefix, spelling in (("lycoris_", "lycoris"), ("lora_transformer_", "onetrainer")):
        if stem.startswith(prefix):
            name = _unflattened_diffusers(stem.removeprefix(prefix))
            if name is not None:
                return _diffusers_place(name, spelling)
    return None


def _unflattened_diffusers(flat: str) -> str | None:
    match = _FLAT_DIFFUSERS_BLOCK.fullmatch(flat)
    if match is None:
        return _FLAT_DIFFUSERS["top"].get(flat)
    own = _FLAT_DIFFUSERS["double" if match[1] == "transformer_blocks" else "single"].get(match[3])
    return None if own is None else f"{match[1]}.{match[2]}.{own}"


def _dotted_place(stem: str) -> Place | None:
    for prefix, spelling in (("transformer.", "peft"), ("", "bare")):
        if stem.startswith(prefix):
            place = _diffusers_place(stem.removeprefix(prefix), spelling)
            if place is not None:
                return place
    for prefix, spelling in (("diffusion_model.", "bfl"), ("base_model.model.", "bfl"), ("", "bfl")):
        if stem.startswith(prefix) and parts.is_known(stem.removeprefix(prefix)):
            return Place(stem.removeprefix(prefix), None, spelling)
    return None


def _diffusers_place(name: str, spelling: str) -> Place | None:
    try:
        module, index = parts.from_diffusers(name)
    except KeyError:
        return None
    return Place(module, index if len(parts.diffusers_names(module)) > 1 else None, spelling)


def kohya_stem(module: str) -> str:
    """The kohya spelling of a BFL module."""
    return "lora_unet_" + module.replace(".", "_")


def peft_stem(diffusers: str) -> str:
    """The PEFT spelling of a diffusers linear."""
    return "transformer." + diffusers


def lycoris_stem(diffusers: str) -> str:
    """The LyCORIS spelling of a diffusers linear."""
    return "lycoris_" + diffusers.replace(".", "_")


def kohya_text_stem(module: str) -> str:
    """The kohya spelling of a CLIP-L linear, e.g. ``encoder.layers.0.self_attn.q_proj``."""
    return "lora_te1_text_model_" + module.replace(".", "_")


def peft_text_stem(module: str) -> str:
    """The PEFT spelling of a CLIP-L linear."""
    return "text_encoder.text_model." + module
