"""Our transformer is diffusers' function: outputs and every gradient, with and without checkpointing."""

import pytest
import torch
from diffusers.models.transformers import transformer_flux

from library.flow.packing import image_ids
from library.memory.linear import Adapter
from library.models.checkpoint_file import TransformerFile
from library.models.flux import FluxTransformer
from library.models.keymap import entries
from library.models.load import load_transformer
from library.models.predict import scales
from tests.tiny import tiny_transformer

HEIGHT, WIDTH, TEXT = 6, 10, 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("transformer")
    tiny_transformer().save_pretrained(path)
    return path


def inputs(batch: int, dtype: torch.dtype, guidance: bool = True) -> dict:
    generator = torch.Generator().manual_seed(5)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=dtype)
    return {
        "tokens": draw(batch, HEIGHT * WIDTH // 4, 384), "text": draw(batch, TEXT, 32), "pooled": draw(batch, 32),
        "timestep": torch.rand(batch, generator=generator, dtype=dtype),
        "guidance": torch.linspace(1, 30, batch, dtype=dtype) if guidance else None,
        "image_ids": image_ids(HEIGHT, WIDTH),
    }  # fmt: skip


def test_a_guidance_is_embedded_once(folder) -> None:
    """As long as its layers are what they were; another value, or another weight, is embedded anew."""
    model = load_transformer(TransformerFile.open(folder))
    given, embedded = inputs(2, torch.float32), []
    model.guidance_in.register_forward_hook(lambda *_: embedded.append(1))
    first = model(**given)
    assert torch.equal(model(**given), first) and len(embedded) == 1
    other = model(**{**given, "guidance": given["guidance"] + 1})
    assert not torch.equal(other, first) and len(embedded) == 2
    assert scales((1.0, 30.0)) is scales((1.0, 30.0)), "one tensor for the same values"
    model.guidance_in.out_layer.add_to_weight(torch.full_like(model.guidance_in.out_layer.weight, 0.1))
    assert not torch.equal(model(**given), first) and len(embedded) == 3
    model.guidance_in.in_layer.adapter = LowRank(model.guidance_in.in_layer, 0)
    model(**given).sum().backward()
    model(**given).sum().backward()
    assert len(embedded) == 5, "what is trained is never remembered"


def oracle(model, given: dict) -> torch.Tensor:
    return model(
        hidden_states=given["tokens"], encoder_hidden_states=given["text"], pooled_projections=given["pooled"],
        timestep=given["timestep"], guidance=given["guidance"], img_ids=given["image_ids"],
        txt_ids=torch.zeros(TEXT, 3), return_dict=False,
    )[0]  # fmt: skip


def lift_float_casts(monkeypatch) -> None:
    """diffusers rotates in float32 whatever it is given; in float64 the two functions agree to rounding."""

    def embed(self, ids):
        angles = [
            torch.outer(ids[:, axis].double(), 10000 ** -(torch.arange(0, width, 2, dtype=torch.float64) / width))
            for axis, width in enumerate(self.axes_dim)
        ]
        angle = torch.cat(angles, dim=-1).repeat_interleave(2, dim=1)
        return angle.cos(), angle.sin()

    def apply(x, table, sequence_dim=1):
        cos, sin = (part[None, :, None] for part in table)
        real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
        return x * cos + torch.stack([-imaginary, real], dim=-1).flatten(3) * sin

    monkeypatch.setattr(transformer_flux.FluxPosEmbed, "forward", embed)
    monkeypatch.setattr(transformer_flux, "apply_rotary_emb", apply)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())


