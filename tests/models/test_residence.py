"""Where and how the base is kept changes no bit of what is computed; only its precision does."""

import pytest
import torch

from library.config.tables.memory import MemoryTable
from library.errors import ModelError
from library.memory.attention import Attention, available_backends
from library.memory.offload import InHostMemory, OnDevice
from library.memory.stream import spread
from library.models.checkpoint_file import TransformerFile
from library.models.load import Residence, load_transformer
from library.models.setup import load, residence, set_up_training
from tests.models.test_flux import LowRank, inputs
from tests.tiny import tiny_transformer

BLOCKS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("transformer")
    tiny_transformer(double=2, single=4).save_pretrained(path)
    return path


def build(folder, dtype=torch.float32, **keys):
    model = load_transformer(TransformerFile.open(folder), dtype=dtype, residence=Residence(**keys))
    for seed, (path, linear) in enumerate(model.linears().items()):
        if path.startswith(("double_blocks", "single_blocks")) and "mod" not in path:
            linear.adapter = LowRank(linear, seed).to(dtype)
    return model


def train(model, steps: int = 2, preview: bool = True) -> list[torch.Tensor]:
    """A few steps of gradient accumulation with a preview between them: outputs and gradients."""
    seen = []
    model.zero_grad()
    for step in range(steps):
        given = {
            k: v.roll(step, 0) if v is not None and k != "image_ids" else v for k, v in inputs(2, model.dtype).items()
        }
        output = model(**given)
        output.square().mean().backward()
        seen.append(output.detach())
        if preview:
            with torch.no_grad():
                seen.append(model(**given))
    return seen + [parameter.grad for _, parameter in model.named_parameters() if parameter.requires_grad]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) > 10 and all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("swapped", [1, 3, 6])
@pytest.mark.parametrize("ring", [2, 3])
def test_streaming_changes_no_bit(folder, checkpointing, swapped, ring) -> None:
    resident, streamed = (
        build(folder, precision="fp32"),
        build(folder, precision="fp32", blocks_to_swap=swapped, ring=ring),
    )
    resident.runner.checkpointing = streamed.runner.checkpointing = checkpointing
    assert len(streamed.runner.streamer.slots) == min(ring, swapped)
    assert equal(train(resident), train(streamed))


@pytest.mark.parametrize("precision", ["bf16", "int8", "fp8", "nf4"])
def test_streaming_changes_no_bit_in_any_precision(folder, precision) -> None:
    results = []
    for swapped in (0, BLOCKS):
        model = build(folder, torch.bfloat16, precision=precision, blocks_to_swap=swapped)
        model.runner.checkpointing = True
        results.append(train(model))
    assert equal(*results)


@pytest.mark.parametrize("swapped", [0, BLOCKS])
def test_activations_in_host_memory_change_no_bit(folder, swapped) -> None:
    results = []
    for keeper in (OnDevice(), InHostMemory(torch.device("cpu"), large=1)):
        model = build(folder, precision="int8", blocks_to_swap=swapped)
        model.runner.checkpointing, model.runner.keeper = True, keeper
        results.append(train(model))
    assert equal(*results)
    streams = 2 * sum(x.numel() for x in (inputs(2, torch.float32)["tokens"], inputs(2, torch.float32)["text"]))
    assert keeper.bytes_kept > streams and keeper.free and not keeper.waiting


def test_modulation_on_the_cpu_changes_no_bit(folder) -> None:
    here, there = build(folder, precision="int8"), build(folder, precision="int8", modulation_on_cpu=True)
    assert equal(train(here), train(there))


def test_modulation_can_be_computed_ahead(folder) -> None:
    model = build(folder, precision="fp32")
    given = inputs(2, torch.float32)
    ahead = model.modulate(given["timestep"], given["guidance"], given["pooled"])
    assert torch.equal(model(**given), model(**given, modulation=ahead))


def test_the_bytes_that_cross_are_two_per_block_less_the_turn(folder) -> None:
    model = build(folder, precision="int8", blocks_to_swap=BLOCKS)
    model.runner.checkpointing = True
    streamer = model.runner.streamer
    train(model, steps=1, preview=False)
    first = streamer.bytes_copied
    sizes = [streamer.blocks[index].buffer.numel() for index in range(BLOCKS)]
    assert first == 2 * sum(sizes) - sum(sizes[-2:])
    train(model, steps=1, preview=False)
    assert streamer.bytes_copied - first == 2 * sum(sizes) - sum(sizes[-2:]) - sum(sizes[:2])


def test_weights_can_be_read_and_merged_while_streamed(folder) -> None:
    plain, streamed = build(folder, precision="fp32"), build(folder, precision="fp32", blocks_to_swap=BLOCKS)
    train(streamed, steps=1)
    for path, linear in streamed.linears().items():
        assert torch.equal(linear.dequantized(), plain.linears()[path].dequantized()), path
    for model in (plain, streamed):
        linear = model.linears()["double_blocks.0.img_attn.qkv"]
        linear.add_to_weight(torch.ones(linear.out_features, linear.in_features) * 0.01)
    assert equal(train(plain), train(streamed))


def test_streamed_blocks_are_spread_evenly() -> None:
    assert spread(57, 57) == list(range(57)) == spread(99, 57)
    chosen = spread(19, 57)
    assert len(set(chosen)) == 19 and {b - a for a, b in zip(chosen, chosen[1:])} == {3}


