"""The names of the linears agree with the checkpoint's key map, for every module of the real model."""

import pytest

from library.models.keymap import linear_parts, linear_shapes
from library.models.shape import FluxShape
from library.networks import names, parts


def test_parts_are_those_of_the_key_map() -> None:
    shape = FluxShape()
    sizes = linear_shapes(shape)
    for module, expected in linear_parts(shape).items():
        ours = parts.parts(module, *sizes[module])
        assert [(part.diffusers, part.start, part.stop) for part in ours] == [
            (part.module, part.start, part.stop) for part in expected
        ]
        assert any(part.halves_swapped for part in expected) == (module == parts.SWAPPED_HALVES)
    assert set(parts.all_modules(19, 38)) == set(sizes)


@pytest.mark.parametrize("module", sorted(linear_shapes(FluxShape(double_blocks=2, single_blocks=2))))
def test_every_spelling_of_a_module_is_understood(module: str) -> None:
    flat = names.kohya_stem(module)
    for key in (f"{flat}.lora_up.weight", f"diffusion_model.{module}.lora_up.weight", f"{module}.lora_B.weight"):
        meaning = names.parse(key)
        assert (meaning.place.module, meaning.place.part, meaning.tensor) == (module, None, "lora_up.weight")
    for index, diffusers in enumerate(parts.diffusers_names(module)):
        part = index if len(parts.diffusers_names(module)) > 1 else None
        dotted = diffusers.replace(".", "_")
        for key in (
            f"transformer.{diffusers}.lora_B.weight",
            f"{diffusers}.lora_B.default.weight",
            f"lycoris_{dotted}.lora_up.weight",
            f"lora_transformer_{dotted}.lora_up.weight",
        ):
            meaning = names.parse(key)
            assert (meaning.place.module, meaning.place.part, meaning.tensor) == (module, part, "lora_up.weight"), key


@pytest.mark.parametrize(
    "key",
    [
        "lora_unet_double_blocks_0_img_attn_qkv.lora_sideways.weight",
        "lora_unet_double_blocks_0_img_attn.lora_up.weight",
        "lora_unet_triple_blocks_0_linear1.lora_up.weight",
        "transformer.transformer_blocks.0.attn.to_z.lora_A.weight",
        "img_in.weight",
    ],
)
def test_other_names_mean_nothing(key: str) -> None:
    assert names.parse(key) is None


def test_clip_names_are_understood() -> None:
    for key in (
        "lora_te1_text_model_encoder_layers_3_self_attn_q_proj.lora_down.weight",
        "lora_te_text_model_encoder_layers_3_self_attn_q_proj.lora_down.weight",
        "text_encoder.text_model.encoder.layers.3.self_attn.q_proj.lora_A.weight",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.3.self_attn.q_proj.lora_A.weight",
    ):
        meaning = names.parse(key)
        assert meaning.place == names.Place("encoder.layers.3.self_attn.q_proj", None, "text_encoder")
        assert meaning.tensor == "lora_down.weight"
    assert names.is_other_text_encoder("lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_up.weight")
