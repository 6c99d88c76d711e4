"""InFluxEdit's two documented commands, word for word but for the script's name, paths, sizes and step counts.

The cache is made with the same words, because the trainer never encodes anything.
"""

import json
import shlex
from pathlib import Path

import pytest

from library.tensorfile import read_header
from tests.end_to_end.scripts import run_script, succeeded

SPATIAL = """
  --pretrained_model_name_or_path=nano  \\
  --instance_data_dir=data/fill_circles/train_combined \\
  --use_split_mask \\
  --rank=16 \\
  --output_dir=output/seed_spatial \\
  --caption_data_dir=data/fill_circles/prompts_combined \\
  --resolution=48,64 \\
  --train_batch_size=1 \\
  --guidance_scale=1 \\
  --gradient_accumulation_steps=4 \\
  --optimizer="prodigy" \\
  --learning_rate=1. \\
  --report_to="tensorboard" \\
  --lr_scheduler="constant" \\
  --lr_warmup_steps=0 \\
  --checkpointing_steps=2 \\
  --max_train_steps=4 \\
  --validation_prompt="validation prompt" \\
  --validation_image="" \\
  --validation_steps=2 \\
  --validation_width=128 \\
  --validation_height=64 \\
  --num_validation_images=1 \\
  --mixed_precision="bf16" \\
  --gradient_checkpointing
"""

EDIT = """
  --pretrained_model_name_or_path=nano  \\
  --instance_data_dir=data/fill_circles/train_A \\
  --target_data_dir=data/fill_circles/train_B \\
  --caption_data_dir=data/fill_circles/prompts \\
  --mode="edit" \\
  --rank=64 \\
  --output_dir=output/seed_edit \\
  --resolution=48,64,80 \\
  --train_batch_size=2 \\
  --guidance_scale=1 \\
  --gradient_accumulation_steps=2 \\
  --optimizer="prodigy" \\
  --learning_rate=1. \\
  --report_to="tensorboard" \\
  --lr_scheduler="constant" \\
  --lr_warmup_steps=0 \\
  --checkpointing_steps=2 \\
  --max_train_steps=4 \\
  --validation_prompt="validation prompt" \\
  --validation_image="" \\
  --validation_steps=2 \\
  --validation_width=64 \\
  --validation_height=64 \\
  --num_validation_images=1 \\
  --mixed_precision="bf16" \\
  --gradient_checkpointing
"""
# --report_to="wandb" is the one further word that differs: wandb needs an account and is not installed here.


@pytest.mark.parametrize("command, mode, rank", [(SPATIAL, "spatial", 16), (EDIT, "edit", 64)], ids=["spatial", "edit"])
def test_the_documented_command_trains(command: str, mode: str, rank: int, project: Path) -> None:
    words = shlex.split(command.replace("\\\n", " "))
    succeeded(run_script("influx_cache.py", *words, folder=project))
    done = succeeded(run_script("influx_train.py", *words, folder=project))
    output = project / "output" / f"seed_{mode}"
    metadata = read_header(output / "last.safetensors").metadata
    assert json.loads(metadata["influx_modes"]) == [mode]
    assert metadata["ss_network_dim"] == str(rank)
    assert metadata["influx_train_guidance"] == "1.0"
    assert "4/4" in done.said
    states = [path.name for path in output.iterdir() if path.is_dir() and "state" in path.name]
    assert any("00000002" in name for name in states), "checkpointing_steps saves states"
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [entry["step"] for entry in steps if "loss" in entry] == [1, 2, 3, 4]
    previews = sorted(path.name for path in (output / "sample").glob("*_0000*.png"))
    assert previews == ["last_00_00000002.png", "last_00_00000004.png"], "validation_steps makes pictures"
