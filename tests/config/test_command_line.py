"""The command line: every form a value can take, and what wins over what."""

import shlex
from pathlib import Path

import pytest

from library.config import load
from library.errors import ConfigError

BASE = ["--pretrained_model_name_or_path=owner/base"]


@pytest.fixture
def data(images: Path) -> list[str]:
    return [*BASE, "--image_dir", str(images), "--mode", "spatial"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], False),
        (["--gradient_checkpointing"], True),
        (["--gradient_checkpointing", "true"], True),
        (["--gradient_checkpointing=true"], True),
        (["--gradient_checkpointing", "True"], True),
        (["--gradient_checkpointing", "false"], False),
        (["--gradient_checkpointing=False"], False),
        (["--gradient-checkpointing"], True),
        (["--gradient_checkpointing="], False),
    ],
)
def test_booleans(words: list[str], expected: bool, data: list[str]) -> None:
    assert load([*data, *words], "train").memory.gradient_checkpointing is expected


def test_a_true_flag_in_the_file_can_be_turned_off(load_toml) -> None:
    text = "gradient_checkpointing = true\nuse_8bit_adam = true\n"
    assert load_toml(text).optimizer.optimizer_type == "AdamW8bit"
    run = load_toml(text, "--gradient_checkpointing", "false", "--use_8bit_adam", "false")
    assert not run.memory.gradient_checkpointing
    assert run.optimizer.optimizer_type == "AdamW"


