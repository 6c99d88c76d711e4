"""A FLUX.1 Fill of the real classes, some hundred kilobytes large, with random weights: what the tests run on.

`tiny_base` writes the folder layout of FLUX.1-Fill-dev, so that `FluxFillPipeline.from_pretrained` and InFlux load the
same files. Nothing is trained here: it answers "is this the same function", never "is this a good picture".
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

WORDS = (
    "a an the and with of on in to red green blue yellow black white grey orange purple pink brown cyan teal violet"
    " lime gold circle square triangle star outline background fill filled shape scene make it turn into image picture"
).split()
T5_LENGTH = 32
CLIP_LENGTH = 77


def byte_symbols() -> list[str]:
    """The 256 printable characters that byte-level BPE writes for bytes (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in printable}
    extra = [byte for byte in range(256) if byte not in table]
    table.update({byte: chr(256 + position) for position, byte in enumerate(extra)})
    return [table[byte] for byte in range(256)]


def clip_tokenizer(words: tuple[str, ...] | list[str] = WORDS):
    """A byte-level BPE that knows `words` whole and spells everything else."""
    from transformers import CLIPTokenizer

    symbols = byte_symbols()
    vocabulary = symbols + [symbol + "</w>" for symbol in symbols]
    merges: list[tuple[str, str]] = []
    for word in words:
        left, *rest = [*word[:-1], word[-1] + "</w>"]
        for right in rest:
            if (left, right) not in merges:
                merges.append((left, right))
                vocabulary.append(left + right)
            left += right
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    unique = list(dict.fromkeys(vocabulary))
    return CLIPTokenizer(
        vocab={token: position for position, token in enumerate(unique)}, merges=merges, model_max_length=CLIP_LENGTH
    )


def t5_tokenizer(words: tuple[str, ...] | list[str] = WORDS, length: int = T5_LENGTH):
    """A Unigram vocabulary that knows `words` whole and spells everything else."""
    from transformers import T5TokenizerFast

    pieces: list[tuple[str, float]] = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -3.0) for word in words]
    pieces += [(chr(code), -8.0) for code in range(33, 127)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=length)


def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Give every parameter a value of its own, so that no swapped or forgotten tensor can go unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.1 * values if is_norm else values * (0.1 if parameter.ndim == 1 else fan_in**-0.5))
    return model.eval().requires_grad_(False)


def tiny_transformer(
    *, heads: int = 2, head_dim: int = 16, double: int = 2, single: int = 2, in_channels: int = 384,
    out_channels: int = 64, text: int = 32, pooled: int = 32, guidance: bool = True,
    axes: tuple[int, int, int] = (4, 6, 6), seed: int = 0,
):  # fmt: skip
    """diffusers' own `FluxTransformer2DModel` at toy size: also the oracle of the tests."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=in_channels, out_channels=out_channels, num_layers=double, num_single_layers=single,
        attention_head_dim=head_dim, num_attention_heads=heads, joint_attention_dim=text, pooled_projection_dim=pooled,
        guidance_embeds=guidance, axes_dims_rope=axes,
    )  # fmt: skip
    return randomise(model, seed)


def tiny_vae(seed: int = 1):
    """An `AutoencoderKL` of FLUX's shape: 16 latent channels, factor 8, no quantising convolutions."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, latent_channels=16, norm_num_groups=4,
        sample_size=64, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    return randomise(vae, seed)


def tiny_clip(tokenizer, width: int = 32, seed: int = 2):
    """A two-layer `CLIPTextModel` for that vocabulary."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return randomise(
        CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
                num_attention_heads=2, projection_dim=width, max_position_embeddings=CLIP_LENGTH,
                bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        ),
        seed,
    )  # fmt: skip


def tiny_t5(tokenizer, width: int = 32, seed: int = 3):
    """A two-layer `T5EncoderModel` (gated GELU, as T5 v1.1) for that vocabulary."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=width // 2, d_ff=2 * width, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return randomise(T5EncoderModel(config), seed)


def tiny_pipeline(**shape):
    """The whole pipeline in memory; `shape` is passed to `tiny_transformer`."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxFillPipeline

    clip_words, t5_words = clip_tokenizer(), t5_tokenizer()
    return FluxFillPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
        vae=tiny_vae(), text_encoder=tiny_clip(clip_words, shape.get("pooled", 32)), tokenizer=clip_words,
        text_encoder_2=tiny_t5(t5_words, shape.get("text", 32)), tokenizer_2=t5_words,
        transformer=tiny_transformer(**shape),
    )  # fmt: skip


def tiny_base(folder: Path, *, dtype: torch.dtype = torch.float32, **shape) -> Path:
    """Write a random FLUX.1 Fill pipeline folder (with `influx.json`) and return its path."""
    folder = Path(folder)
    tiny_pipeline(**shape).to(dtype=dtype).save_pretrained(folder)
    defaults = {"t5xxl_max_token_length": T5_LENGTH, "sample_guidance_scale": 3.5, "sample_steps": 4}
    (folder / "influx.json").write_text(json.dumps(defaults, indent=2) + "\n", encoding="utf-8")
    return folder
