"""Stored precisions: their errors, their gradients, bitsandbytes as NF4's oracle, and who is quantised."""

import subprocess
import sys

import pytest
import torch

from library.memory import storage
from library.memory.linear import Linear
from library.memory.precision import QUANTISED, STORAGES, Int8, is_quantised, make_storage

OUT, IN = 192, 256
ERRORS = {"int8": 0.0085, "fp8": 0.0275, "nf4": 0.095}


def weight(seed: int = 0) -> torch.Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed)) * 0.02


def stored(precision: str, value: torch.Tensor, arithmetic: bool = False):
    kind = STORAGES[precision]
    tensors = kind.encode(value, kind.layout(tuple(value.shape), torch.bfloat16))
    return make_storage(precision, tuple(value.shape), tensors, arithmetic)


def relative(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value.float() - truth).norm() / truth.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", QUANTISED)
def test_weight_error(precision, dtype) -> None:
    assert (
        0.3 * ERRORS[precision] < relative(stored(precision, weight()).dequantized(dtype), weight()) < ERRORS[precision]
    )


@pytest.mark.parametrize("precision", QUANTISED)
def test_layout_is_what_encoding_gives(precision) -> None:
    storage = stored(precision, weight())
    layout = STORAGES[precision].layout((OUT, IN), torch.bfloat16)
    assert {name: (tuple(t.shape), t.dtype) for name, t in storage.home.items()} == layout
    bytes_per_weight = storage.num_bytes / (OUT * IN)
    assert bytes_per_weight < {"int8": 1.01, "fp8": 1.01, "nf4": 0.54}[precision]


def test_rows_of_zeros_and_outliers_survive() -> None:
    value = weight()
    value[3] = 0
    value[5, 7] = 40.0
    for precision in ("int8", "fp8"):
        back = stored(precision, value).dequantized(torch.float32)
        assert torch.equal(back[3], value[3])
        assert back[5, 7] == pytest.approx(40.0, rel=0.01)
        assert relative(back[6:], value[6:]) < ERRORS[precision]


def test_bf16_scales_are_never_too_small() -> None:
    value = weight() * torch.logspace(-6, 6, OUT)[:, None]
    storage = stored("int8", value)
    assert (storage.home["scale"].float()[:, 0] * 127 >= value.abs().amax(1) * (1 - 1e-6)).all()
    assert storage.home["values"].abs().max() <= 127


def test_nf4_is_bitsandbytes() -> None:
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(weight(), blocksize=64, compress_statistics=True, quant_type="nf4")
    assert torch.equal(stored("nf4", weight()).dequantized(torch.float32), functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_by_bitsandbytes_own_product(dtype) -> None:
    """The operator that a card uses; on a CPU it decodes, so its numbers are those of the decoded weight."""
    storage, bias = stored("nf4", weight()), torch.randn(OUT, dtype=dtype)
    x = torch.randn(3, 7, 2 * IN, dtype=dtype)[..., ::2]
    expected = torch.nn.functional.linear(x.contiguous(), storage.dequantized(dtype), bias)
    assert torch.equal(storage.multiplied_by_bitsandbytes(x, bias), expected)


def test_nf4_by_its_definition() -> None:
    tensors = stored("nf4", weight()).home
    absmax = tensors["absmax_code"][tensors["absmax"].long()].view(
        -1, 256 if tensors["absmax"].numel() % 256 == 0 else 1
    )
    absmax = absmax * tensors["absmax_scale"].repeat_interleave(256)[: absmax.numel()].view(absmax.shape)
    absmax = absmax.flatten() + tensors["offset"]
    packed = tensors["packed"].flatten()
    values = tensors["code"][torch.stack([packed >> 4, packed & 15], dim=1).flatten().long()]
    plain = (values.view(-1, 64) * absmax[:, None]).view(OUT, IN)
    assert torch.allclose(stored("nf4", weight()).dequantized(torch.float32), plain, atol=1e-7)


@pytest.mark.parametrize("precision", QUANTISED)
def test_linear_and_its_gradient_are_those_of_the_dequantised_weight(precision) -> None:
    linear = Linear(IN, OUT)
    linear.set_storage(stored(precision, weight()))
    x = torch.randn(2, 5, IN, requires_grad=True)
    reference = x.detach().clone().requires_grad_()
    plain = linear.dequantized()
    grad = torch.randn(2, 5, OUT)
    output = linear(x)
    output.backward(grad)
    expected = torch.nn.functional.linear(reference, plain, linear.bias)
    expected.backward(grad)
    assert torch.allclose(output, expected, atol=1e-6) and torch.allclose(x.grad, reference.grad, atol=1e-6)


@pytest.mark.parametrize("precision", QUANTISED)
def test_nothing_of_the_weight_or_input_is_saved_for_backward(precision) -> None:
    linear = Linear(IN, OUT)
    linear.set_storage(stored(precision, weight()))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear(torch.randn(2, IN, requires_grad=True))
    assert not saved


@pytest.mark.parametrize(("precision", "error"), [("int8", 0.012), ("fp8", 0.045)])
def test_arithmetic_on_quantised_activations_is_close(precision, error) -> None:
    x = torch.randn(64, IN)
    exact, fast = stored(precision, weight()), stored(precision, weight(), arithmetic=True)
    bias = torch.randn(OUT) * 0.1
    truth = torch.nn.functional.linear(x, weight(), bias)
    assert relative(exact.linear(x, bias), truth) < relative(fast.linear(x, bias), truth) < error


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_arithmetic_in_pieces_is_that_of_the_whole(precision, monkeypatch) -> None:
    """Each row has its own scale: how many go at once changes nothing but the memory it takes."""
    from library.memory import precision as module

    fast, x = stored(precision, weight(), arithmetic=True), torch.randn(2, 50, IN)
    whole = fast.linear(x, torch.ones(OUT))
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 34)
    assert torch.equal(fast.linear(x, torch.ones(OUT)), whole)


