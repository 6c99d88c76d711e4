"""A graph of ComfyUI nodes, written as its UI saves it and as its API takes it.

`NODES` repeats the inputs and outputs of the few node classes that our workflows use; a test compares them with the
definitions in ComfyUI's own code.
"""

from dataclasses import dataclass, field

WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


@dataclass(frozen=True)
class NodeKind:
    """A node class: input names with their types, in ComfyUI's order, and output types."""

    inputs: dict[str, str]
    outputs: tuple[str, ...]


NODES = {
    "UNETLoader": NodeKind({"unet_name": "COMBO", "weight_dtype": "COMBO"}, ("MODEL",)),
    "DualCLIPLoader": NodeKind(
        {"clip_name1": "COMBO", "clip_name2": "COMBO", "type": "COMBO", "device": "COMBO"}, ("CLIP",)
    ),
    "VAELoader": NodeKind({"vae_name": "COMBO"}, ("VAE",)),
    "LoraLoaderModelOnly": NodeKind({"model": "MODEL", "lora_name": "COMBO", "strength_model": "FLOAT"}, ("MODEL",)),
    "LoraLoader": NodeKind(
        {"model": "MODEL", "clip": "CLIP", "lora_name": "COMBO", "strength_model": "FLOAT", "strength_clip": "FLOAT"},
        ("MODEL", "CLIP"),
    ),
    "CLIPTextEncode": NodeKind({"text": "STRING", "clip": "CLIP"}, ("CONDITIONING",)),
    "ConditioningZeroOut": NodeKind({"conditioning": "CONDITIONING"}, ("CONDITIONING",)),
    "FluxGuidance": NodeKind({"conditioning": "CONDITIONING", "guidance": "FLOAT"}, ("CONDITIONING",)),
    "LoadImage": NodeKind({"image": "COMBO"}, ("IMAGE", "MASK")),
    "ImageScaleToTotalPixels": NodeKind(
        {"image": "IMAGE", "upscale_method": "COMBO", "megapixels": "FLOAT", "resolution_steps": "INT"}, ("IMAGE",)
    ),
    "GetImageSize": NodeKind({"image": "IMAGE"}, ("INT", "INT", "INT")),
    "EmptyImage": NodeKind({"width": "INT", "height": "INT", "batch_size": "INT", "color": "INT"}, ("IMAGE",)),
    "ImageToMask": NodeKind({"image": "IMAGE", "channel": "COMBO"}, ("MASK",)),
    "ImageStitch": NodeKind(
        {
            "image1": "IMAGE", "direction": "COMBO", "match_image_size": "BOOLEAN", "spacing_width": "INT",
            "spacing_color": "COMBO", "image2": "IMAGE",
        },
        ("IMAGE",),
    ),
    "ImageCrop": NodeKind({"image": "IMAGE", "width": "INT", "height": "INT", "x": "INT", "y": "INT"}, ("IMAGE",)),
    "InstructPixToPixConditioning": NodeKind(
        {"positive": "CONDITIONING", "negative": "CONDITIONING", "vae": "VAE", "pixels": "IMAGE"},
        ("CONDITIONING", "CONDITIONING", "LATENT"),
    ),
    "InpaintModelConditioning": NodeKind(
        {
            "positive": "CONDITIONING", "negative": "CONDITIONING", "vae": "VAE", "pixels": "IMAGE", "mask": "MASK",
            "noise_mask": "BOOLEAN",
        },
        ("CONDITIONING", "CONDITIONING", "LATENT"),
    ),
    "VAEEncode": NodeKind({"pixels": "IMAGE", "vae": "VAE"}, ("LATENT",)),
    "SetLatentNoiseMask": NodeKind({"samples": "LATENT", "mask": "MASK"}, ("LATENT",)),
    "ModelSamplingFlux": NodeKind(
        {"model": "MODEL", "max_shift": "FLOAT", "base_shift": "FLOAT", "width": "INT", "height": "INT"}, ("MODEL",)
    ),
    "KSampler": NodeKind(
        {
            "model": "MODEL", "seed": "INT", "steps": "INT", "cfg": "FLOAT", "sampler_name": "COMBO",
            "scheduler": "COMBO", "positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT",
            "denoise": "FLOAT",
        },
        ("LATENT",),
    ),
    "VAEDecode": NodeKind({"samples": "LATENT", "vae": "VAE"}, ("IMAGE",)),
    "SaveImage": NodeKind({"images": "IMAGE", "filename_prefix": "STRING"}, ()),
}  # fmt: skip
_EXTRA_WIDGETS = {"seed": "fixed", "image": "image"}
"""Values the UI keeps beside a widget: what becomes of a seed after a run; the upload button of an image."""


