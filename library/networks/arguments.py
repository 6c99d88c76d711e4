"""`network_module` and `network_args` as kohya's users write them, checked and turned into one frozen `Settings`.

LyCORIS ignores a misspelt argument and asserts on a misspelt preset; here every name is checked against what the
chosen kind really reads, and what cannot be made right is refused with the reason. Needs no torch.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field

from library.config.tables.network import NetworkTable
from library.errors import ConfigError

MODULES = {
    "lora": "lora",
    "networks.lora": "lora",
    "networks.lora_flux": "lora",
    "lycoris.kohya": "locon",
    "lycoris": "locon",
    "locon": "locon",
    "loha": "loha",
    "lokr": "lokr",
    "glora": "glora",
    "diag-oft": "diag-oft",
    "full": "full",
}
REFUSED = {
    "dylora": "its files come out wrong when they are read again (lycoris-lora 4.1.3)",
    "ia3": "lycoris-lora 4.1.3 cannot load its files again, and no FLUX program reads them",
    "boft": "it cannot decompose FLUX's layer sizes (lycoris-lora 4.1.3)",
    "tlora": "merging it fails in lycoris-lora 4.1.3, and no FLUX program reads its files",
    "norms": "FLUX's normalisation layers have no weight to train",
}
KIND_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "lora": (),
    "locon": ("wd_on_output",),
    "loha": ("wd_on_output",),
    "lokr": ("wd_on_output", "factor", "decompose_both", "full_matrix", "unbalanced_factorization"),
    "glora": (),
    "diag-oft": (),
    "full": (),
}
"""What each kind reads beyond the arguments that all of them share."""

DIMS = (
    "img_attn_dim", "txt_attn_dim", "img_mlp_dim", "txt_mlp_dim", "img_mod_dim", "txt_mod_dim", "single_dim",
    "single_mod_dim",
)  # fmt: skip
"""kohya's ranks by kind of module; 0 leaves the modules out."""
IN_DIMS = ("img_in", "time_in", "vector_in", "guidance_in", "txt_in")
"""The modules that kohya's `in_dims` lists ranks for, in its order."""

_DROPS_RANKS = ("lora", "locon")
_REFUSED_ARGUMENTS = {
    "preset": "LyCORIS's presets select nothing in a FLUX transformer: use network_targets or lora_layers",
    "train_norm": REFUSED["norms"],
    "use_tucker": "it is for convolutions, and the transformer has none",
    "use_cp": "it is for convolutions, and the transformer has none",
    "use_conv_cp": "it is for convolutions, and the transformer has none",
    "conv_dim": "it is for convolutions, and the transformer has none",
    "conv_alpha": "it is for convolutions, and the transformer has none",
    "use_scalar": "it only renames the step size: set the learning rate",
    "block_size": "it belongs to dylora, which is refused",
    "train_t5xxl": "T5's embeddings are cached and T5 is never loaded by the trainer",
    "constraint": "ComfyUI, the one program that loads diag-oft, reads it as another quantity",
    "rescaled": "ComfyUI, the one program that loads diag-oft, does not apply it",
    "ggpo_sigma": "it is not built",
    "ggpo_beta": "it is not built",
    "rank_dropout_scale": "dropped ranks are always made up for here, so the switch has nothing to do",
    "conv_block_dims": "it is for convolutions, and the transformer has none",
    "loraplus_lr_ratio": "write it as a key of its own: loraplus_lr_ratio in [optimizer]",
    "loraplus_unet_lr_ratio": "write loraplus_lr_ratio in [optimizer]",
    "loraplus_text_encoder_lr_ratio": "write loraplus_lr_ratio in [optimizer]",
}


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"network_args: {name}={text!r} is no number") from None


def _whole(name: str, text: str) -> int:
    value = _number(name, text)
    if value != int(value):
        raise ConfigError(f"network_args: {name}={text!r} is no whole number")
    return int(value)


def _switch(name: str, text: str) -> bool:
    lowered = text.lower()
    if lowered not in ("true", "false", "1", "0"):
        raise ConfigError(f"network_args: {name}={text!r} is neither true nor false")
    return lowered in ("true", "1")


def _whole_list(name: str, text: str) -> tuple[int, ...]:
    return tuple(_whole(name, part.strip()) for part in text.strip("[]").split(","))


