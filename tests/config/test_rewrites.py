"""The seed's and kohya's other ways of saying things, and warnings for keys that cannot act."""

import shlex
from pathlib import Path

import pytest

from library.config import catalogue, load
from library.config.rewrites import REWRITES
from library.config.seed_options import SEED_OPTIONS
from library.errors import ConfigError

EXAMPLE_1 = r"""
  --pretrained_model_name_or_path=$MODEL_NAME  \
  --instance_data_dir=$INSTANCE_DIR \
  --use_split_mask \
  --rank=16 \
  --output_dir=$OUTPUT_DIR \
  --caption_data_dir=$PROMPT_DIR \
  --resolution=704,1024 \
  --train_batch_size=1 \
  --guidance_scale=1 \
  --gradient_accumulation_steps=4 \
  --optimizer="prodigy" \
  --learning_rate=1. \
  --report_to="wandb" \
  --lr_scheduler="constant" \
  --lr_warmup_steps=0 \
  --checkpointing_steps=100 \
  --max_train_steps=100000 \
  --validation_prompt="validation prompt" \
  --validation_image="" \
  --validation_steps=50 \
  --validation_width=1024 \
  --validation_height=512 \
  --num_validation_images=1 \
  --mixed_precision="bf16" \
  --gradient_checkpointing
"""

EXAMPLE_2 = r"""
  --pretrained_model_name_or_path=$MODEL_NAME  \
  --instance_data_dir=$INSTANCE_DIR \
  --target_data_dir=$TARGET_DIR \
  --caption_data_dir=$PROMPT_DIR \
  --mode="edit" \
  --rank=64 \
  --output_dir=$OUTPUT_DIR \
  --resolution=1024,1536,2048 \
  --train_batch_size=2 \
  --guidance_scale=1 \
  --gradient_accumulation_steps=2 \
  --optimizer="prodigy" \
  --learning_rate=1. \
  --report_to="wandb" \
  --lr_scheduler="constant" \
  --lr_warmup_steps=0 \
  --checkpointing_steps=100 \
  --max_train_steps=100000 \
  --validation_prompt="validation prompt" \
  --validation_image="" \
  --validation_steps=100 \
  --validation_width=1024 \
  --validation_height=1024 \
  --num_validation_images=1 \
  --mixed_precision="bf16" \
  --gradient_checkpointing
"""


def example(text: str, folder: Path) -> list[str]:
    """The words a shell would hand over, with the variables set to folders that exist."""
    for name in ("INSTANCE_DIR", "TARGET_DIR", "PROMPT_DIR"):
        (folder / name).mkdir(exist_ok=True)
        text = text.replace(f"${name}", str(folder / name))
    text = text.replace("$MODEL_NAME", "black-forest-labs/FLUX.1-Fill-dev").replace("$OUTPUT_DIR", str(folder / "out"))
    return shlex.split(text.replace("\\\n", " "))


@pytest.mark.parametrize("command", ["cache", "train"])
def test_the_first_example_command_reads_word_for_word(command: str, tmp_path: Path) -> None:
    run = load(example(EXAMPLE_1, tmp_path), command)
    (dataset,), (subset,) = run.datasets, run.datasets[0].subsets
    assert (subset.mode, subset.mask_only_right, subset.target_dir) == ("spatial", False, None)
    assert (dataset.sizes, dataset.train_batch_size) == ((704, 1024), 1)
    assert (subset.image_dir, subset.caption_dir) == (tmp_path / "INSTANCE_DIR", tmp_path / "PROMPT_DIR")
    assert (run.network.network_dim, run.network.network_alpha) == (16, None)
    assert (run.optimizer.optimizer_type, run.optimizer.learning_rate) == ("Prodigy", 1.0)
    assert (run.optimizer.lr_scheduler, run.optimizer.lr_warmup_steps) == ("constant", 0)
    assert (run.saving.save_every_n_steps, run.saving.save_state) == (100, True)
    assert (run.training.max_train_steps, run.training.guidance_scale) == (100000, 1.0)
    assert (run.sampling.validation_prompt, run.sampling.validation_image) == (("validation prompt",), ())
    assert (run.sampling.sample_every_n_steps, run.sampling.validation_height) == (50, 512)
    assert (run.training.mixed_precision, run.memory.gradient_checkpointing) == ("bf16", True)
    assert run.logging.report_to == ("wandb",)
    assert run.warnings == ()


@pytest.mark.parametrize("command", ["cache", "train"])
def test_the_second_example_command_reads_word_for_word(command: str, tmp_path: Path) -> None:
    run = load(example(EXAMPLE_2, tmp_path), command)
    (dataset,), (subset,) = run.datasets, run.datasets[0].subsets
    assert (subset.mode, subset.target_dir, subset.edit_mask_value) == ("edit", tmp_path / "TARGET_DIR", 1.0)
    assert dataset.sizes == (1024, 1536, 2048)
    assert run.warnings == ()


