"""Checks a base model end to end: for the first person who has the real FLUX.1 Fill weights.

    python tools/verify_base.py --base black-forest-labs/FLUX.1-Fill-dev --image photo.png
    python tools/verify_base.py --base flux1-fill-dev-Q8_0.gguf --ae ae.safetensors --clip_l clip_l.safetensors \\
        --t5xxl t5xxl_fp16.safetensors --image photo.png

1. Accounts for every tensor, checks the tokenizers and the VAE.
2. Prints the loss at several noise levels, where the picture is masked and where it is visible, against the band that a
   trained model must lie in (tools/verify/losses.py derives it).
3. Inpaints the middle of the picture and writes input, masked and result side by side.
4. Compares one prediction without LoRA with diffusers' own transformer (tools/verify/oracle.py has the tolerances).

How the base is kept (precision, streamed blocks, modulation in RAM) is chosen for what the card and the RAM have free,
as vram_budget_gb does in training, and printed; the options below override it. At the end stands a summary to paste
into an issue; verify.json holds the same.

What FLUX.1 Fill [dev] needs of free RAM, by calculation, one after the other:
- T5-XXL: 11 GB (on a card that holds it whole, from 14 GB on, 3 GB);
- the transformer: 3 GB and what the card does not hold: with 6 GB of VRAM 6 GB in all in nf4 and 12 in int8, with 8 GB
  10 in int8, with 12 GB 6; without a card 11 GB in nf4, 17 in int8, 29 in bf16, and hours;
- the comparison, whose weights are mapped from the disk: 3 GB for a diffusers folder, 9 for a bf16 single file, for a
  GGUF 1.3 times its size. Where that is not free it is skipped and said so, as for scaled fp8, which diffusers cannot
  read.

It has been run on the nano base and on toys; on FLUX.1-Fill-dev by nobody yet.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this file also runs as a script

import torch
from torch import Tensor
from tqdm import tqdm

from library.conditioning.item import Condition
from library.config.tables.model import ModelTable
from library.errors import OutOfMemory, UserError
from library.flow.euler import SigmaSchedule
from library.flow.velocity import mix
from library.memory import allocator
from library.memory.device import choose_device, release
from library.models.base import Base
from library.models.cost import GB
from library.models.text import TextEmbeddings, wants_layerwise
from library.sampling.denoise import initial_noise, sample
from tools.lora_arguments import positive as whole
from tools.verify import losses, oracle, pictures, room
from tools.verify.report import Report, base_in_words
from tools.verify.room import Room

GRID = "verify.png"
ORACLE = "one prediction against diffusers"
T5_RAM = 11e9
LARGEST_DEFAULT_STEPS = 20
LOWEST_PSNR = 20.0
"""Of the VAE's round trip. The nano base's VAE reaches 30, a real one on a photograph more; random weights below 10."""
MEMORY_KEYS = ("base_precision", "blocks_to_swap", "modulation_on_cpu", "vram_budget_gb", "ram_budget_gb")


def verify(base: Base, options: argparse.Namespace, report: Report) -> None:
    """Run every check, in the order of their need for memory; each part is gone before the next is loaded."""
    device = report.device
    report.about["base"] = base_in_words(base)
    report.check("every tensor accounted for", True, str(len(base.transformer_file.entries)))
    asked = {key: getattr(options, key) for key in MEMORY_KEYS if getattr(options, key) is not None}
    plan = room.settle(base.shape, device, asked, options.side, base.defaults.t5xxl_max_token_length)
    report.about["kept as"] = ", ".join(plan.lines())
    print("\n".join(["[memory]", *plan.lines()]), flush=True)
    image, prompt = pictures.picture(options.image, options.side)
    mask = pictures.hole(options.side)
    text = encode_text(base, options.prompt or prompt, plan, report)
    latents, condition = encode_picture(base, pictures.pixels_of(image), mask, plan, report)
    result, given, ours = run_transformer(base, latents, condition, text, plan, options.steps, report)
    again, painted = decode(base, [latents, result], plan, report)
    decibel = pictures.psnr(again, pictures.pixels_of(image))
    report.check("VAE round trip", decibel >= LOWEST_PSNR, f"{decibel:.1f} dB, at least {LOWEST_PSNR:g}", psnr=decibel)
    words = f"{Path(base.name).name}: {options.prompt or prompt}"
    settings = {"prompt": options.prompt or prompt, "base": report.about["base"], "memory": report.about["kept as"]}
    pictures.write_grid(image, mask, painted, words, options.output_dir / GRID, settings)
    print(f"  wrote {options.output_dir / GRID}")
    if options.no_diffusers:
        report.check(ORACLE, None, "--no_diffusers")
    else:
        compare(base, given, ours, plan, report)


def encode_text(base: Base, prompt: str, plan: Room, report: Report) -> TextEmbeddings:
    """The prompt's embeddings, on the CPU; T5 comes layer by layer where it does not fit the card."""
    on_card = plan.device.type == "cuda"
    asked = True if on_card and not plan.fits(plan.caching("text encoders")) else None
    layerwise = wants_layerwise(asked, plan.device)
    in_ram = plan.device_bytes is not None and (layerwise or not on_card)
    if in_ram and room.free_ram() < T5_RAM:
        print(f"T5-XXL needs about {T5_RAM / GB:.0f} GB of RAM, and less is free: expect swapping")
    name = "text encoders" + (", T5 layer by layer" if layerwise else "")
    with report.part(name, plan.caching("text encoders", layerwise)):
        encoders = base.load_text_encoders(plan.device, plan.text_dtype, layerwise)
        encoded = encoders.encode([prompt], base.defaults.t5xxl_max_token_length).embeddings.to("cpu")
        del encoders
        release(plan.device)
    finite = bool(torch.isfinite(encoded.t5).all() and torch.isfinite(encoded.pooled).all())
    words = f"embeddings of deviation {float(encoded.t5.float().std()):.3f}"
    report.check("text encoders and tokenizers", finite, words)
    return encoded


