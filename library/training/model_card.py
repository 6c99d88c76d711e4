"""The README of a network on the hub: what it does, how it was made, how to use it in ComfyUI and diffusers."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

FILL = "black-forest-labs/FLUX.1-Fill-dev"
_USES = {
    "edit": "edits the whole picture by instruction: the source is shown to the model unmasked, the mask is white",
    "mask": "repaints the masked area of a picture",
    "spatial": "paints one half of a canvas whose other half is the source",
}


@dataclass(frozen=True)
class Card:
    """What the card says. `pictures`: (file in the repository, caption). `diffusers_file`: the one that diffusers loads
    whole, None if it loads none. `resolution`: of one picture, in spatial mode half the canvas."""

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
    extra_files: Sequence[str] = ()
    repository: str = ""
    diffusers_file: str | None = None


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
    graphs = [file for file in card.extra_files if file.endswith(".json")]
    lines = [
        "## Use", "",
        f"**ComfyUI**: put `{card.file}` into `models/loras`, load FLUX.1 Fill and the LoRA (`LoraLoaderModelOnly`), "
        f"{_comfy(card)}, and sample with guidance {card.guidance:g}."
        + (f" Graphs to start from: {_files(graphs)}." if graphs else ""), "",
    ]  # fmt: skip
    if card.diffusers_file is None:
        lines += ["**diffusers** cannot load this kind of network; use ComfyUI or InFlux (`influx_infer.py`).", ""]
    else:
        lines += ["**diffusers**:", "", "```python", *_diffusers(card, card.diffusers_file), "```", ""]
    if "edit" in card.modes:
        lines.append(
            "FluxFillPipeline blanks what the mask covers; for `edit` networks use InFlux (`influx_infer.py`) or "
            "ComfyUI, which show the model the source unmasked."
        )
    if len(card.modes) > 1:
        lines.append(f"The code is for `{card.modes[0]}`; `influx_infer.py --mode` knows {_files(card.modes)}.")
    others = [file for file in card.extra_files if not file.endswith(".json")]
    return [*lines, "", f"Further files: {_files(others)}."] if others else lines


def _comfy(card: Card) -> str:
    if card.modes == ("spatial",):
        return (
            "pad the source to twice its width on the right (`ImagePadForOutpaint`, no feathering), encode picture and "
            "mask with `InpaintModelConditioning`, crop the right half of the result"
        )
    node = "InstructPixToPixConditioning" if card.modes == ("edit",) else "InpaintModelConditioning"
    return f"encode the source with `{node}`"


def _diffusers(card: Card, file: str) -> list[str]:
    width, height = card.resolution
    lines = [
        "import torch",
        "from diffusers import FluxFillPipeline",
        "from diffusers.utils import load_image",
        "from PIL import Image",
        "",
        f'pipe = FluxFillPipeline.from_pretrained("{FILL}", torch_dtype=torch.bfloat16).to("cuda")',
        f"pipe.load_lora_weights({json.dumps(card.repository)}, weight_name={json.dumps(file)})",
        'image = load_image("source.png")',
    ]
    if card.modes[:1] == ("spatial",):
        lines += [
            f'canvas = Image.new("RGB", ({2 * width}, {height}))  # the source on the left, the answer on the right',
            f"canvas.paste(image.resize(({width}, {height})))",
            'mask = Image.new("L", canvas.size, 0)',
            f"mask.paste(255, ({width}, 0, {2 * width}, {height}))  # white: repaint",
            f'result = pipe(prompt="...", image=canvas, mask_image=mask, guidance_scale={card.guidance:g},',
            f"              num_inference_steps=50, width={2 * width}, height={height}).images[0]",
            f"result = result.crop(({width}, 0, {2 * width}, {height}))",
        ]
    else:
        lines += [
            'mask = Image.new("L", image.size, 255)  # white: repaint',
            f'result = pipe(prompt="...", image=image, mask_image=mask, guidance_scale={card.guidance:g},',
            f"              num_inference_steps=50, width={width}, height={height}).images[0]",
        ]
    return lines


def _files(names: Sequence[str]) -> str:
    return ", ".join(f"`{_plain(name)}`" for name in names)


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