_READERS: dict[str, Callable[[str, str], object]] = {
    "wd_on_output": _switch,
    "factor": _whole,
    "decompose_both": _switch,
    "full_matrix": _switch,
    "unbalanced_factorization": _switch,
    "dora_wd": _switch,
    "rs_lora": _switch,
    "bypass_mode": _switch,
    "split_qkv": _switch,
    "dropout": _number,
    "rank_dropout": _number,
    "module_dropout": _number,
    "train_blocks": lambda name, text: text,
    "verbose": _switch,
    "algo": lambda name, text: text.lower(),
    "train_double_block_indices": lambda name, text: text,
    "train_single_block_indices": lambda name, text: text,
    "network_reg_dims": lambda name, text: tuple(text.split(",")),
    "network_reg_lrs": lambda name, text: tuple(text.split(",")),
    "in_dims": _whole_list,
    **dict.fromkeys(DIMS, _whole),
}
_SHARED = tuple(name for name in _READERS if all(name not in names for names in KIND_ARGUMENTS.values()))


_OWN_KEYS = ("train_double_block_indices", "train_single_block_indices", "network_reg_dims", "network_reg_lrs")


@dataclass(frozen=True)
class Settings:
    """The network that a configuration means, every alias and argument resolved."""

    kind: str
    module_name: str
    rank: int
    alpha: float | None
    layout: str
    dropout: float = 0.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    init: str = "gaussian"
    dims: dict[str, int] = field(default_factory=dict)
    in_dims: dict[str, int] = field(default_factory=dict)
    train_blocks: str = "all"
    export_rank: int | None = None
    algorithm: dict[str, object] = field(default_factory=dict)

    def scale_of(self, rank: int, alpha: float) -> float:
        """What the product of the factors is multiplied by: alpha / rank, with rsLoRA alpha / sqrt(rank)."""
        return alpha / (rank**0.5 if self.rslora else rank)

    def alpha_of(self, rank: int, scale: float) -> float:
        """The alpha that gives a scale: the inverse of `scale_of`."""
        return scale * (rank**0.5 if self.rslora else rank)


def with_own_keys(table: NetworkTable) -> NetworkTable:
    """The table with those of network_args that have keys of their own moved there."""
    given = _parsed(table.network_args)
    moved = {name: _READERS[name](name, given[name]) for name in _OWN_KEYS if name in given}
    for name in moved:
        if table.changed(name):
            raise ConfigError(f"{name} stands both in network_args and as a key of its own: give one of them")
    return table.model_copy(update=moved) if moved else table


def resolve(table: NetworkTable) -> Settings:
    """Read the table's network_module and network_args. Raises ConfigError naming what is wrong and what to write."""
    given = _parsed(table.network_args)
    kind = _kind(table.network_module, given)
    values = {name: _READERS[name](name, text) for name, text in given.items()}
    _check_readable(kind, values)
    settings = Settings(
        kind=kind,
        module_name="networks.lora_flux" if kind == "lora" else "lycoris.kohya",
        rank=table.network_dim,
        alpha=table.network_alpha,
        layout="split" if values.get("split_qkv") else table.network_layout,
        dropout=_either(table.network_dropout, values, "dropout", "network_dropout") or 0.0,
        rank_dropout=_either(table.rank_dropout, values, "rank_dropout") or 0.0,
        module_dropout=_either(table.module_dropout, values, "module_dropout") or 0.0,
        rslora=table.use_rslora or bool(values.get("rs_lora")),
        dora=table.use_dora or bool(values.get("dora_wd")),
        init=table.network_init,
        dims={name: values[name] for name in DIMS if name in values},
        in_dims=dict(zip(IN_DIMS, values.get("in_dims", ()))),
        export_rank=table.export_rank,
        train_blocks=values.get("train_blocks", "all"),
        algorithm={name: values[name] for name in KIND_ARGUMENTS[kind] if name in values},
    )
    _check_combination(settings, table, values)
    return settings


def _parsed(arguments: tuple[str, ...]) -> dict[str, str]:
    given: dict[str, str] = {}
    for argument in arguments:
        name, _, text = argument.partition("=")
        name = name.strip()
        if name in given:
            raise ConfigError(f"network_args: {name} is given twice")
        if name in _REFUSED_ARGUMENTS:
            raise ConfigError(f"network_args: {name} is refused: {_REFUSED_ARGUMENTS[name]}")
        if name not in _READERS:
            raise ConfigError(f"network_args: there is no {name!r}{_near(name, list(_READERS))}")
        given[name] = text.strip()
    return given


