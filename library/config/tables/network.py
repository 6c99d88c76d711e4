"""What is trained: the kind of network, its rank, its targets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from library.config.table import Arguments, FilePath, FilePaths, Floats, Strings, Table, key

if TYPE_CHECKING:
    from library.config.run import Run

_PATTERNS = ("include_patterns", "exclude_patterns", "network_reg_dims", "network_reg_alphas", "network_reg_lrs")


class NetworkTable(Table):
    """The network that is trained on top of the frozen base."""

    section: ClassVar[str] = "network"
    reads: ClassVar[str] = "train"

    network_module: str = key("lora", kohya="none (required)")
    """Kind of network: lora, locon, loha, lokr, glora, diag-oft, full. kohya's networks.lora_flux and lycoris.kohya
    (with algo=... in network_args) mean the same."""
    network_dim: int = key(4, aliases=("rank",), ge=1)
    """Rank."""
    network_alpha: float | None = key(None, gt=0, kohya="1")
    """Scale of the network is alpha / rank; the rank if not set."""
    network_args: Arguments = key(())
    """Further arguments as "name=value", as kohya's scripts take them: algo, factor, rank_dropout,
    train_double_block_indices, ... A name that has its own key here may be given either way, not both."""
    network_layout: Literal["fused", "split"] = key("fused")
    """fused: q, k, v (and the single blocks' mlp input) share one down-projection, as in kohya's files. split: one
    pair per linear, as in diffusers' training scripts."""
    network_targets: Literal["blocks", "attn", "attn-mlp", "all-linear", "reference"] = key("blocks", seed="reference")
    """Which linears: `blocks` = all of the blocks but modulation, `attn`, `attn-mlp`, `all-linear`, or `reference` =
    InFluxEdit's list."""
    lora_layers: Strings = key((), comma=True)
    """Suffixes of module names to train instead of network_targets: attn.to_k, attn.to_q, ..."""
    include_patterns: Strings = key(())
    """Regular expressions: train these modules as well, even if network_targets leaves them out."""
    exclude_patterns: Strings = key(())
    """Regular expressions: do not train these modules."""
    train_double_block_indices: str = key("all")
    """Double blocks to train: all, none, or a list as 0-3,5."""
    train_single_block_indices: str = key("all")
    """Single blocks to train: all, none, or a list as 0-3,5."""
    network_reg_dims: Arguments = key(())
    """Rank per module, as "regex=rank"; the first match counts."""
    network_reg_alphas: Arguments = key(())
    """Alpha per module, as "regex=alpha"; the first match counts. The module's rank if not set."""
    network_reg_lrs: Arguments = key(())
    """Learning rate per module, as "regex=rate"; the first match counts."""
    conv_dim: int | None = key(None, ge=1)
    """Rank for convolutions. Refused: FLUX's transformer has none."""
    conv_alpha: float | None = key(None, gt=0)
    """Alpha for convolutions. Refused: FLUX's transformer has none."""
    network_dropout: float | None = key(None, ge=0, lt=1)
    """Share of the down-projected values that is dropped in each step."""
    rank_dropout: float | None = key(None, ge=0, lt=1)
    """Share of the ranks that is dropped in each step."""
    module_dropout: float | None = key(None, ge=0, lt=1)
    """Chance that a module is left out of a step."""
    use_rslora: bool = key(False)
    """Scale by alpha / sqrt(rank) instead of alpha / rank."""
    use_dora: bool = key(False)
    """Train magnitude and direction apart (DoRA). Not over a quantised base."""
    export_rank: int | None = key(None, ge=1)
    """Rank of the LoRA that `full` or DoRA is saved as; what that loses is printed. If not set, `full` is saved without
    loss, DoRA at twice network_dim."""
    scale_weight_norms: float | None = key(None, gt=0)
    """Largest norm of a module's change; larger ones are scaled down after each step."""
    network_init: Literal["kaiming", "gaussian", "pissa"] = key("gaussian", kohya="kaiming")
    """Start of the down-projection: gaussian as InFluxEdit, kaiming as kohya, or pissa (the base weight's largest
    singular directions)."""
    network_weights: FilePath | None = key(None, path="path", exists="train")
    """A trained file to start from: InFlux, kohya, OneTrainer, ai-toolkit or diffusers. It is kept exactly, with the
    scale it was trained at (unless network_alpha is set), or refused. CLIP-L's part needs train_text_encoder."""
    dim_from_weights: bool = key(False)
    """Take the targets, and rank and scale of each, from network_weights."""
    base_weights: FilePaths = key((), path="path", exists="train infer", reads="train infer")
    """Files that are merged into the base before training. CLIP-L's part needs train_text_encoder."""
    base_weights_multiplier: Floats = key((), only_with="base_weights", reads="train infer")
    """Strength of each of base_weights; 1 if not set."""
    train_x_embedder: bool = key(False, aliases=("train_embedder",))
    """Train the image input layer (x_embedder, img_in) in full. It travels in the same file as an exact
    factorisation, and a second file in diffusers' layout is written."""
    train_x_embedder_bias: bool = key(False, only_with="train_x_embedder")
    """Train the bias of x_embedder as well."""
    train_text_encoder: bool = key(False, kohya="true")
    """Train a LoRA on CLIP-L (q, k, v, out). T5 stays cached."""
    text_encoder_dim: int | None = key(None, ge=1, only_with="train_text_encoder")
    """Rank of the CLIP-L network; network_dim if not set."""
    allow_comfy_only: bool = key(False, rerun=True)
    """Accept a network whose file only ComfyUI loads (diag-oft)."""

    def problems(self, run: Run) -> Iterator[tuple[list[str], str]]:
        """Patterns that cannot be read, and networks that cannot be on this base."""
        if self.dim_from_weights and not self.network_weights:
            yield ["dim_from_weights"], "dim_from_weights needs network_weights: a file to take the ranks from."
        if self.base_weights_multiplier and len(self.base_weights_multiplier) != len(self.base_weights):
            counts = f"{len(self.base_weights_multiplier)} strengths for {len(self.base_weights)} files"
            yield ["base_weights_multiplier"], f"base_weights_multiplier: {counts}; give one for each, or none."
        quantised = run.memory.base_precision in ("fp8", "int8", "nf4")
        dora = self.use_dora or any(text.replace(" ", "").lower() == "dora_wd=true" for text in self.network_args)
        if dora and quantised:
            yield (
                ["use_dora", "network_args", "base_precision"],
                f"DoRA over a base in {run.memory.base_precision} would train as a plain network, silently. "
                "Turn DoRA off, or use base_precision = bf16.",
            )
        for name in ("train_double_block_indices", "train_single_block_indices"):
            text = getattr(self, name)
            if not re.fullmatch(r"all|none|\d+(-\d+)?(,\d+(-\d+)?)*", text.replace(" ", "")):
                yield [name], f'{name} = "{text}": write all, none, or numbers and ranges as 0-3,5.'
        for name in (
            "include_patterns",
            "exclude_patterns",
            "network_reg_dims",
            "network_reg_alphas",
            "network_reg_lrs",
        ):
            for text in getattr(self, name):
                pattern = text.rpartition("=")[0] if name.startswith("network_reg") else text
                try:
                    re.compile(pattern)
                except re.error as error:
                    yield [name], f'{name}: "{pattern}" is no regular expression: {error}.'

    def cautions(self, run: Run) -> Iterator[tuple[list[str], str]]:
        """lora_layers takes the place of a preset."""
        if self.lora_layers and self.changed("network_targets"):
            yield ["network_targets"], "network_targets does nothing here: lora_layers names the modules."
