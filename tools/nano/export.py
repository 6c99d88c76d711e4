"""Assembles the trained parts into a folder that FluxFillPipeline.from_pretrained loads.

python -m tools.nano.export --work_dir output/nano --output_dir nano
"""

import argparse
import json
import os
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxFillPipeline, FluxTransformer2DModel

from tools.nano.bank import Encoders, load_encoders
from tools.nano.flow import CONFIG as TRANSFORMER_CONFIG
from tools.nano.texts import T5_LENGTH
from tools.nano.vae import CONFIG as VAE_CONFIG

DEFAULTS = {"t5xxl_max_token_length": T5_LENGTH, "sample_guidance_scale": 30.0, "sample_steps": 12}
"""influx.json: what this base wants. Guidance is without effect by training; 30 is FLUX Fill's usual number."""


def export_vae(work_dir: Path, encoders: Encoders) -> AutoencoderKL:
    """The VAE with the polished decoder if there is one, and the latents' statistics in its config."""
    vae = AutoencoderKL(**VAE_CONFIG, scaling_factor=encoders.scale, shift_factor=encoders.shift, force_upcast=False)
    polished, joint = work_dir / "vae_decoder.pt", work_dir / "vae_joint.pt"
    vae.load_state_dict(torch.load(polished if polished.exists() else joint)["model"])
    return vae.to(memory_format=torch.contiguous_format)


def export_transformer(work_dir: Path, encoders: Encoders) -> FluxTransformer2DModel:
    """The averaged weights; refuses a transformer that was trained on latents of other statistics."""
    state = torch.load(work_dir / "transformer.pt")
    if (state["shift"], state["scale"]) != (encoders.shift, encoders.scale):
        raise ValueError(f"the transformer was trained with latent shift {state['shift']} and scale {state['scale']}")
    transformer = FluxTransformer2DModel(**TRANSFORMER_CONFIG)
    transformer.load_state_dict(state["average"])
    return transformer


def build_pipeline(work_dir: Path) -> FluxFillPipeline:
    """The whole pipeline, in float32."""
    encoders = load_encoders(work_dir)
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    return FluxFillPipeline(
        scheduler=scheduler,
        vae=export_vae(work_dir, encoders),
        text_encoder=encoders.clip,
        tokenizer=encoders.clip_tokenizer,
        text_encoder_2=encoders.t5,
        tokenizer_2=encoders.t5_tokenizer,
        transformer=export_transformer(work_dir, encoders),
    )


def name_fast_tokenizer(folder: Path) -> None:
    """Name T5's tokenizer as FLUX.1-Fill-dev does; older transformers need the fast one."""
    for path in (folder / "model_index.json", folder / "tokenizer_2" / "tokenizer_config.json"):
        text = path.read_text(encoding="utf-8").replace('"T5Tokenizer"', '"T5TokenizerFast"')
        path.write_text(text, encoding="utf-8")


def check_tokenizers(folder: Path, pipeline: FluxFillPipeline) -> None:
    """Refuse tokenizers whose ids do not survive the folder (transformers may load an empty one without an error)."""
    again = FluxFillPipeline.from_pretrained(folder, vae=None, transformer=None)
    text = "Red circle with navy background, a zebra."
    for name in ("tokenizer", "tokenizer_2"):
        before, after = getattr(pipeline, name)(text).input_ids, getattr(again, name)(text).input_ids
        if before != after:
            raise RuntimeError(f"{name} in {folder} gives {after}, not {before}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=Path("output/nano"))
    parser.add_argument("--output_dir", type=Path, default=Path("nano"))
    options = parser.parse_args()
    pipeline = build_pipeline(options.work_dir)
    pipeline.save_pretrained(options.output_dir, safe_serialization=True)
    name_fast_tokenizer(options.output_dir)
    check_tokenizers(options.output_dir, pipeline)
    (options.output_dir / "influx.json").write_text(json.dumps(DEFAULTS, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(options.work_dir / "training_log.jsonl", options.output_dir / "training_log.jsonl")
    for path in options.output_dir.rglob("*.safetensors"):
        os.chmod(path, 0o644)
    total = sum(path.stat().st_size for path in options.output_dir.rglob("*.safetensors"))
    print(f"wrote {options.output_dir}: {total / 1e6:.1f} MB of weights")


if __name__ == "__main__":
    main()
