"""How the run fits the card."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from library.config.table import FilePath, Strings, Table, key

if TYPE_CHECKING:
    from library.config.run import Run


class MemoryTable(Table):
    """Precision of the frozen base, streaming, checkpointing and offload."""

    section: ClassVar[str] = "memory"
    reads: ClassVar[str] = "cache train infer"

    base_precision: Literal["fp32", "bf16", "fp16", "fp8", "int8", "nf4"] | None = key(None, inexact=True)
    """Precision of the frozen base. As mixed_precision if not set."""
    int8_arithmetic: bool = key(
        False, reads="train infer", only_with="base_precision=int8 or vram_budget_gb", inexact=True
    )
    """int8: quantise activations too and multiply in int8. Faster on some cards, less exact."""
    fp8_arithmetic: bool = key(False, reads="train infer", only_with="base_precision=fp8", inexact=True)
    """fp8: quantise activations too and multiply in fp8 (cards of compute capability 8.9 or newer)."""
    keep_precision_patterns: Strings = key(
        (), reads="train infer", only_with="base_precision=fp8|int8|nf4 or vram_budget_gb", inexact=True
    )
    """Regular expressions: modules that stay unquantised, beside the norms, embedders and final layer."""
    blocks_to_swap: Annotated[int, Field(ge=0)] | Literal["all"] = key(0, rerun=True)
    """Blocks streamed from RAM ahead of use: a number, or all."""
    swap_ring_size: int = key(2, ge=2, rerun=True, only_with="blocks_to_swap or vram_budget_gb")
    """Blocks held on the card at once while streaming."""
    pin_memory: bool = key(True, rerun=True)
    """Keep streamed blocks in page-locked RAM."""
    gradient_checkpointing: bool = key(False, reads="train", rerun=True)
    """Recompute the blocks in the backward pass instead of keeping what they computed."""
    cpu_offload_checkpointing: bool = key(
        False,
        aliases=("gradient_checkpointing_cpu_offload",),
        reads="train",
        rerun=True,
        only_with="gradient_checkpointing or vram_budget_gb",
    )
    """Keep the inputs of checkpointed blocks in RAM."""
    save_attention_outputs: bool = key(
        False, reads="train", rerun=True, only_with="gradient_checkpointing or vram_budget_gb"
    )
    """Keep attention outputs while checkpointing: more memory, fewer FLOPs."""
    modulation_on_cpu: bool = key(False, reads="train infer", rerun=True)
    """Hold the modulation weights (27% of the model) in RAM and compute them on the CPU; in training a batch ahead."""
    optimizer_offload: bool = key(False, reads="train", rerun=True)
    """Keep the optimizer's state in RAM."""
    torch_compile: bool = key(False, reads="train infer", rerun=True)
    """Compile what stands between the blocks' matrix products (RMSNorm with RoPE; gate, residual and modulated norm)
    into few kernels. The first step takes 30 s longer, and so does the first one of several samples (21 s); further
    bucket sizes take nothing. Measured on a CPU (python -m benchmarks.first_step), on a GPU not yet."""
    dynamo_backend: str = key("inductor", reads="train infer", rerun=True, only_with="torch_compile")
    """Backend of torch_compile."""
    attention_backend: Literal["auto", "flash", "efficient", "cudnn", "math"] = key(
        "auto", reads="train infer", rerun=True
    )
    """Kernel of scaled_dot_product_attention."""
    vram_budget_gb: float | None = key(None, gt=0, rerun=True)
    """Let InFlux choose precision, streaming, checkpointing and offload for this much VRAM, previews included."""
    ram_budget_gb: float | None = key(None, gt=0, rerun=True, only_with="vram_budget_gb")
    """The RAM that choice may use; if not set, what is free when the command starts, less 1 GB. Windows locks at most
    half of the RAM for streaming, which the choice takes into account."""
    memory_probe: bool = key(True, reads="train", rerun=True)
    """Try the largest batch and the largest preview out first, beside the optimizer's state that is to come, so that a
    lack of memory shows at once."""
    save_quantized_base: FilePath | None = key(None, path="path", reads="train infer", rerun=True)
    """Keep the quantised base in this folder; the next start takes it from there."""

    def problems(self, run: Run) -> Iterator[tuple[list[str], str]]:
        """Choices that exclude each other."""
        if self.cpu_offload_checkpointing and not self.gradient_checkpointing and self.vram_budget_gb is None:
            yield (
                ["cpu_offload_checkpointing"],
                "cpu_offload_checkpointing moves what gradient_checkpointing keeps; set gradient_checkpointing = true.",
            )
