"""The README of a network on the hub: what it does, how it was made, how to use it in ComfyUI and diffusers."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

FILL = "black-forest-labs/FLUX.1-Fill-dev"
_USES = {
    "edit": "edits the whole picture by instruction: the source is shown to the model unmasked, the mask is white",
    "mask": "repaints the masked area of a picture",
    "spatial": "paints one half of a canvas whose other half is the source",
}


@dataclass(frozen=True)
class Card:
    """What the card says. `pictures`: (file in the repository, caption)."""

    name: str
    file: str
    base_model: str
    modes: tuple[str, ...]
    guidance: float
    steps: int
    rank: int
    resolution: tuple[int, int]
    trigger_words: tuple[str, ...] = ()
    license: str | None = None
    pictures: Sequence[tuple[str, str]] = ()
    settings: Sequence[tuple[str, str]] = ()
    dataset: Sequence[tuple[str, str]] = ()
    extra_files: Sequence[str] = field(default_factory=tuple)


def render(card: Card) -> str:
    """The card as Markdown with YAML front matter."""
    return "\n".join([_front_matter(card), *_about(card), *_use(card), *_made(card)]) + "\n"


def _front_matter(card: Card) -> str:
    values: dict[str, object] = {
        "license": card.license or "other",
        "base_model": card.base_model if "/" in card.base_model else FILL,
        "base_model_relation": "adapter",
        "library_name": "diffusers",
        "pipeline_tag": "image-to-image",
        "tags": ["flux", "flux-fill", "lora", "image-editing", "influx", *card.modes],
    }
    if card.license is None:
        values["license_name"] = "flux-1-dev-non-commercial-license"
        values["license_link"] = f"https://huggingface.co/{FILL}/blob/main/LICENSE.md"
    if card.trigger_words:
        values["instance_prompt"] = ", ".join(card.trigger_words)
    if card.pictures:
        values["widget"] = [{"text": caption, "output": {"url": file}} for file, caption in card.pictures]
    # JSON is YAML: every value is quoted safely, whatever a caption holds
    return "---\n" + "\n".join(f"{key}: {json.dumps(value)}" for key, value in values.items()) + "\n---"


def _about(card: Card) -> list[str]:
    lines = [
        "",
        f"# {_plain(card.name)}",
        "",
        f"A LoRA for FLUX.1 Fill that {' and '.join(map(_USES.get, card.modes))}.",
    ]
    if card.trigger_words:
        lines += ["", f"Trigger words: {', '.join(f'`{_plain(word)}`' for word in card.trigger_words)}"]
    if card.pictures:
        lines += ["", "## Samples", ""]
        lines += [f"![{_plain(caption)}]({file})\n*{_plain(caption)}*\n" for file, caption in card.pictures]
    return lines


def _use(card: Card) -> list[str]:
    width, height = card.resolution
    node = "InstructPixToPixConditioning" if card.modes == ("edit",) else "InpaintModelConditioning"
    return [
        "## Use", "",
        f"**ComfyUI**: put `{card.file}` into `models/loras`, load FLUX.1 Fill and the LoRA (`LoraLoaderModelOnly`), "
        f"encode the source with `{node}`, and sample with guidance {card.guidance:g}.", "",
        "**diffusers**:", "",
        "```python",
        "import torch",
        "from diffusers import FluxFillPipeline",
        "from diffusers.utils import load_image",
        "from PIL import Image",
        "",
        f'pipe = FluxFillPipeline.from_pretrained("{FILL}", torch_dtype=torch.bfloat16).to("cuda")',
        f'pipe.load_lora_weights(".", weight_name="{card.file}")',
        'image = load_image("source.png")',
        'mask = Image.new("L", image.size, 255)  # white: repaint',
        f"result = pipe(prompt=\"...\", image=image, mask_image=mask, guidance_scale={card.guidance:g},",
        f"              num_inference_steps=50, width={width}, height={height}).images[0]",
        "```", "",
        "FluxFillPipeline blanks what the mask covers; for `edit` networks use InFlux (`influx_infer.py`) or ComfyUI, "
        "which show the model the source unmasked." if "edit" in card.modes else "",
    ]  # fmt: skip


def _made(card: Card) -> list[str]:
    facts = [("steps", str(card.steps)), ("rank", str(card.rank)), *card.dataset]
    lines = ["", "## How it was made", "", "Trained with InFlux.", "", "| | |", "|---|---|"]
    lines += [f"| {_plain(label)} | {_plain(value)} |" for label, value in facts]
    lines += ["", "<details><summary>Settings</summary>", "", "| key | value |", "|---|---|"]
    lines += [f"| `{_plain(key)}` | {_plain(value)} |" for key, value in card.settings]
    return [*lines, "", "</details>"]


def _plain(text: str) -> str:
    """Text that Markdown and HTML take for text."""
    escaped = str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{letter}" if letter in "\\`*_[]|!#" else letter for letter in " ".join(escaped.split()))
