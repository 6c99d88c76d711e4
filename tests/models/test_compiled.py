"""Compiled regions are the eager functions: alone to rounding, and in the model with every precision and residence."""

import functools

import pytest
import torch

from library.config.tables.memory import MemoryTable
from library.config.tables.network import NetworkTable
from library.models import compiled, elementwise
from library.models.checkpoint_file import TransformerFile
from library.models.compiled import Region, compile_elementwise
from library.models.rope import rotation_table
from library.models.setup import load, set_up_training
from library.networks import build
from tests.models.test_flux import LowRank, image_ids, inputs
from tests.tiny import tiny_transformer

BLOCKS = 6
CHECKPOINTED = {"gradient_checkpointing": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("transformer")
    tiny_transformer(double=2, single=4).save_pretrained(path)
    return path


def arguments(name: str, batch: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Random inputs of a function: 5 text tokens before 6 image tokens, two heads of 16."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    x, vector, text, image = (draw(batch, 11, 32), *(draw(batch, count, 32) for count in (1, 5, 6)))
    heads = lambda tensor: tensor.unflatten(-1, (2, 16))
    table = rotation_table(image_ids(4, 6), (4, 6, 6), dtype)
    return {
        "modulated_norm": [x, vector, draw(batch, 1, 32)],
        "gated_norm": [x, vector, draw(batch, 11, 32), draw(batch, 1, 32), draw(batch, 1, 32)],
        "gated_sum": [x, vector, draw(batch, 11, 32)],
        "rotated_norm": [heads(x), draw(16), table],
        "joint_norm": [heads(text), heads(image), draw(16), draw(16), table],
    }[name]


def outputs_and_gradients(function, given: list[torch.Tensor]) -> list[torch.Tensor]:
    outputs = function(*given)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(output.shape, generator=generator, dtype=torch.float64) for output in outputs]
    loss = sum((output.double() * weight).sum() for output, weight in zip(outputs, weights))
    return [*outputs, *torch.autograd.grad(loss, [tensor for tensor in given if tensor.requires_grad])]


def largest_difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """Relative to each tensor's largest value."""
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(ours, theirs, strict=True)]
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in pairs)


