"""The dimensions of a FLUX transformer, and what its input width says about the checkpoint. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from library.errors import ModelError

FILL_CHANNELS = 384
INPUT_WIDTHS = {
    64: "FLUX.1 dev (or schnell), the text-to-image model",
    128: "a FLUX.1 Canny, Depth or Kontext-like model with one extra latent",
    384: "FLUX.1 Fill",
    448: "ACE++, which adds a reference latent to FLUX.1 Fill",
}


@dataclass(frozen=True)
class FluxShape:
    """Everything that distinguishes one FLUX transformer from another; the defaults are FLUX.1 Fill [dev]'s."""

    hidden: int = 3072
    heads: int = 24
    mlp: int = 12288
    double_blocks: int = 19
    single_blocks: int = 38
    in_channels: int = 384
    out_channels: int = 64
    text_width: int = 4096
    pooled_width: int = 768
    guidance: bool = True
    axes_dim: tuple[int, int, int] = (16, 56, 56)

    def __post_init__(self) -> None:
        odd = any(width % 2 for width in self.axes_dim)
        if self.hidden % self.heads or sum(self.axes_dim) != self.head_dim or odd:
            raise ModelError(
                f"a FLUX transformer of width {self.hidden} with {self.heads} heads and rotary axes {self.axes_dim}:"
                " the width must be a multiple of the heads, and the axes even and add up to the width of a head"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads

    def require_fill(self, source: str) -> None:
        """Raise ModelError if the input width is not FLUX.1 Fill's, saying what the file is instead."""
        if self.in_channels != FILL_CHANNELS:
            what = INPUT_WIDTHS.get(self.in_channels, "no FLUX.1 model known to InFlux")
            raise ModelError(
                f"{source}: img_in takes {self.in_channels} channels, so this is {what}, not FLUX.1 Fill"
                f" ({FILL_CHANNELS}). Use FLUX.1-Fill-dev: its diffusers folder, flux1-fill-dev.safetensors or a GGUF."
            )


def axes_for(head_dim: int) -> tuple[int, int, int]:
    """The rotary axes of a head whose file does not say them: FLUX's ratio 1 : 3.5 : 3.5, in even numbers."""
    side = max(2, round(head_dim * 7 / 16 / 2) * 2)
    return (head_dim - 2 * side, side, side)


def shape_of_config(config: dict) -> FluxShape:
    """The shape that a diffusers `transformer/config.json` describes."""
    heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
    in_channels = config["in_channels"]
    return FluxShape(
        hidden=heads * head_dim,
        heads=heads,
        mlp=4 * heads * head_dim,
        double_blocks=config["num_layers"],
        single_blocks=config["num_single_layers"],
        in_channels=in_channels,
        out_channels=config.get("out_channels") or in_channels,
        text_width=config["joint_attention_dim"],
        pooled_width=config["pooled_projection_dim"],
        guidance=config.get("guidance_embeds", False),
        axes_dim=tuple(config.get("axes_dims_rope", (16, 56, 56))),
    )


def diffusers_config(shape: FluxShape) -> dict:
    """The `transformer/config.json` that makes diffusers build this shape: the reverse of `shape_of_config`."""
    return {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": shape.in_channels,
        "out_channels": shape.out_channels,
        "num_layers": shape.double_blocks,
        "num_single_layers": shape.single_blocks,
        "attention_head_dim": shape.head_dim,
        "num_attention_heads": shape.heads,
        "joint_attention_dim": shape.text_width,
        "pooled_projection_dim": shape.pooled_width,
        "guidance_embeds": shape.guidance,
        "axes_dims_rope": list(shape.axes_dim),
    }


def shape_of_diffusers_tensors(shapes: dict[str, tuple[int, ...]]) -> FluxShape:
    """The shape of a diffusers checkpoint that comes without its config.json."""
    hidden, in_channels = shapes["x_embedder.weight"]
    head_dim = shapes.get("transformer_blocks.0.attn.norm_q.weight", (128,))[0]
    return FluxShape(
        hidden=hidden,
        heads=hidden // head_dim,
        mlp=shapes.get("transformer_blocks.0.ff.net.0.proj.weight", (4 * hidden,))[0],
        double_blocks=_count(shapes, "transformer_blocks."),
        single_blocks=_count(shapes, "single_transformer_blocks."),
        in_channels=in_channels,
        out_channels=shapes.get("proj_out.weight", (64,))[0],
        text_width=shapes.get("context_embedder.weight", (0, 4096))[1],
        pooled_width=shapes.get("time_text_embed.text_embedder.linear_1.weight", (0, 768))[1],
        guidance="time_text_embed.guidance_embedder.linear_1.weight" in shapes,
        axes_dim=(16, 56, 56) if head_dim == 128 else axes_for(head_dim),
    )


def shape_of_tensors(shapes: dict[str, tuple[int, ...]], source: str) -> FluxShape:
    """The shape that a BFL checkpoint's tensors have; `shapes` maps BFL names to their true shapes."""
    needed = ("img_in.weight", "txt_in.weight", "vector_in.in_layer.weight", "final_layer.linear.weight")
    missing = [name for name in needed if name not in shapes]
    if missing:
        raise ModelError(f"{source} is no FLUX transformer: it lacks {', '.join(missing)}")
    hidden, in_channels = shapes["img_in.weight"]
    head_dim = shapes.get("double_blocks.0.img_attn.norm.query_norm.scale", (128,))[0]
    mlp = shapes.get("double_blocks.0.img_mlp.0.weight", (4 * hidden,))[0]
    return FluxShape(
        hidden=hidden,
        heads=hidden // head_dim,
        mlp=mlp,
        double_blocks=_count(shapes, "double_blocks."),
        single_blocks=_count(shapes, "single_blocks."),
        in_channels=in_channels,
        out_channels=shapes["final_layer.linear.weight"][0],
        text_width=shapes["txt_in.weight"][1],
        pooled_width=shapes["vector_in.in_layer.weight"][1],
        guidance="guidance_in.in_layer.weight" in shapes,
        axes_dim=(16, 56, 56) if head_dim == 128 else axes_for(head_dim),
    )


def _count(shapes: dict[str, tuple[int, ...]], prefix: str) -> int:
    return 1 + max((int(name[len(prefix) :].split(".")[0]) for name in shapes if name.startswith(prefix)), default=-1)