def test_only_named_modules_are_quantised(folder) -> None:
    model = build(folder, precision="int8", keep=(r"single_blocks\.3\.",))
    stored = {path for path, linear in model.linears().items() if linear.storage is not None}
    assert "double_blocks.0.img_mod.lin" in stored and "single_blocks.2.linear1" in stored
    assert not any(path.startswith(("img_in", "final_layer", "single_blocks.3")) for path in stored)


def test_the_memory_table_is_obeyed(folder) -> None:
    table = MemoryTable(
        base_precision="int8", blocks_to_swap="all", cpu_offload_checkpointing=True, modulation_on_cpu=True
    )
    model = load(TransformerFile.open(folder), dtype=torch.bfloat16, memory=table)
    set_up_training(model, table)
    assert len(model.runner.streamer.blocks) == BLOCKS and model.runner.checkpointing
    assert isinstance(model.runner.keeper, InHostMemory)
    assert residence(MemoryTable(), torch.float16, BLOCKS) == Residence("fp16")
    assert residence(MemoryTable(blocks_to_swap=99), torch.float16, BLOCKS).blocks_to_swap == BLOCKS


@pytest.mark.parametrize("precision", ["int8", "fp8", "nf4"])
def test_a_quantised_base_is_saved_and_reopened(folder, tmp_path, precision) -> None:
    file = TransformerFile.open(folder)
    table = MemoryTable(base_precision=precision, save_quantized_base=tmp_path / "kept")
    first = load(file, dtype=torch.bfloat16, memory=table)
    assert (tmp_path / "kept").is_dir()

    def read(entry):
        raise AssertionError(f"{entry.name} was read from the original again")

    file.read = read
    for blocks in (0, "all"):
        again = load(file, dtype=torch.bfloat16, memory=table.model_copy(update={"blocks_to_swap": blocks}))
        given = inputs(1, torch.float32)
        assert torch.equal(first(**given), again(**given))


def test_two_processes_make_a_quantised_base_once(folder, tmp_path) -> None:
    """The first makes it, the second waits and reads it; neither fails."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        made = [pool.submit(make_quantised, folder, tmp_path / "kept") for _ in range(2)]
        sums = [one.result() for one in made]
    assert sums[0] == sums[1]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["kept"]


def make_quantised(folder, kept) -> float:
    """Load with a quantised base in `kept`, in a process of its own."""
    table = MemoryTable(base_precision="int8", save_quantized_base=kept)
    model = load(TransformerFile.open(folder), dtype=torch.bfloat16, memory=table)
    return float(model(**inputs(1, torch.float32)).float().sum())


def test_a_quantised_base_of_something_else_is_refused(folder, tmp_path) -> None:
    file = TransformerFile.open(folder)
    load(file, dtype=torch.bfloat16, memory=MemoryTable(base_precision="int8", save_quantized_base=tmp_path / "kept"))
    with pytest.raises(ModelError, match="precision"):
        load(
            file, dtype=torch.bfloat16, memory=MemoryTable(base_precision="fp8", save_quantized_base=tmp_path / "kept")
        )
    other = tmp_path / "other"
    tiny_transformer(double=2, single=4, seed=9).save_pretrained(other)
    with pytest.raises(ModelError, match="made from"):
        load(
            TransformerFile.open(other), dtype=torch.bfloat16,
            memory=MemoryTable(base_precision="int8", save_quantized_base=tmp_path / "kept"),
        )  # fmt: skip


@pytest.mark.parametrize("swapped", [0, BLOCKS])
def test_keeping_attention_changes_no_bit_and_saves_its_flops(folder, swapped) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Attended(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += "flash_attention" in func._schema.name and "backward" not in func._schema.name
            return func(*args, **(kwargs or {}))

    results, counts = [], []
    for keep in (False, True):
        model = build(folder, precision="fp32", blocks_to_swap=swapped)
        set_up_training(model, MemoryTable(gradient_checkpointing=True, save_attention_outputs=keep))
        with Attended() as attended:
            results.append(train(model, steps=1, preview=False))
        counts.append(attended.count)
    assert equal(*results) and counts == [2 * BLOCKS, BLOCKS]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_parts_are_the_same_function(folder, checkpointing) -> None:
    results = []
    for compiled in (False, True):
        model = build(folder, precision="fp32", blocks_to_swap=3)
        table = MemoryTable(gradient_checkpointing=checkpointing, torch_compile=compiled, dynamo_backend="aot_eager")
        set_up_training(model, table)
        results.append(train(model, steps=1))
    for eager, compiled in zip(*results):
        assert torch.allclose(eager, compiled, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("backend", ["math", "flash"])
def test_attention_backends_agree(folder, backend) -> None:
    file, given = TransformerFile.open(folder), inputs(1, torch.float32)
    auto = load(file, memory=MemoryTable())
    chosen = load(file, memory=MemoryTable(attention_backend=backend))
    assert chosen.attention.backend == backend
    assert torch.allclose(auto(**given), chosen(**given), atol=1e-5)


def test_an_unknown_attention_backend_is_named() -> None:
    with pytest.raises(ValueError, match="xformers"):
        Attention("xformers")
    assert "math" in available_backends(torch.device("cpu"))
