"""What a run costs: every formula behind the memory forecast and the estimated seconds. Imports no torch.

Reading order: terms (settings, work, bytes by what they are for), weights (the base's bytes by where they live),
training (the phases of a training run), encoding (text encoders and VAE; the phases of caching and inference),
time (FLOPs, bytes over PCIe, seconds).

Bytes are exact where they follow from shapes (weights, ring, network, checkpoints, the VAE's widest stage) and fitted
where they depend on what autograd keeps (activations; `benchmarks/counters.py` measures them on fake tensors, and
tests hold the fits to them). GB is 1e9 bytes.
"""

from library.models.cost.encoding import (
    Encode,
    caching_phases,
    caching_ram,
    inference_phases,
    inference_ram,
    vae_activations,
)
from library.models.cost.terms import (
    CUDA_CONTEXT,
    FRAGMENTATION,
    GB,
    OPTIMIZER_BYTES,
    PAGED_BYTES,
    STEP_BYTES,
    Memory,
    Picture,
    Setting,
    Work,
    largest,
    tokens,
)
from library.models.cost.time import (
    CARDS,
    REFERENCE_CARD,
    Card,
    card_named,
    crossing_bytes,
    encoding_seconds,
    painting_seconds,
    step_flops,
    step_seconds,
)
from library.models.cost.training import activations, training_phases, training_ram, training_vram
from library.models.cost.weights import (
    FULL_MODEL,
    Weights,
    dequantised,
    is_toy,
    num_parameters,
    places,
    swapped_blocks,
    weights,
)

__all__ = [
    "CARDS",
    "CUDA_CONTEXT",
    "FRAGMENTATION",
    "FULL_MODEL",
    "GB",
    "OPTIMIZER_BYTES",
    "PAGED_BYTES",
    "REFERENCE_CARD",
    "STEP_BYTES",
    "Card",
    "Encode",
    "Memory",
    "Picture",
    "Setting",
    "Weights",
    "Work",
    "activations",
    "caching_phases",
    "caching_ram",
    "card_named",
    "crossing_bytes",
    "dequantised",
    "encoding_seconds",
    "inference_phases",
    "inference_ram",
    "is_toy",
    "largest",
    "num_parameters",
    "painting_seconds",
    "places",
    "step_flops",
    "step_seconds",
    "swapped_blocks",
    "tokens",
    "training_phases",
    "training_ram",
    "training_vram",
    "vae_activations",
    "weights",
]