def encode_picture(base: Base, pixels: Tensor, mask: Tensor, plan: Room, report: Report) -> tuple[Tensor, Condition]:
    """The picture's latents and its condition with a hole, on the CPU."""
    with report.part("VAE encoder", plan.caching("VAE")):
        vae = base.load_vae(plan.device, parts="encoder", tiling=not plan.fits(plan.caching("VAE")))
        latents = vae.encode(pixels)[0].cpu()
        condition = Condition(vae.encode(pixels * (1 - mask))[0].cpu(), mask)
        del vae
        release(plan.device)
    return latents, condition


def decode(base: Base, latents: list[Tensor], plan: Room, report: Report) -> list[Tensor]:
    """Pictures (1, 3, H, W) in [-1, 1], on the CPU."""
    with report.part("VAE decoder", plan.caching("VAE")):
        vae = base.load_vae(plan.device, parts="decoder", tiling=not plan.fits(plan.caching("VAE")))
        found = [vae.decode(one).cpu() for one in latents]
        del vae
        release(plan.device)
    return found


def run_transformer(
    base: Base,
    latents: Tensor,
    condition: Condition,
    text: TextEmbeddings,
    plan: Room,
    steps: int | None,
    report: Report,
) -> tuple[Tensor, dict, Tensor]:
    """Losses, an inpainted picture's latents, and a prediction with its inputs for the comparison; all on the CPU."""
    with report.part(f"load the transformer ({plan.precision})"):
        transformer = base.load_transformer(plan.device, plan.dtype, plan.memory)
    with report.part("loss at several noise levels", plan.predicting()):
        found = losses.measure(transformer, latents, text, condition)
    print("\n".join(f"  {line}" for line in [losses.HEADING, *(one.line() for one in found)]))
    outside = [f"{one.level:g}" for one in found if not one.passed]
    figures = ", ".join(f"{one.level:g}: {one.hidden:.3f}/{one.visible:.3f}" for one in found)
    verdict = f"outside the band at sigma {', '.join(outside)}" if outside else "inside the band"
    words = f"{verdict} (masked/visible at {figures})"
    report.check("loss per sigma", not outside, words, levels=[vars(one) for one in found])
    steps = steps or min(LARGEST_DEFAULT_STEPS, base.defaults.sample_steps)
    with report.part(f"inpaint in {steps} steps", plan.predicting()), tqdm(total=steps, unit="step") as bar:
        result = sample(
            transformer, condition, text, initial_noise([0], condition),
            schedule=SigmaSchedule.from_config(base.scheduler_config), steps=steps,
            guidance=base.defaults.sample_guidance_scale, progress=lambda step: bar.update(),
        ).cpu()  # fmt: skip
    noisy = mix(latents, initial_noise([1], condition), torch.full((1,), oracle.LEVEL))
    given = oracle.inputs(transformer, noisy, text, condition)
    ours = oracle.our_prediction(transformer, given)
    del transformer
    release(plan.device)
    return result, {name: value if value is None else value.cpu() for name, value in given.items()}, ours