def test_int8_arithmetic_leaves_small_batches_to_the_plain_path() -> None:
    fast, plain = stored("int8", weight(), arithmetic=True), stored("int8", weight())
    x = torch.randn(4, IN)
    assert torch.equal(fast.linear(x, None), plain.linear(x, None))


@pytest.mark.parametrize("precision", ["fp32", *QUANTISED])
def test_merging_a_change_into_the_weight(precision) -> None:
    linear = Linear(IN, OUT)
    if precision == "fp32":
        linear.weight.copy_(weight())
    else:
        linear.set_storage(stored(precision, weight()))
    delta = weight(1) * 3
    linear.add_to_weight(delta)
    assert relative(linear.dequantized(), weight() + delta) < 1.5 * ERRORS.get(precision, 1e-6)


def test_who_stays_in_high_precision() -> None:
    high = ["img_in", "txt_in", "time_in.in_layer", "final_layer.linear", "final_layer.adaLN_modulation.1"]
    low = ["double_blocks.0.img_attn.qkv", "single_blocks.3.linear1", "double_blocks.1.txt_mod.lin"]
    assert not any(is_quantised(path) for path in high) and all(is_quantised(path) for path in low)
    assert not is_quantised("single_blocks.3.linear1", (r"single_blocks\.3\.",))


def test_a_storage_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="192"):
        Linear(OUT, IN).set_storage(stored("int8", weight()))


def test_moving_keeps_precisions() -> None:
    linear = Linear(IN, OUT)
    linear.set_storage(stored("int8", weight()))
    linear.to(torch.bfloat16)
    assert linear.storage.home["values"].dtype == torch.int8 and linear.bias.dtype == torch.bfloat16
    assert isinstance(linear.storage, Int8) and linear.storage.bound is linear.storage.home


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", QUANTISED)
@pytest.mark.parametrize("shape", [(192, 256), (70, 33), (129, 62), (1, 1)])
@pytest.mark.parametrize("count", [1, 3, 8, 16])
def test_a_few_vectors_on_a_cpu_are_as_exact_as_the_decoded_weight(precision, dtype, shape, count, monkeypatch) -> None:
    monkeypatch.setattr(storage, "STRIP", 64 * shape[1])  # several strips, the last one short
    value = torch.randn(shape, generator=torch.Generator().manual_seed(count)) * 0.02
    x = torch.randn(count, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    bias = torch.randn(shape[0]).to(dtype)
    kept = stored(precision, value)
    assert kept.takes_few(x) and not kept.takes_few(x.expand(17, *x.shape))
    exact = x.double() @ kept.dequantized(torch.float32).double().t() + bias.double()
    decoded = torch.nn.functional.linear(x, kept.dequantized(dtype), bias)
    error = (kept.linear(x, bias).double() - exact).abs().max()
    assert error <= 2 * (decoded.double() - exact).abs().max() + (1e-6 if dtype == torch.float32 else 1e-2)
    assert torch.equal(kept.linear(x.view(1, count, 1, -1), bias).view(count, -1), kept.linear(x, bias))


def test_every_fp8_number_is_widened_exactly() -> None:
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn)
    known = every.float().isfinite()
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(STORAGES["fp8"].widened(every, dtype)[known], every.to(dtype)[known])


def test_strips_follow_a_rebound_weight() -> None:
    for precision in QUANTISED:
        first, second = stored(precision, weight(1)), stored(precision, weight(2))
        x = torch.randn(2, IN)
        first.bind(second.home)
        assert torch.equal(first.linear(x, None), second.linear(x, None))


def test_bitsandbytes_is_imported_quietly_and_without_the_hubs_kernels(tmp_path) -> None:
    (tmp_path / "kernels.py").write_text("raise SystemExit('the hub was asked')", encoding="utf-8")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from library.memory.precision import STORAGES; import torch, logging\n"
        "STORAGES['nf4'].encode(torch.ones(64, 64), {})\n"
        "print('kernels' in sys.modules, logging.getLogger('bitsandbytes').level)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout.split(), done.stderr) == (["False", "0"], "")
