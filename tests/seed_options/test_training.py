"""Options that change what is trained: the same command line with two values gives two different networks."""

from pathlib import Path

import pytest

from tests.seed_options.bench import Bench

NETWORKS: dict[str, tuple[str, str, str]] = {
    # option: (one value, another, what both need to act)
    "rank": ("--rank=2", "--rank=3", ""),
    "seed": ("--seed=1", "--seed=2", ""),
    "instance_data_dir": ("--instance_data_dir={source}", "--instance_data_dir={source_b}", ""),
    "target_data_dir": ("--target_data_dir={target}", "--target_data_dir={target_b}", ""),
    "caption_data_dir": ("--caption_data_dir={captions}", "--caption_data_dir={captions_b}", ""),
    "instance_prompt": ("--instance_prompt=red", "--instance_prompt=blue", "--no:caption_data_dir"),
    "mask_data_dir": ("--mask_data_dir={masks}", "--mask_data_dir={masks_b}", "--mode=mask --no:target_data_dir"),
    "mode": ("--mode=edit", "--mode=mask", "--mask_data_dir={masks}"),
    "use_split_mask": ("--use_split_mask", "--use_split_mask=false --mask_data_dir={masks}",
                       "--mode=mask --no:target_data_dir"),
    "mask_only_right": ("--mask_only_right", "--mask_only_right=false", "--use_split_mask --no:mode "
                        "--instance_data_dir={joined} --no:target_data_dir --seed=5"),
    "resolution": ("--resolution=64", "--resolution=64,96", "--max_train_steps=4"),
    "size": ("--size=64", "--size=96", ""),
    "center_crop": ("--center_crop", "--center_crop=false", "--enable_bucket=false"),
    "random_flip": ("--random_flip", "--random_flip=false", "--max_train_steps=3"),
    "max_sequence_length": ("--max_sequence_length=8", "--max_sequence_length=16", ""),
    "train_batch_size": ("--train_batch_size=1", "--train_batch_size=2", ""),
    "gradient_accumulation_steps": ("--gradient_accumulation_steps=1", "--gradient_accumulation_steps=2", ""),
    "learning_rate": ("--learning_rate=1e-3", "--learning_rate=1e-2", ""),
    "guidance_scale": ("--guidance_scale=1", "--guidance_scale=30", ""),
    "scale_lr": ("--scale_lr", "--scale_lr=false", "--gradient_accumulation_steps=2"),
    "lr_scheduler": ("--lr_scheduler=constant", "--lr_scheduler=cosine", "--lr_warmup_steps=0"),
    "lr_warmup_steps": ("--lr_warmup_steps=0", "--lr_warmup_steps=2", "--lr_scheduler=constant_with_warmup"),
    "lr_num_cycles": ("--lr_num_cycles=1", "--lr_num_cycles=2", "--lr_scheduler=cosine_with_restarts "
                      "--lr_warmup_steps=0 --max_train_steps=4"),
    "lr_power": ("--lr_power=1.0", "--lr_power=3.0", "--lr_scheduler=polynomial --lr_warmup_steps=0"),
    "weighting_scheme": ("--weighting_scheme=none", "--weighting_scheme=sigma_sqrt", ""),
    "logit_mean": ("--logit_mean=0", "--logit_mean=1", "--weighting_scheme=logit_normal"),
    "logit_std": ("--logit_std=1", "--logit_std=2", "--weighting_scheme=logit_normal"),
    "mode_scale": ("--mode_scale=1.29", "--mode_scale=0.5", "--weighting_scheme=mode"),
    "optimizer": ("--optimizer=AdamW", "--optimizer=prodigy", ""),
    "use_8bit_adam": ("--use_8bit_adam", "--use_8bit_adam=false", "--rank=64"),
    "adam_beta1": ("--adam_beta1=0.9", "--adam_beta1=0.5", ""),
    "adam_beta2": ("--adam_beta2=0.999", "--adam_beta2=0.5", ""),
    "adam_epsilon": ("--adam_epsilon=1e-8", "--adam_epsilon=1e-2", ""),
    "adam_weight_decay": ("--adam_weight_decay=0", "--adam_weight_decay=10", "--learning_rate=1e-2"),
    "prodigy_beta3": ("--prodigy_beta3=0.9", "--prodigy_beta3=0.1", "--optimizer=prodigy --learning_rate=1 "
                      "--max_train_steps=12"),
    "prodigy_decouple": ("--prodigy_decouple=True", "--prodigy_decouple=False", "--optimizer=prodigy "
                         "--learning_rate=1 --adam_weight_decay=10"),
    "prodigy_use_bias_correction": ("--prodigy_use_bias_correction=True", "--prodigy_use_bias_correction=False",
                                    "--optimizer=prodigy --learning_rate=1"),
    "prodigy_safeguard_warmup": ("--prodigy_safeguard_warmup=True", "--prodigy_safeguard_warmup=False",
                                 "--optimizer=prodigy --learning_rate=1 --max_train_steps=12 "
                                 "--lr_scheduler=constant_with_warmup --lr_warmup_steps=6"),
    "max_grad_norm": ("--max_grad_norm=1e-3", "--max_grad_norm=0", "--adam_epsilon=1e-2"),
    "mixed_precision": ("--mixed_precision=no", "--mixed_precision=bf16", "--save_precision=fp32"),
    "lora_layers": ("--lora_layers=attn.to_k,attn.to_q", "--lora_layers=attn.to_v", ""),
    "text_encoder_lr": ("--text_encoder_lr=1e-3", "--text_encoder_lr=1e-2", "--train_text_encoder"),
    "adam_weight_decay_text_encoder": ("--adam_weight_decay_text_encoder=0", "--adam_weight_decay_text_encoder=10",
                                       "--train_text_encoder --text_encoder_lr=1e-2"),
    "prior_loss_weight": ("--prior_loss_weight=1", "--prior_loss_weight=0.1", "--with_prior_preservation "
                          "--class_data_dir={class} --class_prompt=circle --num_class_images=5"),
    "with_prior_preservation": ("--with_prior_preservation", "--with_prior_preservation=false",
                                "--class_data_dir={class} --class_prompt=circle --num_class_images=5"),
    "class_data_dir": ("--class_data_dir={class}", "--class_data_dir={source_b}", "--with_prior_preservation "
                       "--class_prompt=circle --num_class_images=5"),
    "class_prompt": ("--class_prompt=circle", "--class_prompt=square", "--with_prior_preservation "
                     "--class_data_dir={class} --num_class_images=5 --max_train_steps=4"),
}  # fmt: skip


@pytest.mark.parametrize("option", NETWORKS)
def test_two_values_train_two_networks(option: str, bench: Bench, tmp_path: Path) -> None:
    one, other, common = NETWORKS[option]
    first = bench.run(tmp_path / "one", one, common)
    second = bench.run(tmp_path / "other", other, common)
    assert (first.trained, second.trained) == (0, 0)
    assert first.network != second.network


def test_one_value_twice_trains_one_network(bench: Bench, tmp_path: Path) -> None:
    """Without this the difference above would prove nothing."""
    common = "--random_flip --weighting_scheme=logit_normal --resolution=64,96"
    outcomes = [bench.run(tmp_path / name, "--max_train_steps=4", common) for name in "ab"]
    assert outcomes[0].network == outcomes[1].network
