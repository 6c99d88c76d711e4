"""Memory of a training run, phase by phase: the step's two halves, and the pictures made between steps.

Notation: h hidden width, T tokens of text and image together, B batch, e bytes of an activation (2 in bf16).
"""

from __future__ import annotations

from library.models.cost.encoding import decoding, denoising
from library.models.cost.terms import (
    OPTIMIZER_BYTES,
    PAGED_BYTES,
    PROCESS_RAM,
    STEP_BYTES,
    Memory,
    Picture,
    Setting,
    Work,
    largest,
    on_device,
)
from library.models.cost.weights import QUANTISED, base_in_ram, base_on_device
from library.models.shape import FluxShape

# Activations, in units of h * e bytes per token (fitted, within 3% of the fake-tensor runs at 512 and 1024 px):
IN_FLIGHT = 29.1
"""Inside the block that runs backward with checkpointing: what it saved and the gradients on their way."""
PER_RANK = 0.0056
"""More of it per unit of the network's rank."""
BESIDE_LARGEST, BESIDE_LAST = 23.0, 27.0
"""Of it, what is alive while a single block's first linear (the largest) is dequantised, and while its last one is."""
IN_FLIGHT_DOUBLE = 25.8
"""In its place in a double block, while its largest linear is dequantised: the end of the backward pass."""
SAVED_DOUBLE, SAVED_SINGLE, SAVED_REST = 20.4, 22.2, 5.0
"""Without checkpointing: kept per double block, per single block, and outside of them."""
CLIP_SAVED = 34.0
"""What a layer of CLIP keeps for its backward pass, in units of its width; it has no checkpointing."""
CLIP_TOKENS = 77


def _unit(shape: FluxShape, work: Work) -> float:
    return shape.hidden * work.activation_bytes * work.tokens * work.batch


def _kept(shape: FluxShape, setting: Setting) -> int:
    """Units that checkpointing keeps on the device: an input per block, or with offload those of the blocks at hand."""
    num_blocks = shape.double_blocks + shape.single_blocks
    kept = min(3, num_blocks) if setting.offload else num_blocks
    return kept + (num_blocks if setting.save_attention else 0)


def activations(shape: FluxShape, setting: Setting, work: Work) -> float:
    """Peak bytes of activations and gradients in flight during one training step.

    With checkpointing: an input per block (the checkpoints), and what one block needs while it runs backward.
    Offloaded, only the inputs of the block at hand and the next one are on the device.
    """
    if setting.checkpointing:
        return (_kept(shape, setting) + IN_FLIGHT + PER_RANK * work.rank) * _unit(shape, work)
    num_blocks = shape.double_blocks + shape.single_blocks
    saved = SAVED_DOUBLE * shape.double_blocks + SAVED_SINGLE * shape.single_blocks + SAVED_REST
    return (saved + PER_RANK * work.rank * num_blocks) * _unit(shape, work)


def step_peak(shape: FluxShape, setting: Setting, work: Work) -> dict[str, float]:
    """What one step allocates at its worst moment.

    That is the start of the backward pass, where all checkpoints are still there, or its end, where the gradients are:
    the first micro-step's appear block by block, while the checkpoints of these blocks go. Later micro-steps find all
    of them there. A dequantised weight and the most activations are not alive at once.
    """
    unit, width = _unit(shape, work), shape.hidden * work.activation_bytes
    full = float(work.weight_bytes) * work.trained
    quantised = setting.precision in QUANTISED
    begun = activations(shape, setting, work)
    if quantised and setting.checkpointing:
        first, last = (3 * shape.hidden + shape.mlp) * width, (shape.hidden + shape.mlp) * width
        begun = max(
            begun, begun - (IN_FLIGHT - BESIDE_LAST) * unit + last, begun - (IN_FLIGHT - BESIDE_LARGEST) * unit + first
        )
    elif quantised:
        begun += (3 * shape.hidden + shape.mlp) * width
    start = {"activations": begun, "gradients": full if work.micro_steps > 1 else 0.0}
    ended = (IN_FLIGHT_DOUBLE + PER_RANK * work.rank) * unit + (shape.mlp * width if quantised else 0.0)
    end = {"activations": ended if setting.checkpointing else begun, "gradients": full}
    return max(start, end, key=lambda moment: sum(moment.values()))


