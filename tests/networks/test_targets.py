"""Which linears a configuration trains; and that a selection which means nothing is refused, naming what is near."""

import pytest

from library.config.tables.network import NetworkTable
from library.errors import ConfigError
from library.models.keymap import linear_shapes
from library.models.shape import FluxShape
from library.networks import parts, plan

REAL = linear_shapes(FluxShape())
SMALL = linear_shapes(FluxShape(hidden=64, heads=2, mlp=256, double_blocks=3, single_blocks=4, axes_dim=(8, 12, 12)))


def planned(linears=None, **table):
    return plan(NetworkTable(**table), SMALL if linears is None else linears)


def modules(**table) -> set[str]:
    return {target.module for target in planned(**table).targets}


def diffusers_linears(settled) -> int:
    """How many diffusers linears a plan touches."""
    return sum(
        part.start >= start and part.stop <= stop
        for target in settled.targets
        for part in parts.parts(target.module, target.out_features, target.in_features)
        for group in target.groups
        for start, stop in group
    )


@pytest.mark.parametrize(
    ("preset", "layout", "linears", "pairs"),
    [
        ("reference", "split", 342, 342),
        ("reference", "fused", 342, 19 * 8 + 38),
        ("blocks", "fused", 19 * 12 + 38 * 5, 19 * 8 + 38 * 2),
        ("attn-mlp", "fused", 19 * 12 + 38 * 5, 19 * 8 + 38 * 2),
        ("attn", "fused", 19 * 8 + 38 * 3, 19 * 4 + 38),
        ("all-linear", "split", 504, 504),
    ],
)
def test_presets_on_the_real_model(preset: str, layout: str, linears: int, pairs: int) -> None:
    settled = planned(REAL, network_targets=preset, network_layout=layout)
    assert diffusers_linears(settled) == linears
    assert sum(len(target.groups) for target in settled.targets) == pairs


def test_reference_leaves_the_single_blocks_mlp_alone() -> None:
    linear1 = next(
        t for t in planned(REAL, network_targets="reference").targets if t.module == "single_blocks.0.linear1"
    )
    assert linear1.groups == (((0, 3 * 3072),),)
    assert not linear1.is_whole


def test_default_is_all_block_linears_but_modulation() -> None:
    chosen = modules()
    assert chosen == {m for m in SMALL if parts.is_block(m) and not parts.is_modulation(m)}


def test_suffixes_are_the_seeds() -> None:
    chosen = planned(lora_layers=("attn.to_q", "attn.to_v"), train_single_block_indices="none").targets
    assert {t.module for t in chosen} == {f"double_blocks.{i}.img_attn.qkv" for i in range(3)}
    assert chosen[0].groups == (((0, 64), (128, 192)),)
    assert modules(lora_layers=("x_embedder",)) == {"img_in"}


def test_patterns_include_and_exclude_under_any_name() -> None:
    chosen = modules(
        include_patterns=(r"^img_in$", r"double_blocks_0_img_mod"), exclude_patterns=(r"single_transformer_blocks\.",)
    )
    assert {"img_in", "double_blocks.0.img_mod.lin"} <= chosen
    assert not any(module.startswith("single") for module in chosen)


def test_block_indices() -> None:
    chosen = modules(train_double_block_indices="0-1", train_single_block_indices="3")
    assert {m.rsplit(".", 2)[0] if "blocks" not in m else ".".join(m.split(".")[:2]) for m in chosen} == {
        "double_blocks.0", "double_blocks.1", "single_blocks.3",
    }  # fmt: skip
    assert not any(m.startswith("double") for m in modules(network_args=("train_blocks=single",)))
    assert not any(m.startswith("single") for m in modules(network_args=("train_single_block_indices=none",)))


def test_ranks_alphas_and_rates_by_pattern() -> None:
    settled = planned(
        network_dim=8, network_alpha=4.0, network_reg_dims=(r"img_attn=16", r"linear2=2"),
        network_reg_alphas=(r"linear2=7",), network_reg_lrs=(r"single_blocks=3e-5",),
    )  # fmt: skip
    by_module = {target.module: target for target in settled.targets}
    assert (by_module["double_blocks.0.img_attn.qkv"].rank, by_module["double_blocks.0.img_attn.qkv"].alpha) == (16, 8)
    assert (by_module["single_blocks.0.linear2"].rank, by_module["single_blocks.0.linear2"].alpha) == (2, 7)
    assert (by_module["double_blocks.0.img_mlp.0"].rank, by_module["double_blocks.0.img_mlp.0"].alpha) == (8, 4)
    assert by_module["single_blocks.1.linear1"].learning_rate == 3e-5
    assert by_module["double_blocks.0.img_mlp.0"].learning_rate is None


def test_kohyas_ranks_by_kind_of_module() -> None:
    settled = planned(
        network_args=("img_attn_dim=6", "txt_mlp_dim=0", "img_mod_dim=3", "single_mod_dim=5", "in_dims=[2,0,0,0,7]")
    )
    ranks = {target.module: target.rank for target in settled.targets}
    assert ranks["double_blocks.0.img_attn.proj"] == 6
    assert "double_blocks.0.txt_mlp.0" not in ranks
    assert ranks["double_blocks.1.img_mod.lin"] == 3
    assert "double_blocks.1.txt_mod.lin" not in ranks
    assert ranks["single_blocks.0.modulation.lin"] == 5
    assert ranks["single_blocks.0.linear1"] == 4
    assert (ranks["img_in"], ranks["txt_in"]) == (2, 7)
    assert "time_in.in_layer" not in ranks


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"lora_layers": ("attn.to_qq",)}, "attn.to_q"),
        ({"include_patterns": ("img_attm",)}, "img_attn"),
        ({"exclude_patterns": ("linear3$",)}, "linear"),
        ({"include_patterns": ("img_(attn",)}, "regular expression"),
        ({"network_reg_dims": ("img_in=4",)}, "no trained linear"),
        ({"network_reg_dims": ("img_attn=four",)}, "regex=number"),
        ({"train_double_block_indices": "0-7"}, "0 to 2"),
        ({"train_single_block_indices": "two"}, "0-3,5"),
        ({"train_double_block_indices": "none", "train_single_block_indices": "none"}, "trains no module"),
        ({"network_args": ("network_reg_dims=x=4",), "network_reg_dims": ("y=4",)}, "give one of them"),
        ({"train_x_embedder_bias": True}, "train_x_embedder"),
    ],
)
def test_what_selects_nothing_is_refused(table: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says.replace("(", r"\(")):
        planned(**table)


def test_x_embedder_in_full_is_no_target_as_well() -> None:
    settled = planned(network_targets="all-linear", train_x_embedder=True)
    assert settled.x_embedder
    assert "img_in" not in {target.module for target in settled.targets}
