"""Our loader against diffusers' own, on files of FLUX.1 Fill's true width, which its converter insists on."""

import gc
import json
import shutil
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import save_file

from library.conditioning.item import Condition
from library.models.checkpoint_file import TransformerFile
from library.models.keymap import entries
from library.models.load import load_transformer
from library.models.shape import FluxShape, diffusers_config
from library.models.text import TextEmbeddings
from tests.models.test_gguf import write_gguf
from tools.verify import oracle

SHAPE = FluxShape(double_blocks=1, single_blocks=1)
CPU = torch.device("cpu")
SIDE = 64
pytestmark = pytest.mark.slow


def random_tensors(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Every tensor under its BFL name, so that activations keep their size: 0.5 billion values."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for entry in entries(SHAPE):
        values = torch.empty(entry.shape, dtype=dtype).normal_(generator=generator)
        if len(entry.shape) > 1:
            values *= entry.shape[1] ** -0.5
        found[entry.name] = 1 + 0.1 * values if entry.name.endswith("scale") else values
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A BFL single file, the configuration diffusers wants beside it, and the diffusers folder saved from it."""
    from diffusers import FluxTransformer2DModel

    folder = tmp_path_factory.mktemp("wide")
    save_file(random_tensors(), folder / "fill.safetensors")
    (folder / "config.json").write_text(json.dumps(diffusers_config(SHAPE)), encoding="utf-8")
    model = FluxTransformer2DModel.from_single_file(
        str(folder / "fill.safetensors"), config=str(folder), torch_dtype=torch.bfloat16
    )
    model.save_pretrained(folder / "transformer")
    del model
    gc.collect()
    yield folder
    shutil.rmtree(folder)


def inputs(dtype: torch.dtype) -> dict:
    """One prediction's inputs, drawn."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *size: torch.randn(size, generator=generator)
    latents, mask = draw(1, 16, SIDE // 8, SIDE // 8), (draw(1, 1, SIDE, SIDE) > 0).float()
    text = TextEmbeddings(draw(1, 8, SHAPE.text_width), draw(1, SHAPE.pooled_width))
    like = type("Like", (), {"device": CPU, "dtype": dtype, "shape": SHAPE})
    return oracle.inputs(like, draw(1, 16, SIDE // 8, SIDE // 8), text, Condition(latents, mask))


def ours(path, dtype: torch.dtype) -> torch.Tensor:
    return oracle.our_prediction(load_transformer(TransformerFile.open(path), dtype=dtype), inputs(dtype))


def theirs(load: Callable, dtype: torch.dtype) -> torch.Tensor:
    """What diffusers' model predicts; `load` makes it, so that nothing keeps it afterwards."""
    return oracle.their_prediction(load().eval(), CPU, inputs(dtype))


def own_single_file(place, dtype: torch.dtype):
    from diffusers import FluxTransformer2DModel

    path = str(place / "fill.safetensors")
    return FluxTransformer2DModel.from_single_file(path, config=str(place), torch_dtype=dtype)


def own_folder(place, dtype: torch.dtype):
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel.from_pretrained(place / "transformer", torch_dtype=dtype, local_files_only=True)


def test_a_single_file_and_its_diffusers_folder_are_what_diffusers_loads(place) -> None:
    dtype = torch.float32
    single, folder = ours(place / "fill.safetensors", dtype), ours(place / "transformer", dtype)
    assert torch.equal(single, folder)
    expected = theirs(lambda: own_single_file(place, dtype), dtype)
    assert oracle.relative_difference(single, expected) <= 1e-6
    assert torch.equal(theirs(lambda: own_folder(place, dtype), dtype), expected)


@pytest.mark.parametrize("name", ["fill.safetensors", "transformer"])
def test_the_oracle_within_little_memory_is_diffusers_own(place, name) -> None:
    dtype = torch.bfloat16
    file = TransformerFile.open(place / name)
    bounded = theirs(lambda: oracle.load(file, CPU, dtype)[0], dtype)
    own = own_folder if name == "transformer" else own_single_file
    assert torch.equal(bounded, theirs(lambda: own(place, dtype), dtype))
    difference = oracle.relative_difference(ours(place / name, dtype), bounded)
    assert 0 < difference <= oracle.tolerance(file, "bf16")


@pytest.mark.parametrize("kind", ["fp8", "gguf"])
def test_small_files_are_what_diffusers_reads(tmp_path, kind) -> None:
    path = tmp_path / ("fill.gguf" if kind == "gguf" else "fill.safetensors")
    if kind == "gguf":
        write_gguf(path, random_tensors(torch.float32), "Q8_0")
    else:
        save_file({name: value.to(torch.float8_e4m3fn) for name, value in random_tensors().items()}, path)
    file = TransformerFile.open(path)
    expected = theirs(lambda: oracle.load(file, CPU, torch.bfloat16)[0], torch.bfloat16)
    assert oracle.relative_difference(ours(path, torch.bfloat16), expected) <= oracle.tolerance(file, "bf16")
    path.unlink()