@dataclass(frozen=True)
class Link:
    """An output of a node."""

    node: int
    slot: int
    type: str


@dataclass
class Node:
    """A node with its inputs: values, or links to other nodes' outputs."""

    number: int
    kind: str
    inputs: dict[str, object]


@dataclass
class Graph:
    """Nodes in the order they were added, which is an order they can run in."""

    nodes: list[Node] = field(default_factory=list)

    def add(self, kind: str, **inputs: object) -> tuple[Link, ...]:
        """Add a node and return its outputs. Every input of the kind must be given, with the right type of link."""
        declared = NODES[kind]
        assert inputs.keys() == declared.inputs.keys(), f"{kind}: {inputs.keys() ^ declared.inputs.keys()}"
        for name, value in inputs.items():
            assert not isinstance(value, Link) or value.type == declared.inputs[name], (
                f"{kind}.{name} cannot be {value}"
            )
        node = Node(len(self.nodes) + 1, kind, {name: inputs[name] for name in declared.inputs})
        self.nodes.append(node)
        return tuple(Link(node.number, slot, output) for slot, output in enumerate(declared.outputs))

    def for_api(self) -> dict[str, dict]:
        """The graph as `POST /prompt` takes it."""
        return {
            str(node.number): {
                "class_type": node.kind,
                "inputs": {
                    name: [str(value.node), value.slot] if isinstance(value, Link) else value
                    for name, value in node.inputs.items()
                },
            }
            for node in self.nodes
        }

    def for_ui(self) -> dict[str, object]:
        """The graph as the UI saves and opens it."""
        links: list[list] = []
        described = []
        outgoing: dict[tuple[int, int], list[int]] = {}
        for node in self.nodes:
            sockets = []
            for name, value in node.inputs.items():
                kind = NODES[node.kind].inputs[name]
                widget = kind in WIDGET_TYPES
                if isinstance(value, Link):
                    number = len(links) + 1
                    links.append([number, value.node, value.slot, node.number, len(sockets), value.type])
                    outgoing.setdefault((value.node, value.slot), []).append(number)
                    sockets.append({"name": name, "type": kind, "link": number} | _as_widget(name, widget))
            described.append((node, sockets))
        return {
            "last_node_id": len(self.nodes),
            "last_link_id": len(links),
            "nodes": [self._ui_node(node, sockets, outgoing) for node, sockets in described],
            "links": links,
            "groups": [],
            "config": {},
            "extra": {},
            "version": 0.4,
        }

    def _ui_node(
        self, node: Node, sockets: list[dict], outgoing: dict[tuple[int, int], list[int]]
    ) -> dict[str, object]:
        column, row = divmod(node.number - 1, 4)
        outputs = [
            {"name": kind, "type": kind, "slot_index": slot, "links": outgoing.get((node.number, slot), [])}
            for slot, kind in enumerate(NODES[node.kind].outputs)
        ]
        return {
            "id": node.number,
            "type": node.kind,
            "pos": [40 + 380 * column, 40 + 240 * row],
            "size": [340, 200],
            "flags": {},
            "order": node.number - 1,
            "mode": 0,
            "inputs": sockets,
            "outputs": outputs,
            "properties": {"Node name for S&R": node.kind},
            "widgets_values": _widget_values(node),
        }


def _as_widget(name: str, widget: bool) -> dict[str, object]:
    """A linked input that is otherwise a widget says so."""
    return {"widget": {"name": name}} if widget else {}


def _widget_values(node: Node) -> list[object]:
    """The values of a node's widgets in order; a linked widget keeps a value of its own, which is not used."""
    values: list[object] = []
    for name, value in node.inputs.items():
        kind = NODES[node.kind].inputs[name]
        if kind not in WIDGET_TYPES:
            continue
        values.append(512 if isinstance(value, Link) else value)
        if name in _EXTRA_WIDGETS and kind in ("INT", "COMBO"):
            values.append(_EXTRA_WIDGETS[name])
    return values
