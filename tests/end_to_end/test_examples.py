"""Every example configuration is run: cache, train, infer, with fewer steps and nothing else changed."""

import json
from pathlib import Path

import pytest
from PIL import Image

from library.tensorfile import read_header
from tests.end_to_end.scripts import ROOT, run_script, succeeded

NANO = sorted(path.name for path in (ROOT / "config_examples").glob("*.toml") if "../nano" in path.read_text("utf-8"))
SHORT = ["--max_train_steps", 2, "--train_batch_size", 4]
NO_WARM_UP = ["--lr_warmup_steps", 0]


def example(name: str) -> str:
    """The text of a shipped configuration."""
    return (ROOT / "config_examples" / name).read_text("utf-8")


@pytest.mark.parametrize("name", NANO)
def test_an_example_runs(name: str, project: Path) -> None:
    config = ["--config_file", f"config_examples/{name}"]
    succeeded(run_script("influx_cache.py", *config, folder=project))
    again = succeeded(run_script("influx_cache.py", *config, folder=project))
    assert "everything is cached" in again.said, "the second run encodes nothing"

    warm_up = NO_WARM_UP if "lr_warmup_steps" in example(name) else []
    succeeded(run_script("influx_train.py", *config, *SHORT, *warm_up, folder=project))
    output = Path(project / "output" / Path(name).stem)
    (network,) = [path for path in output.glob("*.safetensors") if not path.stem.endswith("_diffusers")]
    header = read_header(network)
    assert header.tensors and header.metadata["influx_modes"]
    assert header.metadata["influx_resolution"] == "64x64", "of one picture, in spatial mode too"
    assert (output / "config.resolved.toml").exists() and (output / "metrics.jsonl").exists()

    succeeded(run_script("influx_infer.py", *config, "--sample_steps", 2, folder=project))
    edited = sorted((output / "edited").glob("*.png"))
    assert [path.name for path in edited] == [f"{number:05d}.png" for number in range(4)]
    with Image.open(edited[0]) as image:
        assert image.size == (64, 64)
        said = json.loads(image.info["influx"])
    assert said["mode"] in json.loads(header.metadata["influx_modes"])
    assert said["size"] == "64x64", "pictures are edited at the size they were trained at"
    assert said["steps"] == 2 and said[f"network {network.name}"] == 1


def test_the_network_with_x_embedder_has_its_second_file_and_previews(project: Path) -> None:
    """What nano_x_embedder.toml adds to the quickstart; it runs after its own example in the same project."""
    output = project / "output" / "nano_x_embedder"
    if not output.exists():
        test_an_example_runs("nano_x_embedder.toml", project)
    assert (output / "x_embedder_diffusers.safetensors").exists()
    assert any("img_in" in tensor for tensor in read_header(output / "x_embedder.safetensors").tensors)
    pictures = sorted(path.name for path in (output / "sample").glob("*.png"))
    assert pictures == sorted(f"x_embedder_0{number}_{kind}.png" for number in range(3)
                              for kind in ("source", "00000000", "00000002"))  # fmt: skip
    assert (output / "previews.png").exists()


FLUX = sorted(path.name for path in (ROOT / "config_examples").glob("*.toml") if path.name not in NANO)


@pytest.mark.slow
@pytest.mark.parametrize("name", FLUX)
def test_an_example_for_flux_runs_on_the_nano_base(name: str, project: Path) -> None:
    """The same files with base, data and size replaced: every other key of theirs acts as it is."""
    data = project / "data" / "fill_circles"
    config = ["--config_file", f"config_examples/{name}", "--pretrained_model_name_or_path", "nano"]
    config += ["--image_dir", data / "train_A", "--target_dir", data / "train_B", "--caption_dir", data / "prompts"]
    config += ["--resolution", 64, "--t5xxl_max_token_length", 16]
    succeeded(run_script("influx_cache.py", *config, folder=project))
    short = ["--max_train_steps", 2, *(NO_WARM_UP if "lr_warmup_steps" in example(name) else [])]
    succeeded(run_script("influx_train.py", *config, *short, folder=project))
    image = ["--image", data / "test_A" / "00000.png", "--prompt", "red circle with blue background"]
    succeeded(run_script("influx_infer.py", *config, *image, "--sample_steps", 2, folder=project))
    assert (project / "output" / Path(name).stem / "edited" / "00000.png").exists()
