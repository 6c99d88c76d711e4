"""network_module and network_args as kohya's users write them: read, or refused with the reason."""

import pytest

from library.config.tables.network import NetworkTable
from library.errors import ConfigError
from library.networks.arguments import resolve


def resolved(module: str = "lora", *args: str, **table):
    return resolve(NetworkTable(network_module=module, network_args=args, **table))


@pytest.mark.parametrize(
    ("module", "args", "kind"),
    [
        ("lora", (), "lora"),
        ("networks.lora_flux", (), "lora"),
        ("lycoris.kohya", (), "locon"),
        ("lycoris.kohya", ("algo=lora",), "locon"),
        ("lycoris.kohya", ("algo=lokr", "factor=8", "decompose_both=True"), "lokr"),
        ("loha", (), "loha"),
        ("glora", ("algo=glora",), "glora"),
    ],
)
def test_kinds(module: str, args: tuple[str, ...], kind: str) -> None:
    assert resolved(module, *args).kind == kind


def test_arguments_are_typed() -> None:
    settings = resolved("lycoris.kohya", "algo=lokr", "factor=8", "decompose_both=True", "module_dropout=0.25")
    assert settings.algorithm == {"factor": 8, "decompose_both": True}
    assert settings.module_dropout == 0.25
    settings = resolved("lora", "rank_dropout=0.5", "split_qkv=true", "rs_lora=1", network_dim=16, network_alpha=8.0)
    assert (settings.rank_dropout, settings.layout, settings.rslora) == (0.5, "split", True)
    assert settings.scale_of(16, 8.0) == 2.0


@pytest.mark.parametrize(
    ("module", "args", "table", "says"),
    [
        ("lycoris.kohya", ("algo=dylora",), {}, "wrong when they are read again"),
        ("ia3", (), {}, "refused"),
        ("lycoris.kohya", ("algo=boft",), {}, "decompose"),
        ("lokrr", (), {}, "lokr"),
        ("lycoris.kohya", ("algo=lokrr",), {}, "lokr"),
        ("lora", ("rank_dropuot=0.1",), {}, "rank_dropout"),
        ("lora", ("rank_dropout=many",), {}, "no number"),
        ("lora", ("rank_dropout=1.5",), {}, "below 1"),
        ("lora", ("rank_dropout=0.1", "rank_dropout=0.2"), {}, "twice"),
        ("lora", ("rank_dropout=0.1",), {"rank_dropout": 0.2}, "give one of them"),
        ("lora", ("factor=8",), {}, "belongs to lokr"),
        ("lora", ("algo=lokr",), {}, "contradicts"),
        ("lora", ("train_norm=true",), {}, "no weight to train"),
        ("lora", ("preset=attn-mlp",), {}, "network_targets"),
        ("lora", ("conv_dim=8",), {}, "convolutions"),
        ("lora", (), {"conv_dim": 8}, "convolutions"),
        ("lora", ("use_tucker=true",), {}, "convolutions"),
        ("lora", ("train_blocks=some",), {}, "none of all"),
        ("lokr", (), {"network_dropout": 0.1}, "no ranks to drop"),
        ("lokr", (), {"network_init": "pissa"}, "own start"),
        ("glora", (), {"use_dora": True}, "cannot be put on"),
        ("lora", (), {"use_dora": True, "network_dropout": 0.1}, "whole weight"),
        ("lora", (), {"use_dora": True, "network_layout": "split"}, "fused"),
        ("lora", (), {"use_dora": True, "network_init": "pissa"}, "choose one"),
        ("diag-oft", (), {}, "allow_comfy_only"),
        ("diag-oft", ("rescaled=true",), {"allow_comfy_only": True}, "does not apply it"),
        ("full", (), {"use_rslora": True}, "rslora"),
    ],
)
def test_refusals_give_the_reason(module: str, args: tuple[str, ...], table: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        resolved(module, *args, **table)
