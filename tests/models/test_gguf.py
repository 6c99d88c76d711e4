"""GGUF files: each quantisation by ggml's definition, the mixes that there are, and T5 under llama.cpp's names."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.layout_files import PREFIX, from_files, weights
from tests.tiny import T5_LENGTH


def write_gguf(path, tensors: dict[str, torch.Tensor], kind: str) -> None:
    import gguf

    quantised = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, "flux")
    for name, tensor in tensors.items():
        values = tensor.numpy()
        if tensor.ndim == 2 and tensor.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(values, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_q8(original, tmp_path) -> None:
    write_gguf(tmp_path / "fill.gguf", original, "Q8_0")
    loaded = weights(tmp_path / "fill.gguf")
    for name, tensor in original.items():
        if tensor.ndim == 1:
            assert torch.equal(loaded[name], tensor)
            continue
        # Q8_0: blocks of 32 values, an fp16 scale each.
        blocks = tensor.view(-1, 32)
        scale = blocks.abs().amax(1, keepdim=True) / 127
        expected = (blocks / scale).round() * scale.half().float()
        assert torch.allclose(loaded[name], expected.view(tensor.shape), atol=float(scale.max()) * 1.01), name
        assert (loaded[name] - tensor).norm() / tensor.norm() < 0.01


def k_blocks(count: int, five_bits: bool) -> np.ndarray:
    """Random well-formed Q4_K or Q5_K blocks."""
    random = np.random.default_rng(0)
    scales = random.uniform(0.001, 0.01, (count, 2)).astype(np.float16).view(np.uint8)
    rest = random.integers(0, 256, (count, 12 + (32 if five_bits else 0) + 128), dtype=np.uint8)
    return np.concatenate([scales, rest], axis=1)


def decode_k(block: np.ndarray, five_bits: bool) -> list[float]:
    """One block by ggml's definition: value = d * scale_j * q - dmin * min_j for each sub-block j of 32."""
    d, dmin = (float(x) for x in block[:4].view(np.float16))
    packed, values = block[4:16].astype(int), []
    high, low = (block[16:48], block[48:]) if five_bits else (None, block[16:])
    for j in range(8):
        if j < 4:
            scale, minimum = packed[j] & 63, packed[j + 4] & 63
        else:
            scale = (packed[j + 4] & 15) | ((packed[j - 4] >> 6) << 4)
            minimum = (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4)
        for i in range(32):
            q = (int(low[32 * (j // 2) + i]) >> (4 * (j % 2))) & 15
            if five_bits:
                q |= ((int(high[i]) >> j) & 1) << 4
            values.append(d * scale * q - dmin * minimum)
    return values


@pytest.mark.parametrize(("kind", "five_bits"), [("Q4_K", False), ("Q5_K", True)])
def test_gguf_k_quants(original, tmp_path, kind, five_bits) -> None:
    import gguf

    name = "single_blocks.0.linear1.weight"
    rows, width = original[name].shape
    blocks = k_blocks(rows * width // 256, five_bits)
    writer = gguf.GGUFWriter(tmp_path / "fill.gguf", "flux")
    for other, tensor in original.items():
        if other == name:
            data = blocks.reshape(rows, -1)
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
        else:
            writer.add_tensor(other, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loaded = weights(tmp_path / "fill.gguf")[name].view(-1, 256)
    for index in (0, 7, len(blocks) - 1):
        assert loaded[index].tolist() == pytest.approx(decode_k(blocks[index], five_bits), rel=1e-5, abs=1e-6)


def mixed_gguf(path, tensors: dict[str, torch.Tensor], small: str, flattened: str) -> None:
    """A file as Q5_K_S or Q4_K_M are mixed: quantised linears, vectors and small ones plain; one shape only noted."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(path, "flux")
    for number, (name, tensor) in enumerate(tensors.items()):
        values = tensor.numpy()
        if name == flattened:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", [int(side) for side in tensor.shape])
            values = values.reshape(-1, 32)
        if tensor.ndim == 1 or name.removeprefix(PREFIX).startswith(("img_in", "final_layer")):
            kind = [kinds.F32, kinds[small]][number % 2]
        else:
            kind = [kinds.Q8_0, kinds.Q5_0, kinds.Q4_1][number % 3]
        data = values.astype(np.float16) if kind == kinds.F16 else gguf.quants.quantize(values, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("small", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_gguf_mixes(original, tmp_path, small, prefix) -> None:
    flattened = f"{prefix}double_blocks.0.img_attn.proj.weight"
    mixed_gguf(tmp_path / "fill.gguf", {prefix + n: t for n, t in original.items()}, small, flattened)
    loaded = weights(tmp_path / "fill.gguf")
    assert loaded.keys() == original.keys()
    rounded = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[small]
    for name, tensor in original.items():
        assert loaded[name].shape == tensor.shape
        if tensor.ndim == 1 or name.startswith(("img_in", "final_layer")):
            assert torch.equal(loaded[name], tensor) or torch.equal(loaded[name], tensor.to(rounded).float()), name
        else:
            assert (loaded[name] - tensor).norm() / tensor.norm() < 0.1, name


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
@pytest.mark.parametrize("layerwise", [False, True])
def test_t5_as_gguf(files, folder, tmp_path, kind, layerwise) -> None:
    """Names as llama.cpp gives them, by its own table."""
    import gguf

    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, 2)
    kinds, truth = gguf.GGMLQuantizationType, {}
    writer = gguf.GGUFWriter(tmp_path / "t5.gguf", "t5encoder")
    for name, tensor in load_file(files / "t5xxl_fp16.safetensors").items():
        used = kinds[kind] if tensor.ndim == 2 and tensor.shape[1] % 32 == 0 else kinds.F32
        data = tensor.numpy().astype(np.float16) if used == kinds.F16 else gguf.quants.quantize(tensor.numpy(), used)
        truth[name] = torch.from_numpy(gguf.quants.dequantize(data, used).copy())
        if name != "encoder.embed_tokens.weight":
            writer.add_tensor(table.get_name(name, try_suffixes=(".weight",)), data, raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(truth, tmp_path / "truth.safetensors")
    found = [
        from_files(files, folder, t5xxl=tmp_path / file).load_text_encoders(layerwise=way).encode(["red"], T5_LENGTH)
        for file, way in (("t5.gguf", layerwise), ("truth.safetensors", False))
    ]
    assert torch.equal(*(encoded.embeddings.t5 for encoded in found))