@pytest.mark.parametrize(
    ("text", "table", "expected"),
    [
        ("checkpointing_steps = 7", "saving", {"save_every_n_steps": 7, "save_state": True}),
        ("use_8bit_adam = true", "optimizer", {"optimizer_type": "AdamW8bit"}),
        ("use_8bit_adam = false", "optimizer", {"optimizer_type": "AdamW"}),
        ("use_8bit_adam = true\noptimizer = 'AdamW'", "optimizer", {"optimizer_type": "AdamW8bit"}),
        ("fp8_base = true", "memory", {"base_precision": "fp8"}),
        ("fp8_base = true\nfp8_base_unet = true", "memory", {"base_precision": "fp8"}),
        ("masked_loss = true", "training", {"masked_loss": "mask"}),
        ("masked_loss = false", "training", {"masked_loss": "none"}),
        ("weighting_scheme = 'uniform'", "training", {"weighting_scheme": "none"}),
        ("optimizer_type = 'adamw8bit'", "optimizer", {"optimizer_type": "AdamW8bit"}),
        ("optimizer_type = 'torch.optim.NAdam'", "optimizer", {"optimizer_type": "torch.optim.NAdam"}),
        ("max_sequence_length = 256", "cache", {"t5xxl_max_token_length": 256}),
        ("train_embedder = true", "network", {"train_x_embedder": True}),
    ],
)
def test_other_ways_of_saying_it(text: str, table: str, expected: dict[str, object], load_toml) -> None:
    found = getattr(load_toml(text), table)
    assert {name: getattr(found, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("center_crop = true", {"random_crop": False}),
        ("center_crop = false", {"random_crop": True}),
        ("random_flip = true", {"flip_aug": True}),
        ("use_split_mask = true", {"mode": "spatial"}),
        ("use_split_mask = true\nmode = 'mask'", {"mode": "spatial"}),
        ("mode = 'fill'\ngenerate_mask = 'box,brush'", {"mode": "mask", "generate_mask": ("box", "brush")}),
        ("mode = 'spatial'\nmask_only_right = true", {"mask_only_right": True}),
    ],
)
def test_other_ways_of_saying_it_for_a_subset(text: str, expected: dict[str, object], load_toml) -> None:
    subset = load_toml(text).datasets[0].subsets[0]
    assert {name: getattr(subset, name) for name in expected} == expected


def test_the_command_line_decides_between_two_ways(load_toml) -> None:
    assert load_toml("save_every_n_steps = 5\n", "--checkpointing_steps", "9").saving.save_every_n_steps == 9
    assert load_toml("checkpointing_steps = 5\n", "--save_every_n_steps", "9").saving.save_every_n_steps == 9
    assert load_toml("use_8bit_adam = true\n", "--optimizer", "Prodigy").optimizer.optimizer_type == "Prodigy"
    assert load_toml("resolution = 512\n", "--resolution", "256,384").datasets[0].sizes == (256, 384)
    assert load_toml("resolutions = [256, 384]\n", "--resolution", "512").datasets[0].sizes == (512,)
    with pytest.raises(ConfigError, match='means optimizer_type = "AdamW8bit", but optimizer = "Prodigy"'):
        load_toml("optimizer = 'Prodigy'\n", "--use_8bit_adam")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("logit_mean = 1.0", "weighting_scheme = logit_normal"),
        ("mode_scale = 2.0", "weighting_scheme = mode"),
        ("huber_c = 0.2", "loss_type = huber or smooth_l1"),
        ("ema_decay = 0.9", "use_ema"),
        ("prodigy_decouple = false", "optimizer_type = Prodigy"),
        ("optimizer = 'Lion'\nadam_beta1 = 0.8", "optimizer_type = AdamW"),
        ("x_embedder_lr = 1e-5", "train_x_embedder"),
        ("text_encoder_lr = 1e-5", "train_text_encoder"),
        ("lr_num_cycles = 2", "lr_scheduler = cosine_with_restarts"),
        ("lr_warmup_steps = 50", "constant has no warm-up"),
        ("mask_only_right = true\nmode = 'mask'\nalpha_mask = true", "mode = spatial"),
        ("edit_mask_value = 0.0", "mode = edit"),
        ("keep_tokens = 2", "shuffle_caption"),
        ("shuffle_caption = true", "Set caption_variants"),
        ("center_crop = false", "Set crop_variants"),
        ("caption_column = 'x'", "dataset_name or metadata_file"),
        ("validation_width = 512", "validation_prompt"),
        ("sample_at_first = true", "sample_prompts or validation_prompt"),
        ("hub_model_id = 'a/b'", "push_to_hub"),
        ("swap_ring_size = 3", "blocks_to_swap or vram_budget_gb"),
        ("lr_scheduler_min_lr_ratio = 0.1", "lr_scheduler = cosine_with_min_lr"),
        ("max_train_steps = 5\nnum_train_epochs = 3", "max_train_steps is set, and wins"),
        ("lora_layers = ['attn.to_q']\nnetwork_targets = 'attn'", "lora_layers names the modules"),
        ("mixed_precision = 'fp16'", "black images"),
    ],
)
def test_a_key_that_cannot_act_is_warned_about(text: str, named: str, load_toml) -> None:
    warnings = load_toml(text).warnings
    assert len(warnings) == 1 and named in warnings[0] and "run.toml:" in warnings[0], warnings


