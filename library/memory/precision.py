"""The precisions of a frozen base: int8 per row, scaled fp8 per row, NF4; and which linears stay in high precision.

int8 and fp8 keep one scale per output row, rounded up to a bf16 number, so that value x scale is rounded only once
when the weight is used in bf16. Weights alone are quantised; quantising activations too (for the integer or fp8
matrix units) is `arithmetic=True`, and only the forward pass does it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from library.memory.bnb import bitsandbytes
from library.memory.storage import Layout, PlainStorage, Storage, Tensors, strips_of

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
BF16_BITS_OF_FP8 = -0x7810
"""0x87F0 as int16: bf16's sign, the last four bits of its exponent and the first three of its mantissa."""
NF4_BLOCK = 64
NF4_GROUP = 256
NF4_AT_ONCE = 1 << 22
ROWS_AT_ONCE = 1024
INT8_MINIMUM_ROWS = 17
"""torch._int_mm on CUDA wants more than 16 rows."""
INT8_KERNEL_STEP = 64
"""torch's product of bf16 vectors with int8 weights reads whole vector registers: past the end of odd shapes."""
HAS_INT8_KERNEL = sys.platform != "win32" and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
"""Where that product is vectorised; elsewhere decoding strip by strip is faster."""


class RowScaled(Storage):
    """Values of one byte and a scale per output row."""

    values: torch.dtype
    largest: float

    def __init__(self, shape: tuple[int, int], tensors: Tensors, arithmetic: bool = False):
        super().__init__(shape, tensors)
        self.arithmetic = arithmetic

    @classmethod
    def layout(cls, shape: tuple[int, int], dtype: torch.dtype) -> Layout:
        return {"values": (shape, cls.values), "scale": ((shape[0], 1), torch.bfloat16)}

    @classmethod
    def encode(cls, weight: Tensor, layout: Layout) -> Tensors:
        values = torch.empty(layout["values"][0], dtype=cls.values, device=weight.device)
        scale = torch.empty(layout["scale"][0], dtype=torch.bfloat16, device=weight.device)
        # A few rows at a time, so that no second copy of the weight in fp32 exists.
        for rows in (slice(start, start + ROWS_AT_ONCE) for start in range(0, len(weight), ROWS_AT_ONCE)):
            part = weight[rows].to(torch.float32, copy=True)
            scale[rows] = _up_to_bf16(part.abs().amax(dim=1, keepdim=True) / cls.largest)
            values[rows] = cls.rounded(part.div_(scale[rows].float()))
        return {"values": values, "scale": scale}

    @classmethod
    def rounded(cls, scaled: Tensor) -> Tensor:
        """The nearest stored values."""
        raise NotImplementedError

    def decode(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        # Both kinds of values are exact in either dtype, and the product is made in place: one temporary weight.
        working = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        return self.widened(tensors["values"], working).mul_(tensors["scale"].to(working)).to(dtype)

    @staticmethod
    def widened(values: Tensor, dtype: torch.dtype) -> Tensor:
        """Stored values in bf16 or fp32, which hold them exactly; a new tensor."""
        return values.to(dtype)

    def in_low_precision(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + b with activations quantised as well; a thousand rows at a time, as everything here is in fp32."""
        rows = x.reshape(-1, x.shape[-1])
        output = x.new_empty(len(rows), self.shape[0])
        pieces = -(-len(rows) // ROWS_AT_ONCE)
        for part, result in zip(rows.tensor_split(pieces), output.tensor_split(pieces)):
            scale = part.abs().amax(dim=1, keepdim=True).float().clamp_min(1e-12) / self.largest
            result.copy_(self.product(self.rounded(part.float() / scale), scale))
        output = output.view(*x.shape[:-1], -1)
        return output if bias is None else output.add_(bias)

    def product(self, quantised: Tensor, scale: Tensor) -> Tensor:
        """Quantised rows (N, in) and their scales (N, 1) times the weight, by the card's low-precision units."""
        raise NotImplementedError

    def few(self, x: Tensor) -> Tensor:
        # The scale belongs to an output: it need not meet the weight.
        return super().few(x).mul_(self.bound["scale"].to(x.dtype).t())

    def strips(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        for rows in strips_of(self.shape):
            yield rows, self.widened(self.bound["values"][rows], dtype)


def _up_to_bf16(scale: Tensor) -> Tensor:
    """The nearest bf16 number that is not smaller, so that no value overflows; 1 for rows of zeros."""
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    near = scale.to(torch.bfloat16)
    bits = near.view(torch.int16) + (near.float() < scale).to(torch.int16)
    return bits.view(torch.bfloat16)


class Int8(RowScaled):
    """int8 per row: 0.85% weight error on Gaussian weights."""

    values = torch.int8
    largest = 127.0

    @classmethod
    def rounded(cls, scaled: Tensor) -> Tensor:
        return scaled.round().clamp(-127, 127).to(torch.int8)

    def few(self, x: Tensor) -> Tensor:
        if not HAS_INT8_KERNEL or x.dtype != torch.bfloat16 or any(side % INT8_KERNEL_STEP for side in self.shape):
            return super().few(x)
        return torch.ops.aten._weight_int8pack_mm(x.contiguous(), self.bound["values"], self.bound["scale"].flatten())

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        num_rows = x.numel() // x.shape[-1]
        if not self.arithmetic or num_rows < INT8_MINIMUM_ROWS or any(side % 8 for side in self.shape):
            return super().linear(x, bias)
        return self.in_low_precision(x, bias)

    def product(self, quantised: Tensor, scale: Tensor) -> Tensor:
        whole = torch._int_mm(quantised, self.bound["values"].t())
        return whole.float().mul_(scale).mul_(self.bound["scale"].float().t())


class Fp8(RowScaled):
    """Scaled fp8 e4m3 per row: 2.5% weight error on Gaussian weights."""

    values = FP8
    largest = FP8_MAX

    @classmethod
    def rounded(cls, scaled: Tensor) -> Tensor:
        return scaled.clamp(-FP8_MAX, FP8_MAX).to(FP8)

    @staticmethod
    def widened(values: Tensor, dtype: torch.dtype) -> Tensor:
        if values.device.type != "cpu":
            return values.to(dtype)
        # A CPU converts fp8 one by one. Its bits in the place of bf16's are the value times 2^-120 (bf16's bias less
        # fp8's), so that shift, mask and one exact product do the same ten times as fast.
        bits = values.view(torch.int8).to(torch.int16).bitwise_left_shift_(4).bitwise_and_(BF16_BITS_OF_FP8)
        return bits.view(torch.bfloat16).mul_(2.0**120).to(dtype)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if not self.arithmetic or self.takes_few(x) or any(side % 16 for side in self.shape):
            return super().linear(x, bias)
        return self.in_low_precision(x, bias)

    def product(self, quantised: Tensor, scale: Tensor) -> Tensor:
        return torch._scaled_mm(
            quantised, self.bound["values"].t(), scale_a=scale, scale_b=self.bound["scale"].float().t().contiguous(),
            out_dtype=torch.bfloat16,
        )  # fmt: skip


class Nf4(Storage):
    """bitsandbytes' NF4 in blocks of 64 with quantised block maxima: 0.516 bytes per weight, 9% weight error."""

    @classmethod
    def layout(cls, shape: tuple[int, int], dtype: torch.dtype) -> Layout:
        count = shape[0] * shape[1]
        blocks = -(-count // NF4_BLOCK)
        return {
            "packed": ((-(-count // 2), 1), torch.uint8),
            "absmax": ((blocks,), torch.uint8),
            "absmax_scale": ((-(-blocks // NF4_GROUP),), torch.float32),
            "absmax_code": ((256,), torch.float32),
            "offset": ((), torch.float32),
            "code": ((16,), torch.float32),
        }

    @classmethod
    def encode(cls, weight: Tensor, layout: Layout) -> Tensors:
        functional = bitsandbytes().functional

        # In pieces: bitsandbytes' arithmetic on a CPU needs many times the weight. The block maxima are quantised
        # over the whole weight, as it does itself.
        parts = [
            functional.quantize_4bit(piece, blocksize=NF4_BLOCK, quant_type="nf4")
            for piece in weight.contiguous().flatten().split(NF4_AT_ONCE)
        ]
        absmax = torch.cat([state.absmax for _, state in parts])
        offset = absmax.mean()
        quantised, nested = functional.quantize_blockwise(absmax - offset, blocksize=NF4_GROUP)
        return {
            "packed": torch.cat([packed for packed, _ in parts]), "absmax": quantised, "absmax_scale": nested.absmax,
            "absmax_code": nested.code, "offset": offset, "code": parts[0][1].code,
        }  # fmt: skip

    def decode(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        functional = bitsandbytes().functional

        nested = functional.QuantState(
            absmax=tensors["absmax_scale"], code=tensors["absmax_code"], blocksize=NF4_GROUP, dtype=torch.float32
        )
        state = functional.QuantState(
            absmax=tensors["absmax"], shape=torch.Size(self.shape), code=tensors["code"], blocksize=NF4_BLOCK,
            quant_type="nf4", dtype=dtype, offset=tensors["offset"], state2=nested,
        )  # fmt: skip
        return functional.dequantize_4bit(tensors["packed"], state)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return super().linear(x, bias) if x.device.type == "cpu" else self.multiplied_by_bitsandbytes(x, bias)

    def multiplied_by_bitsandbytes(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + b by its own operator: fused where a card has a kernel for this many rows, else decoded first."""
        bitsandbytes()
        bound = self.bound
        return torch.ops.bitsandbytes.gemm_4bit.default(
            x.contiguous(), bound["packed"], list(self.shape), bound["absmax_scale"], NF4_BLOCK, "nf4", bias=bias,
            absmax_8bit=bound["absmax"], absmax_code=bound["absmax_code"], absmax_offset=bound["offset"],
        )  # fmt: skip

    def strips(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        functional = bitsandbytes().functional

        bound, width = self.bound, self.shape[1]
        absmax = functional.dequantize_blockwise(
            bound["absmax"], absmax=bound["absmax_scale"], code=bound["absmax_code"], blocksize=NF4_GROUP
        ).add_(bound["offset"])
        for rows in strips_of(self.shape):
            begin, end = rows.start * width, rows.stop * width
            state = functional.QuantState(
                absmax=absmax[begin // NF4_BLOCK : -(-end // NF4_BLOCK)],
                shape=torch.Size((rows.stop - rows.start, width)), code=bound["code"], blocksize=NF4_BLOCK,
                quant_type="nf4", dtype=dtype,
            )  # fmt: skip
            yield rows, functional.dequantize_4bit(bound["packed"][begin // 2 : -(-end // 2)], state)


STORAGES: dict[str, type[Storage]] = {
    "fp64": PlainStorage,
    "fp32": PlainStorage,
    "bf16": PlainStorage,
    "fp16": PlainStorage,
    "int8": Int8,
    "fp8": Fp8,
    "nf4": Nf4,
}
PLAIN_DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
QUANTISED = ("int8", "fp8", "nf4")

KEPT_IN_HIGH_PRECISION = (
    r"^(img|txt|time|vector|guidance)_in\b",
    r"^final_layer\b",
    r"\bnorm\b",
)
"""Modules that are never quantised: the embedders (x_embedder is img_in), the final layer, the normalisations."""


def is_quantised(path: str, extra: Sequence[str] = ()) -> bool:
    """Whether a quantised base quantises the linear at this path; `extra` are the user's own exceptions."""
    return not any(re.search(pattern, path) for pattern in (*KEPT_IN_HIGH_PRECISION, *extra))


def make_storage(precision: str, shape: tuple[int, int], tensors: Tensors, arithmetic: bool = False) -> Storage:
    """The storage of a precision over tensors that are already encoded."""
    kind = STORAGES[precision]
    return kind(shape, tensors, arithmetic) if issubclass(kind, RowScaled) else kind(shape, tensors)