FUNCTIONS = ["modulated_norm", "gated_norm", "gated_sum", "rotated_norm", "joint_norm"]
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@functools.cache
def ops_compiled_by(backend: str) -> elementwise.Elementwise:
    """The regions, shared by the tests of this file: a graph fits every model of the same width."""
    ops = elementwise.Elementwise()
    compile_elementwise(ops, backend)
    return ops


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_plain_and_eager_functions_agree(name, batch, dtype) -> None:
    given = arguments(name, batch, dtype)
    eager = outputs_and_gradients(getattr(elementwise, name), given)
    ours = outputs_and_gradients(getattr(ops_compiled_by("aot_eager"), name), given)
    assert all(a.dtype == b.dtype and a.shape == b.shape for a, b in zip(ours, eager))
    assert largest_difference(ours, eager) < ROUNDING[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_inductor_and_eager_functions_agree(dtype) -> None:
    ops = ops_compiled_by("inductor")
    for name in FUNCTIONS:
        for batch in (1, 2):
            given = arguments(name, batch, dtype)
            eager = outputs_and_gradients(getattr(elementwise, name), given)
            assert largest_difference(outputs_and_gradients(getattr(ops, name), given), eager) < ROUNDING[dtype], name


def test_fp16_is_clipped_to_its_finite_range() -> None:
    large = torch.full((1, 3, 32), 60000.0, dtype=torch.float16)
    ones = torch.ones(1, 1, 32, dtype=torch.float16)
    given = (large, ones, large)
    ops = ops_compiled_by("aot_eager")
    for output in (ops.gated_sum(*given), ops.gated_norm(*given, ones, ones)[0]):
        assert torch.equal(output, torch.full_like(large, 65504.0))


def model_of(folder, dtype: torch.dtype, backend: str | None, **memory):
    """A tiny model in this precision and residence, compiled unless `backend` is None."""
    table = MemoryTable(**memory)
    model = load(TransformerFile.open(folder), dtype=dtype, memory=table)
    set_up_training(model, table)
    if backend is not None:
        vars(model.ops).update(vars(ops_compiled_by(backend)))
    return model


def with_lora(model):
    """The model, and its LoRA's parameters with values everywhere."""
    parameters = build(NetworkTable(network_dim=4), model, 0).attach()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model, parameters


def train(model, parameters) -> list[torch.Tensor]:
    """A step, and a prediction without gradients as a preview makes it: outputs and gradients."""
    given = inputs(2, torch.float32)
    output = model(**given)
    output.float().square().mean().backward()
    with torch.no_grad():
        preview = model(**given)
    return [output, preview, *(parameter.grad for parameter in parameters)]


@pytest.mark.slow
@pytest.mark.parametrize("swapped", [0, BLOCKS])
@pytest.mark.parametrize("checkpointing", [{}, {**CHECKPOINTED, "cpu_offload_checkpointing": True}])
@pytest.mark.parametrize(
    ("dtype", "precision", "tolerance"),
    [
        (torch.float32, "fp32", 1e-5), (torch.float32, "bf16", 1e-5), (torch.float32, "int8", 1e-5),
        (torch.float32, "nf4", 1e-5), (torch.bfloat16, "bf16", 0.1), (torch.float16, "fp16", 0.02),
    ],
)  # fmt: skip
def test_every_precision_and_residence(folder, dtype, precision, tolerance, checkpointing, swapped) -> None:
    keys = {"base_precision": precision, "blocks_to_swap": swapped, **checkpointing}
    results = [train(*with_lora(model_of(folder, dtype, backend, **keys))) for backend in (None, "aot_eager")]
    assert largest_difference(results[1], results[0]) < tolerance


@pytest.mark.parametrize("kind", [{"reads": True}, {"dropout": 0.3}], ids=["reads_output", "dropout"])
def test_checkpointing_a_compiled_model_changes_no_bit(folder, kind) -> None:
    """Adapters that draw random numbers or read the base's output; kept attention."""
    results = []
    for keys in ({}, CHECKPOINTED, {**CHECKPOINTED, "save_attention_outputs": True}):
        model = model_of(folder, torch.float32, "aot_eager", **keys)
        for seed, (path, linear) in enumerate(model.linears().items()):
            if path.startswith(("double_blocks", "single_blocks")) and "mod" not in path:
                linear.adapter = LowRank(linear, seed, **kind)
        torch.manual_seed(3)
        results.append(train(model, [parameter for parameter in model.parameters() if parameter.requires_grad]))
    if "dropout" in kind:
        # The previews draw after the steps, which must have left the generator in one state.
        assert torch.equal(results[0][1], results[1][1])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


class Graphs:
    """A backend that counts the graphs it is asked to compile, and runs them as they are."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph, example_inputs):
        self.count += 1
        return graph.forward


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_dozen_buckets_share_the_graphs_of_the_first(folder, checkpointing) -> None:
    model, _ = with_lora(model_of(folder, torch.float32, None, gradient_checkpointing=checkpointing))
    backend, counts = Graphs(), []
    compile_elementwise(model.ops, backend)
    for bucket in range(12):
        for batch in (1, 2 + bucket % 3):
            given = inputs(batch, torch.float32)
            rows, columns = 4 + 2 * (bucket % 4), 4 + 2 * (bucket // 4)
            given["image_ids"] = image_ids(rows, columns)
            given["tokens"] = torch.randn(batch, rows * columns // 4, 384)
            given["text"] = torch.randn(batch, (7, 12, 32)[bucket % 3], 32)
            model(**given).square().mean().backward()
            with torch.no_grad():
                model(**given)
        counts.append(backend.count)
    assert counts[0] == counts[-1] <= 20


def test_running_out_of_graphs_is_an_error_and_not_eager_execution(monkeypatch) -> None:
    from torch._dynamo.exc import FailOnRecompileLimitHit

    monkeypatch.setattr(compiled, "VARIANTS", 2)
    region = Region(compiled.plain_gated_sum, Graphs())
    ones = torch.ones(1, 3, 8)
    given = (ones, ones[:, :1], ones)
    region(*given), region(*(tensor.double() for tensor in given))
    with pytest.raises(FailOnRecompileLimitHit):
        region(*(tensor.bfloat16() for tensor in given))


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("dtype", "precision", "tolerance"),
    [(torch.float32, "int8", 1e-5), (torch.float32, "bf16", 1e-5), (torch.bfloat16, "nf4", 0.1)],
)
def test_inductor_in_the_whole_model(folder, dtype, precision, tolerance, checkpointing) -> None:
    keys = {"base_precision": precision, "blocks_to_swap": 3, "gradient_checkpointing": checkpointing}
    results = [train(*with_lora(model_of(folder, dtype, backend, **keys))) for backend in (None, "inductor")]
    assert largest_difference(results[1], results[0]) < tolerance
