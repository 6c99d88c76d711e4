"""An arm of diffusers + PEFT: its transformer, its checkpointing, PEFT's LoRA on the same linears, a bare step.

The peer is given the best of it: no data to read, no clipping, no loss to report, LoRA weights in bf16.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchmarks.counters import BLOCK_LINEARS, diffusers_model
from benchmarks.lowvram.arms import LEARNING_RATE, RANK, Arm, backend
from benchmarks.lowvram.child import Job, Step, Subject
from benchmarks.weights import DEVIATION
from library.flow.packing import LATENT_SCALE, image_ids


def diffusers_peft(job: Job, arm: Arm, device: torch.device) -> Subject:
    """The model with random weights, its adapter and its 8-bit AdamW."""
    from bitsandbytes.optim import AdamW8bit
    from peft import LoraConfig

    model = diffusers_model(job.shape)
    if arm.peer == "nf4":
        quantise_blocks(model, device)
        model.is_loaded_in_4bit = True  # what PEFT asks before it wraps a 4-bit linear
    fill(model, device)
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=BLOCK_LINEARS))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:  # over NF4, PEFT leaves them in fp32
        parameter.data = parameter.data.bfloat16()
    optimizer = AdamW8bit(trained, lr=LEARNING_RATE)
    if arm.compiled:
        model.compile_repeated_blocks(backend=backend(job.toy), dynamic=False)
    at = lambda pixels: steps(model, optimizer, inputs(job, pixels, device))
    return Subject(at, sum(parameter.numel() for parameter in trained))


@torch.no_grad()
def fill(model: nn.Module, device: torch.device) -> None:
    """Draw every parameter that has no value yet, one after the other, on the device."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                value = torch.empty_like(parameter, device=device).normal_(std=DEVIATION)
                module._parameters[name] = nn.Parameter(value, requires_grad=False)


def quantise_blocks(model: nn.Module, device: torch.device) -> None:
    """Replace the blocks' linears by bitsandbytes' NF4 ones with random weights, as diffusers' loader does."""
    from bitsandbytes import nn as bnb

    for path, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and "transformer_blocks." in path:
            made = bnb.Linear4bit(
                linear.in_features, linear.out_features, linear.bias is not None, torch.bfloat16,
                compress_statistics=True, quant_type="nf4", device="meta",
            )  # fmt: skip
            drawn = torch.empty(linear.weight.shape, dtype=torch.bfloat16, device=device).normal_(std=DEVIATION)
            made.weight = bnb.Params4bit(drawn, requires_grad=False, compress_statistics=True, quant_type="nf4")
            made.weight = made.weight.to(device)
            made.bias = linear.bias
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, made)


def inputs(job: Job, pixels: int, device: torch.device) -> dict[str, Tensor]:
    """One random sample on the device, and what its velocity should be."""
    shape, side = job.shape, pixels // LATENT_SCALE
    draw = lambda *size: torch.randn(1, *size, device=device, dtype=torch.bfloat16)
    tokens = side * side // 4
    return {
        "hidden_states": draw(tokens, shape.in_channels), "encoder_hidden_states": draw(job.text, shape.text_width),
        "pooled_projections": draw(shape.pooled_width), "timestep": torch.full((1,), 0.5, device=device),
        "guidance": torch.ones(1, device=device), "img_ids": image_ids(side, side, device),
        "txt_ids": torch.zeros(job.text, 3, device=device), "target": draw(tokens, shape.out_channels),
    }  # fmt: skip


@contextlib.contextmanager
def steps(model: nn.Module, optimizer: torch.optim.Optimizer, given: dict[str, Tensor]) -> Iterator[Step]:
    """A function that takes one step: forward, backward, optimizer."""
    target = given.pop("target")

    def step() -> float:
        output = model(**given, return_dict=False)[0]
        loss = nn.functional.mse_loss(output.float(), target.float())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    yield step
