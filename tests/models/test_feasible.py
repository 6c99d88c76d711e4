"""What a card cannot do is refused before weights are loaded, by the key that asked for it."""

import re

import pytest
import torch

from library.config import load
from library.config.tables.memory import MemoryTable
from library.errors import ConfigError
from library.memory.capability import DTYPES, Capability, capability_of, mixed_precision
from library.models.feasible import require, require_training
from library.models.shape import FluxShape
from tests.models.test_examples import EXAMPLES

FULL = FluxShape()
GIB = 1 << 30


def card(name: str, compute: tuple[int, int], gigabytes: float) -> Capability:
    """A card, and the attention kernels that its generation has."""

    def backends(dtype: torch.dtype) -> list[str]:
        half = compute >= (8, 0) and dtype != torch.float32
        return ["auto", *(["flash", "cudnn"] if half else []), "efficient", "math"]

    return Capability(name, "cuda", compute, compute >= (8, 0), int(gigabytes * GIB), backends)


def test_an_unknown_compiler_is_refused() -> None:
    able = card("RTX 3090", (8, 6), 24)
    small = FluxShape(hidden=128, heads=1, mlp=512, double_blocks=1, single_blocks=1)
    wanted = MemoryTable(torch_compile=True, dynamo_backend="inductr")
    with pytest.raises(ConfigError, match="inductr.*inductor"):
        require(wanted, small, torch.bfloat16, able)
    require(MemoryTable(torch_compile=True, dynamo_backend="aot_eager"), small, torch.bfloat16, able)


PASCAL = card("GTX 1080", (6, 1), 8)
TURING = card("RTX 2080 Ti", (7, 5), 11)
AMPERE = card("RTX 3090", (8, 6), 24)
ADA = card("RTX 4090", (8, 9), 24)


def refused(memory: MemoryTable, able: Capability, dtype=torch.bfloat16) -> str:
    with pytest.raises(ConfigError) as caught:
        require(memory, FULL, dtype, able)
    return str(caught.value)


def test_fp8_arithmetic() -> None:
    table = MemoryTable(base_precision="fp8", fp8_arithmetic=True)
    assert "RTX 3090 (compute capability 8.6) cannot multiply in fp8" in refused(table, AMPERE)
    require(table, FULL, torch.bfloat16, ADA)
    require(MemoryTable(base_precision="fp8"), FULL, torch.bfloat16, AMPERE)


def test_int8_arithmetic() -> None:
    table = MemoryTable(base_precision="int8", int8_arithmetic=True, blocks_to_swap="all", modulation_on_cpu=True)
    message = refused(table, PASCAL, torch.float32)
    assert "int8_arithmetic = true" in message and "Remove the key" in message
    require(table, FULL, torch.float32, TURING)
    require(table.model_copy(update={"base_precision": "nf4"}), FULL, torch.float32, PASCAL)


@pytest.mark.parametrize(
    ("able", "dtype", "backend", "works"),
    [
        (AMPERE, torch.bfloat16, "flash", True),
        (AMPERE, torch.float32, "flash", False),
        (TURING, torch.float32, "cudnn", False),
        (TURING, torch.float32, "efficient", True),
    ],
)
def test_attention_backend(able, dtype, backend, works) -> None:
    table = MemoryTable(base_precision="nf4", attention_backend=backend)
    if works:
        require(table, FULL, dtype, able)
    else:
        message = refused(table, able, dtype)
        assert f"attention_backend = {backend} does not work" in message and "efficient, math" in message


def test_attention_backends_of_this_cpu_are_tried() -> None:
    able = capability_of(torch.device("cpu"))
    require(MemoryTable(attention_backend="flash"), FULL, torch.float32, able)
    assert "the CPU with fp32 activations; there are auto" in refused(
        MemoryTable(attention_backend="cudnn"), able, torch.float32
    )


@pytest.mark.parametrize(
    ("able", "dtype", "checkpointing", "message"),
    [
        (AMPERE, torch.bfloat16, True, None),
        (AMPERE, torch.bfloat16, False, "needs gradient_checkpointing = true"),
        (AMPERE, torch.float32, True, "RTX 3090 .* with fp32: remove the key"),
        (TURING, torch.float16, True, "compute capability 7.5"),
        (capability_of(torch.device("cpu")), torch.float32, True, None),
    ],
)
def test_saved_attention_outputs(able, dtype, checkpointing, message) -> None:
    table = MemoryTable(save_attention_outputs=True, gradient_checkpointing=checkpointing)
    if message is None:
        require_training(table, dtype, able)
    else:
        with pytest.raises(ConfigError, match=message):
            require_training(table, dtype, able)


@pytest.mark.parametrize(
    ("wanted", "able", "found"),
    [
        (None, AMPERE, "bf16"), (None, TURING, "no"), (None, capability_of(torch.device("cpu")), "no"),
        ("no", AMPERE, "no"), ("fp16", TURING, "fp16"), ("bf16", capability_of(torch.device("cpu")), "bf16"),
    ],
)  # fmt: skip
def test_the_precision_of_the_arithmetic(wanted, able, found) -> None:
    assert mixed_precision(wanted, able) == found


def test_bf16_on_a_card_that_only_emulates_it_is_refused() -> None:
    with pytest.raises(ConfigError, match=r'RTX 2080 Ti .*has no bf16 arithmetic. Set mixed_precision = "no"'):
        mixed_precision("bf16", TURING)


def test_a_card_without_bf16_does_not_load_the_base_in_fp32() -> None:
    dtype = DTYPES[mixed_precision(None, TURING)]
    message = refused(MemoryTable(), TURING, dtype)
    assert "the base in fp32, as base_precision is not set (this card has no bf16), fills 47." in message
    assert 'Set base_precision = "int8"' in message and "vram_budget_gb = 11" in message
    require(MemoryTable(base_precision="nf4"), FULL, dtype, TURING)
    require(MemoryTable(base_precision="int8", modulation_on_cpu=True), FULL, dtype, TURING)
    require(MemoryTable(base_precision="int8", blocks_to_swap=19), FULL, dtype, TURING)
    assert "the base in int8 fills 12." in refused(MemoryTable(base_precision="int8"), TURING, dtype)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_ready_configurations_run_on_a_new_card_and_are_refused_on_one_without_bf16(path) -> None:
    run = load(["--config_file", str(path)], "train")
    size = int(re.match(r"fill_edit_(\d+)gb", path.stem)[1])
    able = card("new", (8, 6), size)
    require(run.memory, FULL, DTYPES[mixed_precision(run.training.mixed_precision, able)], able)
    require_training(run.memory, torch.bfloat16, able)
    with pytest.raises(ConfigError, match="has no bf16"):
        mixed_precision(run.training.mixed_precision, card("old", (7, 5), size))