@pytest.mark.parametrize(
    ("words", "table", "name", "value"),
    [
        (["--rank", "16"], "network", "network_dim", 16),
        (["--network-dim=16"], "network", "network_dim", 16),
        (["--learning_rate=1."], "optimizer", "learning_rate", 1.0),
        (["--learning_rate", "1"], "optimizer", "learning_rate", 1.0),
        (["--lr_warmup_steps", "100"], "optimizer", "lr_warmup_steps", 100),
        (["--lr_warmup_steps", "0.05"], "optimizer", "lr_warmup_steps", 0.05),
        (["--blocks_to_swap", "all"], "memory", "blocks_to_swap", "all"),
        (["--blocks_to_swap", "20"], "memory", "blocks_to_swap", 20),
        (["--mask_dilation", "-3"], "", "", None),
        (["--network_args", "algo=lokr", "factor=8"], "network", "network_args", ("algo=lokr", "factor=8")),
        (["--network_args=algo=lokr;factor=8"], "network", "network_args", ("algo=lokr", "factor=8")),
        (["--network_args", '["algo=lokr", "factor=8"]'], "network", "network_args", ("algo=lokr", "factor=8")),
        (["--lora_layers=attn.to_k,attn.to_q"], "network", "lora_layers", ("attn.to_k", "attn.to_q")),
        (["--report_to", "wandb", "tensorboard"], "logging", "report_to", ("wandb", "tensorboard")),
        (["--report_to=wandb,tensorboard"], "logging", "report_to", ("wandb", "tensorboard")),
        (["--report_to", ""], "logging", "report_to", ("tensorboard",)),
        (["--validation_prompt", "a, b; c, d"], "sampling", "validation_prompt", ("a, b", "c, d")),
        (["--guidance_scale_range", "1", "4"], "training", "guidance_scale_range", (1.0, 4.0)),
        (["--revision", ""], "model", "revision", None),
        (["--optimizer", "prodigy"], "optimizer", "optimizer_type", "Prodigy"),
        (["--masked_loss"], "", "", None),
    ],
)  # fmt: skip
def test_values(words: list[str], table: str, name: str, value: object, data: list[str]) -> None:
    if table:
        assert getattr(getattr(load([*data, *words], "train"), table), name) == value
    elif words == ["--masked_loss"]:
        with pytest.raises(ConfigError, match="--masked_loss: needs a value"):
            load([*data, *words], "train")
    else:
        assert load([*data, *words], "train").datasets[0].subsets[0].mask_dilation == -3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--rnak 4", "--rnak: there is no key rnak. Did you mean rank?"),
        ("--rank", "--rank: needs a value."),
        ("--rank four", '--rank: rank = "four": needs a whole number, at least 1.'),
        ("--rank 4 --network_dim 8", "--network_dim: network_dim says the same as rank (--rank). Keep one of them."),
        ("--rank 4 --rank 8", "--rank: rank says the same as rank (--rank). Keep one of them."),
        ("--dry_run maybe", '--dry_run: dry_run = "maybe": needs true or false.'),
        ("--instance_prompt a red ball", "red: this belongs to no option."),
        ("run.toml", "run.toml: a configuration is given as --config_file run.toml"),
        ("-r 4", "-r: this belongs to no option."),
        ("--xformers", "--xformers: xformers is no key of InFlux: use attention_backend."),
        ("--learning_rate nan", "--learning_rate: learning_rate = nan: needs a number, at least 0."),
        ("--resolution 512 --size 768", "--size: size = [768] and resolution = 512 (--resolution) say one thing"),
        ("--use_8bit_adam --optimizer prodigy", "but optimizer = \"prodigy\" (--optimizer). Keep one of them."),
        ("--checkpointing_steps 0", "checkpointing_steps = 0: needs a whole number, at least 1."),
    ],
)  # fmt: skip
def test_mistakes(words: str, message: str, data: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load([*data, *shlex.split(words)], "train")
    assert message in str(caught.value)


def test_all_mistakes_are_told_at_once(data: list[str]) -> None:
    words = "stray --rnak 4 --lerning_rate 1 --rank zero --mixed_precision fp8 --optimizer Adamm --output_name a/b"
    with pytest.raises(ConfigError) as caught:
        load([*data, *words.split()], "train")
    text = str(caught.value)
    assert text.startswith("7 things")
    for part in ("--rnak", "--lerning_rate", "stray", "--rank", "--mixed_precision", "--optimizer", "--output_name"):
        assert f"\n- {part}: " in text


def test_the_command_line_wins_over_the_file_and_the_file_over_the_default(load_toml) -> None:
    run = load_toml("[network]\nrank = 8\nnetwork_alpha = 4\n", "--network_dim", "16")
    assert (run.network.network_dim, run.network.network_alpha, run.network.network_layout) == (16, 4.0, "fused")
    assert run.origins["network_dim"] == "--network_dim"
    assert run.origins["network_alpha"].endswith("run.toml:3")
    assert "network_layout" not in run.origins


@pytest.mark.parametrize(
    ("text", "words", "kept"),
    [
        ("guidance_scale = 2.0", ["--guidance_scale_range", "1", "4"], ("training", "guidance_scale", 3.5)),
        ("guidance_scale_range = [1, 4]", ["--guidance_scale", "2"], ("training", "guidance_scale_range", None)),
        ("prompt_dir = 'images'", ["--prompt", "red"], ("inference", "prompt_dir", None)),
        ("prompt = 'red'", ["--prompt_dir", "x"], ("inference", "prompt", ())),
    ],
)
def test_the_command_line_drops_the_other_way_of_saying_it(
    text: str, words: list[str], kept: tuple[str, str, object], load_toml
) -> None:
    table, name, value = kept
    assert getattr(getattr(load_toml(text, *words), table), name) == value


def test_an_empty_string_on_the_command_line_unsets_what_the_file_says(load_toml) -> None:
    text = 'validation_prompt = "a"\nmax_train_steps = 5\n'
    run = load_toml(text, "--validation_prompt=", "--max_train_steps", "")
    assert run.sampling.validation_prompt == ()
    assert run.training.max_train_steps is None


def test_keys_of_another_command_are_accepted(data: list[str], images: Path) -> None:
    assert load([*data, "--cache_workers", "2", "--prompt", "x"], "train").cache.cache_workers == 2
    run = load([*data, "--image", str(images), "--learning_rate", "1e-3"], "infer")
    assert run.optimizer.learning_rate == 1e-3


def test_mode_on_the_command_line_of_inference_is_the_mode_of_inference(images: Path) -> None:
    run = load([*BASE, "--image", str(images), "--mode", "edit", "--edit_mask_value", "0"], "infer")
    assert (run.inference.inference_mode, run.inference.inference_mask_value) == ("edit", 0.0)
    assert run.datasets == ()


def test_mode_in_a_file_stays_the_mode_of_the_data(load_toml, images: Path) -> None:
    text = f'mode = "spatial"\nimage_dir = "{images}"\n[inference]\nmode = "mask"\nimage = "{images}"\n'
    run = load_toml(text, command="infer")
    assert run.datasets[0].subsets[0].mode == "spatial"
    assert run.inference.inference_mode == "mask"


@pytest.mark.parametrize(
    "words", [["--status", "--preview", "x.html"], ["--verify", "--force"], ["--lint", "--gc"], ["--dry_run", "--lint"]]
)
def test_two_calls_at_once_are_refused(words: list[str], data: list[str]) -> None:
    with pytest.raises(ConfigError, match="are different calls: run one, then the other"):
        load([*data, *words], "cache")


@pytest.mark.parametrize("words", [["--status", "--verify"], ["--dry_run", "--force"], ["--preview", "x.html"]])
def test_actions_that_go_together_are_not(words: list[str], data: list[str]) -> None:
    assert load([*data, *words], "cache").command


def test_the_words_that_caching_has_to_be_given_too(data: list[str], tmp_path: Path) -> None:
    """Each as it was written; no action of this call, nothing that caching does not read, no secret."""
    heard = ["--resolution=96", "--validation_prompt", "make it red", "--center_crop", "false"]
    unheard = ["--learning_rate", "1", "--dry_run", "--hub_token", "hf_secret"]
    run = load([*data, *heard, *unheard], "train")
    plain = [*BASE[0].split("="), *data[1:], "--resolution", "96", *heard[1:]]
    assert list(run.to_cache) == plain
    again = load(run.to_cache, "cache")
    assert again.datasets == run.datasets and again.datasets[0].resolution == 96
    assert again.sampling == run.sampling