def training_phases(shape: FluxShape, setting: Setting, work: Work) -> dict[str, Memory]:
    """Device memory of the training command's phases."""
    optimizer = float(OPTIMIZER_BYTES.get(work.optimizer, 8)) * work.trained
    held = {
        **base_on_device(shape, setting, work.activation_bytes),
        "network": float(work.weight_bytes) * work.trained,
        "optimizer": 0.0 if work.optimizer_offload else optimizer,
        "moving average": 4.0 * work.trained if work.ema_on_device else 0.0,
        "CLIP": float(work.activation_bytes) * work.clip,
    }
    encoders = work.encoders
    clip = CLIP_SAVED * encoders.clip_width * encoders.clip_layers * CLIP_TOKENS * work.batch * work.activation_bytes
    step = {
        **step_peak(shape, setting, work),
        "CLIP's activations": clip if work.clip else 0.0,
    }
    update = {
        "optimizer": optimizer,
        "gradients": float(work.weight_bytes) * work.trained,
        "what lives while it steps": _while_stepping(work) * work.trained,
    }
    phases = {"training step": on_device({**held, **step}), "optimizer step": on_device({**held, **update})}
    # a moving average takes the weights' place in a picture, and they wait beside it; schedule-free ones likewise
    set_aside = work.use_ema or "ScheduleFree" in work.optimizer
    held["weights set aside"] = float(work.weight_bytes) * work.trained if set_aside else 0.0
    for name, picture in (("preview", work.preview), ("validation", work.held_out)):
        phases |= _picture_phases(name, held, picture, shape, setting, work)
    return phases


def _while_stepping(work: Work) -> float:
    """Bytes per trained parameter that exist only between the backward pass and the next step.

    The optimizer's intermediate values, or before them the flat copy that several processes add up; and weights and
    gradients in float32 where they are bfloat16.
    """
    gathered = 4.0 if work.processes > 1 else 0.0
    return max(float(STEP_BYTES.get(work.optimizer, 4)), gathered) + 2.0 * (4 - work.weight_bytes)


def _picture_phases(
    name: str,
    held: dict[str, float],
    picture: Picture | None,
    shape: FluxShape,
    setting: Setting,
    work: Work,
) -> dict[str, Memory]:
    """Painting between two steps: base, network and optimizer stay, gradients and the step's activations are gone."""
    if picture is None:
        return {}
    paint = denoising(shape, setting, picture, work.text, work.activation_bytes)
    phases = {f"{name}, denoising": on_device({**held, **paint})}
    if picture.decoded:
        phases[f"{name}, decoding"] = on_device({**held, **decoding(picture, work.encoders)})
    return phases


def training_vram(shape: FluxShape, setting: Setting, work: Work) -> Memory:
    """Device memory of the phase of the training command that needs most."""
    return largest(training_phases(shape, setting, work))[1]


def training_ram(shape: FluxShape, setting: Setting, work: Work) -> Memory:
    """Host memory of the training command, beside what the system and the desktop use."""
    base, locked = base_in_ram(shape, setting, work.activation_bytes)
    num_blocks = shape.double_blocks + shape.single_blocks
    state = OPTIMIZER_BYTES.get(work.optimizer, 8) if work.optimizer_offload else PAGED_BYTES.get(work.optimizer, 0)
    checkpoints = _unit(shape, work) * num_blocks if setting.offload else 0.0
    parts = {
        "process": PROCESS_RAM,
        **base,
        f"offloaded checkpoints{' (page-locked)' if setting.pin else ''}": checkpoints,
        "optimizer": float(state) * work.trained,
        "moving average": 4.0 * work.trained if work.use_ema and not work.ema_on_device else 0.0,
    }
    return Memory(parts, locked + (checkpoints if setting.pin else 0.0))