def _near(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"; did you mean {', '.join(near)}?" if near else f"; known are {', '.join(sorted(known))}"


def _kind(module: str, given: dict[str, str]) -> str:
    name = module.lower()
    if name in REFUSED:
        raise ConfigError(f"network_module = {module!r} is refused: {REFUSED[name]}. Use lora, loha or lokr.")
    if name not in MODULES:
        raise ConfigError(f"network_module: there is no {module!r}{_near(name, list(MODULES))}")
    algorithm = given.get("algo", "").lower()
    if not algorithm:
        return MODULES[name]
    if algorithm in REFUSED:
        raise ConfigError(f"network_args: algo={algorithm} is refused: {REFUSED[algorithm]}. Use locon, loha or lokr.")
    algorithm = {"lora": "locon"}.get(algorithm, algorithm)
    if algorithm not in KIND_ARGUMENTS:
        raise ConfigError(f"network_args: there is no algo {algorithm!r}{_near(algorithm, list(KIND_ARGUMENTS))}")
    if not name.startswith("lycoris") and MODULES[name] != algorithm:
        raise ConfigError(f"network_args: algo={algorithm} contradicts network_module = {module!r}: give one of them")
    return algorithm


def _check_readable(kind: str, values: dict[str, object]) -> None:
    for name in values:
        if name not in _SHARED and name not in KIND_ARGUMENTS[kind]:
            owners = ", ".join(owner for owner, names in KIND_ARGUMENTS.items() if name in names)
            raise ConfigError(f"network_args: {name} does nothing for {kind}; it belongs to {owners}")


def _either(own: float | None, values: dict[str, object], name: str, key: str | None = None) -> float | None:
    if own is not None and name in values:
        raise ConfigError(f"{key or name} and network_args {name}={values[name]} say the same thing: give one of them")
    value = values.get(name, own)
    if value is not None and not 0 <= value < 1:
        raise ConfigError(f"network_args: {name}={value} must be at least 0 and below 1")
    return value


def _check_combination(settings: Settings, table: NetworkTable, values: dict[str, object]) -> None:
    kind = settings.kind
    if table.conv_dim is not None or table.conv_alpha is not None:
        raise ConfigError("conv_dim and conv_alpha are for convolutions, and FLUX's transformer has none: remove them")
    if settings.train_blocks not in ("all", "double", "single"):
        raise ConfigError(f"network_args: train_blocks={settings.train_blocks} is none of all, double, single")
    if table.export_rank is not None and kind != "full" and not settings.dora:
        raise ConfigError(f"export_rank is for full and DoRA; {kind} is saved as it is")
    _check_dora(settings, values)
    if kind not in _DROPS_RANKS and (settings.rank_dropout or settings.dropout):
        raise ConfigError(
            f"{kind} has no ranks to drop: use module_dropout instead of network_dropout and rank_dropout"
        )
    if kind == "diag-oft" and not table.allow_comfy_only:
        raise ConfigError(
            "diag-oft files load in ComfyUI and LyCORIS only (Forge refuses the file, diffusers and sd-scripts ignore"
            " it). Set allow_comfy_only = true to accept that, or use lora, loha or lokr."
        )
    if table.scale_weight_norms is not None and (kind == "diag-oft" or settings.dora):
        raise ConfigError(
            f"scale_weight_norms: the change of {'DoRA' if settings.dora else kind} cannot be scaled down"
        )
    if settings.rslora and kind in ("diag-oft", "full"):
        raise ConfigError(f"use_rslora scales by the rank, and {kind} has none")
    if table.changed("network_init") and kind not in ("lora", "locon"):
        raise ConfigError(f"network_init has nothing to do for {kind}, which has its own start")


def _check_dora(settings: Settings, values: dict[str, object]) -> None:
    if not settings.dora:
        return
    if settings.kind not in ("lora", "locon", "loha", "lokr"):
        raise ConfigError(f"DoRA cannot be put on {settings.kind}: use it with lora, loha or lokr, or remove use_dora")
    if values.get("bypass_mode") or settings.dropout or settings.rank_dropout:
        raise ConfigError(
            "DoRA needs the whole weight: bypass_mode, network_dropout and rank_dropout cannot act with it"
        )
    if settings.layout == "split":
        raise ConfigError('DoRA is trained on whole modules: use network_layout = "fused"')
    if settings.init == "pissa":
        raise ConfigError('network_init = "pissa" and DoRA cannot be combined: choose one')
