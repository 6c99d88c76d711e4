"""A ComfyUI workflow beside every network: the graph that reproduces our previews, in the UI's format and the API's.

Wiring the wrong conditioning node is the commonest way to make a good Fill LoRA look broken: each mode needs its own
(masked pixels blanked or not, mask given or white, shift from the real size), and the numbers of this very network.
"""

import json
from pathlib import Path

from library.files import atomic_write
from library.networks.graph import Graph, Link
from library.networks.metadata import Description

BASE, CLIP, T5, VAE = "flux1-fill-dev.safetensors", "clip_l.safetensors", "t5xxl_fp16.safetensors", "ae.safetensors"
BLACK, WHITE = 0, 0xFFFFFF
_MAX_SHIFT, _BASE_SHIFT = 1.15, 0.5
_STEP = 16


def write_workflows(network: Path, description: Description) -> tuple[list[Path], list[str]]:
    """Write the workflows for ``network``'s modes beside it: (files, lines that say why one could not be made)."""
    written, refused = [], []
    for mode in description.modes:
        name = network.stem if len(description.modes) == 1 else f"{network.stem}_{mode}"
        kind = "edit_region" if mode == "edit" and description.edits_regions else mode
        graph = graph_for(kind, network.name, description)
        if graph is None:
            refused.append(
                f"no ComfyUI workflow for edit_mask_value = {description.edit_mask_value:g}: its nodes can give an"
                " all-white or an all-black mask, nothing between"
            )
            continue
        for suffix, content in (("_workflow", graph.for_ui()), ("_workflow_api", graph.for_api())):
            path = network.with_name(f"{name}{suffix}.json")
            atomic_write(path, json.dumps(content, indent=2) + "\n")
            written.append(path)
    return written, refused


def graph_for(mode: str, network: str, description: Description) -> Graph | None:
    """The graph for one mode (``edit``, ``edit_region``, ``mask``, ``spatial``); None where ComfyUI cannot do it."""
    if mode == "edit":
        value = 1.0 if description.edit_mask_value is None else description.edit_mask_value
        if value not in (0.0, 1.0):
            return None
        return _finish(_Start(network, description), _edit if value == 1.0 else _edit_under_a_black_mask)
    return _finish(
        _Start(network, description), {"edit_region": _edit_region, "mask": _mask, "spatial": _spatial}[mode]
    )


class _Start:
    """What every graph begins with: base, network, text, guidance, image at a size of whole tokens."""

    def __init__(self, network: str, description: Description):
        self.description = description
        self.graph = graph = Graph()
        base = graph.add("UNETLoader", unet_name=BASE, weight_dtype="default")
        clip = graph.add("DualCLIPLoader", clip_name1=CLIP, clip_name2=T5, type="flux", device="default")
        self.vae = graph.add("VAELoader", vae_name=VAE)[0]
        if description.trains_text_encoder:
            self.model, *clip = graph.add(
                "LoraLoader", model=base[0], clip=clip[0], lora_name=network, strength_model=1.0, strength_clip=1.0
            )
        else:
            self.model = graph.add("LoraLoaderModelOnly", model=base[0], lora_name=network, strength_model=1.0)[0]
        prompt = description.prompt or ", ".join(description.trigger_words)
        text = graph.add("CLIPTextEncode", text=prompt, clip=clip[0])
        guidance = 30.0 if description.sample_guidance is None else description.sample_guidance
        self.positive = graph.add("FluxGuidance", conditioning=text[0], guidance=guidance)[0]
        self.negative = graph.add("ConditioningZeroOut", conditioning=text[0])[0]
        self.loaded = graph.add("LoadImage", image="example.png")
        self.image = self.scaled(self.loaded[0])
        self.canvas = self.image

    def scaled(self, image: Link) -> Link:
        """The image at the training's area, its sides multiples of 16."""
        width, height = self.description.resolution or (1024, 1024)
        return self.graph.add(
            "ImageScaleToTotalPixels", image=image, upscale_method="lanczos",
            megapixels=round(width * height / 2**20, 4), resolution_steps=_STEP,
        )[0]  # fmt: skip

    def inpaint(self, mask: Link) -> tuple[Link, Link, Link]:
        """Blank the masked pixels and give the model the mask. The whole picture is denoised, as our previews do."""
        return self.graph.add(
            "InpaintModelConditioning", positive=self.positive, negative=self.negative, vae=self.vae,
            pixels=self.canvas, mask=mask, noise_mask=False,
        )[:3]  # fmt: skip

    def flat(self, image: Link, colour: int) -> Link:
        """A picture of one colour, as large as ``image``."""
        size = self.graph.add("GetImageSize", image=image)
        return self.graph.add("EmptyImage", width=size[0], height=size[1], batch_size=1, color=colour)[0]