def compare(base: Base, given: dict, ours: Tensor, plan: Room, report: Report) -> None:
    """One prediction of diffusers' own transformer on the same inputs."""
    file = base.transformer_file
    try:
        with report.part("diffusers' transformer"):
            theirs, place = oracle.load(file, plan.device, plan.dtype)
            difference = oracle.relative_difference(ours, oracle.their_prediction(theirs, place, given))
            del theirs
            release(plan.device)
    except oracle.Skipped as reason:
        report.check(ORACLE, None, str(reason))
        return
    allowed = oracle.tolerance(file, plan.precision)
    words = f"relative difference {difference:.2e}, at most {allowed:.0e} for {plan.precision}"
    report.check(ORACLE, difference <= allowed, words, difference=difference, allowed=allowed)


def side_of(text: str) -> int:
    """A picture's side: a multiple of 16, at least 64."""
    value = int(text)
    if value < 64 or value % 16:
        raise argparse.ArgumentTypeError(f"{text} is no multiple of 16 from 64 on")
    return value


def blocks_of(text: str) -> int | str:
    """A number of blocks, or all."""
    if text != "all" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is neither a number of blocks nor all")
    return text if text == "all" else int(text)


def positive(text: str) -> float:
    """A number above 0."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="folder, hub id or single file")
    parser.add_argument("--transformer", type=Path, help="a single file or folder instead of the base's transformer")
    parser.add_argument("--ae", type=Path, help="for a single file: its VAE")
    parser.add_argument("--clip_l", type=Path, help="for a single file: CLIP-L")
    parser.add_argument("--t5xxl", type=Path, help="for a single file: T5-XXL")
    parser.add_argument("--image", type=Path, help="a photograph, best; a circle is drawn if none is given")
    parser.add_argument("--prompt", help="what the picture shows (default: a photograph)")
    parser.add_argument("--side", type=side_of, default=512, help="pixels, a multiple of 16 (default: 512)")
    parser.add_argument(
        "--steps", type=whole, help=f"of inpainting (default: the base's, at most {LARGEST_DEFAULT_STEPS})"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("output/verify"), help="default: output/verify")
    parser.add_argument("--no_diffusers", action="store_true", help="skip the comparison")
    memory = parser.add_argument_group("memory", "the keys of [memory], as in training; what is not given is chosen")
    memory.add_argument("--base_precision", choices=("fp32", "bf16", "fp16", "int8", "fp8", "nf4"))
    memory.add_argument("--blocks_to_swap", type=blocks_of, metavar="NUMBER|all")
    memory.add_argument("--modulation_on_cpu", action=argparse.BooleanOptionalAction)
    memory.add_argument("--vram_budget_gb", type=positive, help="default: 95%% of what is free")
    memory.add_argument("--ram_budget_gb", type=positive, help="default: 95%% of what is free")
    return parser


def main(words: list[str] | None = None) -> int:
    """Returns 0 if everything passed, 1 if not, else the exit code of what went wrong."""
    options = arguments().parse_args(words)
    allocator.configure()
    keys = {key: getattr(options, key) for key in ("transformer", "ae", "clip_l", "t5xxl")}
    report = Report(choose_device(None))
    code = 0
    try:
        base = Base.open(ModelTable(pretrained_model_name_or_path=options.base, **keys))
        try:
            verify(base, options, report)
        except torch.OutOfMemoryError as error:
            advice = "try a smaller --vram_budget_gb or --side, or --base_precision nf4 --blocks_to_swap all"
            raise OutOfMemory(f"the device ran out of memory in: {report.parts[-1].name}; {advice}") from error
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        report.stopped, code = str(error), error.exit_code
    report.write(options.output_dir)
    return code or (0 if report.passed else 1)


if __name__ == "__main__":
    sys.exit(main())