def gradient_pairs(ours: FluxTransformer, theirs) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """Every parameter's gradient on both sides, fused and reordered as our names are."""
    mine, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    pairs = []
    for entry in entries(ours.shape):
        parts = [other[name].grad for name in entry.diffusers_names()]
        if entry.parts[0].halves_swapped:
            parts = list(parts[0].chunk(2))[::-1]
        pairs.append((entry.name, mine[entry.name].grad, torch.cat(parts)))
    return pairs


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_output_and_all_gradients_are_diffusers(folder, monkeypatch, checkpointing, batch, dtype, tolerance) -> None:
    if dtype == torch.float64:
        lift_float_casts(monkeypatch)
    theirs = tiny_transformer().to(dtype).requires_grad_(True)
    ours = load_transformer(TransformerFile.open(folder), dtype=dtype).requires_grad_(True)
    ours.runner.checkpointing = checkpointing
    given, again = inputs(batch, dtype), inputs(batch, dtype)
    for side in (given, again):
        for name in ("tokens", "text", "pooled"):
            side[name].requires_grad_(True)
    expected, actual = oracle(theirs, again), ours(**given)
    assert relative(actual, expected) < tolerance
    weight = torch.randn(expected.shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    (expected * weight).sum().backward()
    (actual * weight).sum().backward()
    for name in ("tokens", "text", "pooled"):
        assert relative(given[name].grad, again[name].grad) < tolerance, name
    # A gradient is a sum over tokens: in float32 its rounding is relative to the terms, not to a small sum.
    wide = 20 * tolerance
    for name, mine, other in gradient_pairs(ours, theirs):
        assert relative(mine, other) < wide, name


class LowRank(Adapter):
    def __init__(self, linear, seed: int, reads: bool = False, dropout: float = 0.0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.down = torch.nn.Parameter(torch.randn(3, linear.in_features, generator=generator) * 0.1)
        self.up = torch.nn.Parameter(torch.randn(linear.out_features, 3, generator=generator) * 0.1)
        self.reads_base_output, self.draws_random, self.dropout = reads, dropout > 0, dropout

    def forward(self, base_output, x):
        if self.reads_base_output:
            base_output = base_output * base_output.abs().mean()
        x = torch.nn.functional.dropout(x, self.dropout)
        return base_output + (x @ self.down.T) @ self.up.T


def adapted(folder, where: str = "", **kind) -> FluxTransformer:
    model = load_transformer(TransformerFile.open(folder))
    for seed, (path, linear) in enumerate(model.linears().items()):
        if path.startswith(("double_blocks", "single_blocks")) and where in path and "mod" not in path:
            linear.adapter = LowRank(linear, seed, **kind)
    return model


def one_step(model: FluxTransformer, checkpointing: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.runner.checkpointing = checkpointing
    model.zero_grad()
    torch.manual_seed(3)
    output = model(**inputs(2, torch.float32))
    output.square().mean().backward()
    return output.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", [{}, {"reads": True}, {"dropout": 0.3}], ids=["plain", "reads_output", "dropout"])
@pytest.mark.parametrize("where", ["", "single_blocks.1", "img_attn.proj"])
def test_checkpointing_changes_no_bit(folder, where, kind) -> None:
    model = adapted(folder, where, **kind)
    output, gradients = one_step(model, checkpointing=False)
    again, recomputed = one_step(model, checkpointing=True)
    assert torch.equal(output, again)
    assert gradients and all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients.values())
    assert all(torch.equal(gradients[name], recomputed[name]) for name in gradients)


def test_last_product_of_a_block_is_not_recomputed(folder) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    def flops(model) -> int:
        with FlopCounterMode(display=False) as counter:
            one_step(model, checkpointing=True)
        return counter.get_total_flops()

    exact = adapted(folder, "attn.qkv")
    plain = adapted(folder, "attn.qkv")
    for block in [*plain.double_blocks, *plain.single_blocks]:
        for linear in block.last_linears():
            linear.can_be_phantom = lambda: False
    tokens, hidden, mlp = 2 * (HEIGHT * WIDTH // 4 + TEXT), 32, 128
    last = 2 * tokens * (2 * mlp * hidden + 2 * (hidden + mlp) * hidden)
    assert flops(plain) - flops(exact) == last


def test_nothing_flows_to_text_or_frozen_modulation(folder) -> None:
    model = adapted(folder)
    given = inputs(1, torch.float32)
    modulation = model.modulate(given["timestep"], given["guidance"], given["pooled"])
    assert not any(vectors.requires_grad for vectors in (*modulation.image, *modulation.single, modulation.final))
    frozen = [p for n, p in model.named_parameters() if "adapter" not in n]
    model(**given).sum().backward()
    assert all(parameter.grad is None for parameter in frozen)


def test_blocks_before_the_first_trained_one_build_no_graph(folder) -> None:
    model = adapted(folder, "single_blocks.1")
    model.runner.checkpointing = True
    seen = []
    original = model.runner.keeper.keep
    model.runner.keeper.keep = lambda ctx, tensors: seen.append(tensors) or original(ctx, tensors)
    model(**inputs(1, torch.float32))
    assert len(seen) == 1


def test_a_model_without_guidance(tmp_path) -> None:
    theirs = tiny_transformer(guidance=False)
    theirs.save_pretrained(tmp_path)
    ours = load_transformer(TransformerFile.open(tmp_path))
    given = inputs(1, torch.float32, guidance=False)
    assert relative(ours(**given), oracle(theirs, given)) < 1e-6
    with pytest.raises(ValueError, match="guidance"):
        ours(**{**given, "guidance": torch.ones(1)})


def test_rotation_table_is_remembered_per_grid(folder, monkeypatch) -> None:
    from library.models import flux

    calls = []
    original = flux.rotation_table
    monkeypatch.setattr(flux, "rotation_table", lambda *args: calls.append(1) or original(*args))
    model = load_transformer(TransformerFile.open(folder))
    given = inputs(1, torch.float32)
    model(**given), model(**given)
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_and_finite(folder, dtype) -> None:
    exact = load_transformer(TransformerFile.open(folder))
    half = load_transformer(TransformerFile.open(folder), dtype=dtype)
    given = inputs(2, torch.float32)
    assert relative(half(**given).float(), exact(**given)) < 0.05