def _edit(start: _Start) -> tuple[Link, Link, Link]:
    """Unmasked pixels, no mask: ComfyUI then gives a Fill model an all-white one."""
    return start.graph.add(
        "InstructPixToPixConditioning", positive=start.positive, negative=start.negative, vae=start.vae,
        pixels=start.canvas,
    )[:3]  # fmt: skip


def _edit_region(start: _Start) -> tuple[Link, Link, Link]:
    """Unmasked pixels and the region to change as the latent's noise mask; outside it the source is kept."""
    positive, negative, _ = _edit(start)
    source = start.graph.add("VAEEncode", pixels=start.canvas, vae=start.vae)[0]
    latent = start.graph.add("SetLatentNoiseMask", samples=source, mask=start.loaded[1])[0]
    return positive, negative, latent


def _edit_under_a_black_mask(start: _Start) -> tuple[Link, Link, Link]:
    """A black mask blanks nothing, so the pixels arrive as they are; the latent is denoised whole."""
    mask = start.graph.add("ImageToMask", image=start.flat(start.canvas, BLACK), channel="red")[0]
    return start.inpaint(mask)


def _mask(start: _Start) -> tuple[Link, Link, Link]:
    """The mask is painted on the loaded image (or is its transparency)."""
    return start.inpaint(start.loaded[1])


def _spatial(start: _Start) -> tuple[Link, Link, Link]:
    """Source on the left, the half to paint on the right."""
    graph, image = start.graph, start.image
    stitch = {"direction": "right", "match_image_size": False, "spacing_width": 0, "spacing_color": "white"}
    start.canvas = graph.add("ImageStitch", image1=image, image2=image, **stitch)[0]
    halves = graph.add("ImageStitch", image1=start.flat(image, BLACK), image2=start.flat(image, WHITE), **stitch)[0]
    return start.inpaint(graph.add("ImageToMask", image=halves, channel="red")[0])


def _finish(start: _Start, condition) -> Graph:
    """Condition, sample and save; a spatial canvas is cropped back to its right half."""
    graph, description = start.graph, start.description
    positive, negative, latent = condition(start)
    size = graph.add("GetImageSize", image=start.canvas)
    model = graph.add(
        "ModelSamplingFlux", model=start.model, max_shift=_MAX_SHIFT, base_shift=_BASE_SHIFT, width=size[0],
        height=size[1],
    )  # fmt: skip
    sampled = graph.add(
        "KSampler", model=model[0], seed=description.seed or 0, steps=description.sample_steps or 50, cfg=1.0,
        sampler_name="euler", scheduler="simple", positive=positive, negative=negative, latent_image=latent,
        denoise=1.0,
    )  # fmt: skip
    picture = graph.add("VAEDecode", samples=sampled[0], vae=start.vae)[0]
    if start.canvas is not start.image:
        half = graph.add("GetImageSize", image=start.image)
        picture = graph.add("ImageCrop", image=picture, width=half[0], height=half[1], x=half[0], y=0)[0]
    graph.add("SaveImage", images=picture, filename_prefix=description.output_name)
    return graph