@pytest.mark.parametrize(
    "text",
    [
        "logit_mean = 0.0",
        "weighting_scheme = 'logit_normal'\nlogit_mean = 1.0",
        "optimizer = 'prodigy'\nprodigy_decouple = false\nadam_beta1 = 0.8",
        "use_ema = true\nema_decay = 0.9",
        "validation_prompt = 'x'\nvalidation_width = 512\nsample_at_first = true",
        "blocks_to_swap = 'all'\nswap_ring_size = 3",
        "lr_warmup_steps = 0",
    ],
)
def test_a_key_that_acts_or_says_the_default_is_not(text: str, load_toml) -> None:
    assert load_toml(text).warnings == ()


def test_a_warning_is_for_the_command_that_reads_the_key(load_toml) -> None:
    assert load_toml("logit_mean = 1.0\n", command="cache").warnings == ()


def test_there_are_87_options_and_each_has_a_home() -> None:
    assert len(SEED_OPTIONS) == 87
    for option in SEED_OPTIONS:
        assert option in REWRITES or catalogue.aliases().get(option, option) in catalogue.declared(), option


@pytest.mark.parametrize(
    "text",
    [
        "save_best = true", "early_stop_patience = 2", "validation_generate = 1", "validate_every_n_steps = 5",
        "validate_every_n_epochs = 2", "max_validation_steps = 3", "validation_timesteps = [0.5]",
    ],
)  # fmt: skip
def test_validation_without_held_out_items_is_said_to_do_nothing(text: str, load_toml) -> None:
    named = text.partition(" ")[0]
    (warning,) = load_toml(text).warnings
    assert warning.startswith(f"run.toml:1: {named} does nothing here") or f"run.toml:1: {named}" in warning
    assert "validation_split" in warning
    assert load_toml(f"{text}\nvalidation_split = 0.1\n").warnings == ()
    assert load_toml(text, command="cache").warnings == ()


@pytest.mark.parametrize(
    ("idle", "acting"),
    [
        ("checkpoints_total_limit = 3\nsave_state = false", "checkpoints_total_limit = 3"),
        ("save_last_n_steps_state = 3\nsave_state = false", "save_last_n_steps_state = 3"),
        ("save_last_n_epochs_state = 3\nsave_state = false", "save_last_n_epochs_state = 3"),
        ("sample_every_n_steps = 9", 'sample_every_n_steps = 9\nvalidation_prompt = "x"'),
        ("sample_every_n_steps = 9", "sample_every_n_steps = 9\nsample_items = 1"),
        ("sample_at_end = false", 'sample_at_end = false\nvalidation_prompt = "x"'),
        ('log_tracker_name = "p"', 'log_tracker_name = "p"\nreport_to = ["tensorboard", "wandb"]'),
        ('wandb_run_name = "r"', 'wandb_run_name = "r"\nreport_to = "trackio"'),
        ('log_prefix = "r"\nreport_to = "none"', 'log_prefix = "r"'),
        ('best_metric = "loss_changed"', 'best_metric = "loss_changed"\nsave_best = true\nvalidation_split = 0.1'),
    ],
)
def test_what_needs_something_else_is_said_to_do_nothing_without_it(idle: str, acting: str, load_toml) -> None:
    (warning,) = load_toml(idle).warnings
    assert warning.startswith("run.toml:1: ") or "run.toml:1: " in warning
    assert "does nothing here: it acts only with" in warning
    assert load_toml(acting).warnings == ()


@pytest.mark.parametrize("value", ["[0.0]", "[0.5, 2]", "[0, 2, -1]", "[-0.1]"])
def test_points_outside_the_flow_are_refused(value: str, load_toml) -> None:
    with pytest.raises(ConfigError, match=r"run.toml:1: validation_timesteps.*above 0 and at most 1"):
        load_toml(f"validation_timesteps = {value}\nvalidation_split = 0.1\n")
    assert load_toml("validation_timesteps = [0.1, 1]\nvalidation_split = 0.1\n").warnings == ()
