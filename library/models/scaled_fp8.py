"""ComfyUI's scaled fp8 files: weights of one byte whose true value is weight x scale.

A text encoder or transformer loaded without its scales runs without an error and answers nonsense, so every tensor
whose name speaks of a scale is either understood here or refused.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

from library.errors import ModelError
from library.models.readers import Reader

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from torch import Tensor

WEIGHT_SCALES = ("scale_weight", "weight_scale")
INPUT_SCALES = ("scale_input", "input_scale")
"""How a runtime should quantise activations: nothing to do with the weights."""
MARKERS = ("scaled_fp8",)
DESCRIPTION = "comfy_quant"
KNOWN_FORMATS = ("float8_e4m3fn", "float8_e5m2")
FP8 = ("F8_E4M3", "F8_E5M2")


class Unscaled(Reader):
    """A reader whose scaled fp8 weights come out multiplied; the scales themselves are not among its tensors."""

    def __init__(self, reader: Reader):
        self.reader = reader
        self.source = reader.source
        self.files = reader.files
        self.scales: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in reader.shapes.items():
            if not self._is_about_scales(name):
                self.shapes[name] = shape
        self.dtypes = {name: reader.dtypes[name] for name in self.shapes}
        lost = [scale for weight, scale in self.scales.items() if weight not in self.shapes]
        if lost:
            raise ModelError(f"{self.source}: these scales belong to no weight: {', '.join(lost[:8])}")
        for weight, scale in self.scales.items():
            self._require_per_row(weight, scale)

    def num_bytes(self) -> int:
        return self.reader.num_bytes()

    def read(self, name: str) -> Tensor:
        return self.read_to(name, "cpu")

    def read_to(self, name: str, device: torch.device | str) -> Tensor:
        value = self.reader.read_to(name, device)
        if name not in self.scales:
            return value
        scale = self.reader.read_to(self.scales[name], device).float()
        return value.float() * scale.reshape(-1, *[1] * (value.ndim - 1))

    def will_need(self, names: Iterable[str]) -> None:
        self.reader.will_need(names)

    def _is_about_scales(self, name: str) -> bool:
        """Sort out one name of the file. Raises ModelError for a scale that is not understood."""
        path, _, leaf = name.rpartition(".")
        if leaf in WEIGHT_SCALES:
            self._require_fp8(f"{path}.weight", name)
            self.scales[f"{path}.weight"] = name
            return True
        if leaf in INPUT_SCALES or leaf in MARKERS:
            return True
        if leaf == DESCRIPTION:
            self._require_known_format(name)
            return True
        is_norm = leaf == "scale" and path.rpartition(".")[2] in ("query_norm", "key_norm")
        if "scale" in leaf and leaf != "logit_scale" and not is_norm:
            raise ModelError(f"{self.source}: tensor {name} is a scale that InFlux does not know how to apply")
        return False

    def _require_fp8(self, weight: str, scale: str) -> None:
        dtype = self.reader.dtypes.get(weight)
        if dtype is not None and dtype not in FP8:
            raise ModelError(f"{self.source}: {scale} scales {weight}, whose dtype is {dtype} and not fp8")

    def _require_per_row(self, weight: str, scale: str) -> None:
        """One number for the weight or one per row; scales of blocks would be multiplied wrongly, or not at all."""
        shape, rows = self.reader.shapes[scale], self.shapes[weight][:1]
        if math.prod(shape) != 1 and shape not in (rows, (*rows, 1)):
            raise ModelError(f"{self.source}: {scale} has the shape {shape}: InFlux reads one scale per weight or row")

    def _require_known_format(self, name: str) -> None:
        content = json.loads(bytes(self.reader.read(name).tolist()))
        if content.get("format") not in KNOWN_FORMATS:
            raise ModelError(f"{self.source}: {name} says the format {content.get('format')}, which InFlux cannot read")
