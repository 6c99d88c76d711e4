"""The resolved configuration: loads again to the same run, tells origins, and keeps secrets and folders to itself."""

import tomllib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from library.config import (
    Run,
    catalogue,
    changed,
    differences,
    identity,
    identity_hash,
    load,
    metadata_toml,
    resolved_toml,
)
from library.config.catalogue import Declared
from library.config.resolved import literal
from library.config.values import choices, element, is_pair, options
from library.errors import ConfigError

TOKEN = "hf_abcdefghijklmnop"


def again(run: Run, folder: Path) -> Run:
    path = folder / "resolved.toml"
    path.write_text(resolved_toml(run), encoding="utf-8")
    return load(["--config_file", str(path)], run.name)


def tables(run: Run) -> dict[str, object]:
    left_out = ("origins", "warnings", "command", "to_cache")
    return {name: getattr(run, name) for name in type(run).model_fields if name not in left_out}


def test_a_resolved_file_loads_to_the_same_run(load_toml, tmp_path: Path) -> None:
    text = (
        'resolution = "512,768"\nuse_8bit_adam = true\nnetwork_args = ["rank_dropout=0.1"]\nlearning_rate = 1e-8\n'
        'validation_prompt = "a, \\"b\\" # c; d\\\\e"\nwith_prior_preservation = true\nclass_data_dir = "images"\n'
        'class_prompt = "x"\ncheckpointing_steps = 7\nsubset_weight = 2.0\n'
    )
    run = load_toml(text)
    assert tables(again(run, tmp_path)) == tables(run)


TEXT = st.text(
    st.characters(exclude_categories=("Cs",), exclude_characters=";\r"), min_size=1, max_size=12
).filter(lambda text: text.strip() == text)  # fmt: skip
NUMBER = {int: st.integers(16, 500), float: st.floats(0.01, 0.9), bool: st.booleans(), str: TEXT}
FIXED = {
    "blocks_to_swap": "all", "optimizer_args": ["a=b"], "network_args": ["a=b"], "lr_scheduler_args": ["a=b"],
    "network_reg_dims": ["a=4"], "network_reg_alphas": ["a=4"], "network_reg_lrs": ["a=1e-3"], "report_to": ["wandb"],
    "optimizer_type": "Prodigy", "background_color": "#102030", "output_name": "name", "include_patterns": ["a.*"],
    "exclude_patterns": [".b"], "train_single_block_indices": "0-3", "train_double_block_indices": "none",
    "base_weights_multiplier": [], "dim_from_weights": False, "use_dora": False, "with_prior_preservation": False,
    "cache_latents": True, "timestep_sampling": "sigma", "min_timestep": 5, "bucket_reso_steps": 32,
    "min_bucket_reso": 16, "resolution": [256, 512], "dataset_name": "a/b", "cpu_offload_checkpointing": False,
    "upcast_before_saving": False, "full_bf16": False, "guidance_scale_range": [0.5, 4.0], "mode": "spatial",
    "num_repeats": 3, "max_timestep": 999, "validation_timesteps": [0.5], "lora_strength": [],
    "prompt_dir": "", "resume": "latest",
}  # fmt: skip


def strategy(key: Declared) -> st.SearchStrategy[object]:
    """Values a key accepts, from its declaration; where a rule binds it to other keys, a value that keeps the rule."""
    if key.name in FIXED:
        return st.just(FIXED[key.name])
    if choices(key.field.annotation):
        return st.sampled_from(choices(key.field.annotation))
    kind = options(key.field.annotation)[0]
    inner = element(kind)
    if inner is not None and not is_pair(kind):
        return st.lists(NUMBER.get(inner[0], st.just("some/path")), max_size=3)
    return NUMBER.get(kind, st.just("some/path"))


FREE = [
    key
    for key in catalogue.declared().values()
    if not (key.info.command_line_only or key.info.secret or key.info.not_yet)
    and key.name
    not in ("dataset_config", "image_dir", "metadata_file", "subset_weight", "resolutions", "prompt", "guidance_scale")
]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.data())
def test_any_run_survives_the_round_trip(tmp_path: Path, data: st.DataObject) -> None:
    keys = data.draw(st.lists(st.sampled_from(FREE), unique_by=lambda key: key.name, max_size=25))
    lines = ['pretrained_model_name_or_path = "a/b"', 'dataset_name = "a/b"', 'mode = "spatial"']
    said = {"pretrained_model_name_or_path", "dataset_name", "mode"}
    lines += [f"{key.name} = {literal(data.draw(strategy(key)))}" for key in keys if key.name not in said]
    (tmp_path / "some").mkdir(exist_ok=True)
    (tmp_path / "some/path").touch()
    path = tmp_path / "first.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    try:
        run = load(["--config_file", str(path)], "train")
    except ConfigError as error:
        assert "control characters" in str(error), (error, path.read_text())
        return
    assert tables(again(run, tmp_path)) == tables(run)


ANY_TEXT = st.text(st.characters(exclude_categories=("Cs",)))


@given(st.one_of(ANY_TEXT, st.floats(allow_nan=False), st.integers(), st.booleans(), st.lists(ANY_TEXT, max_size=4)))
def test_a_literal_reads_back_as_itself(value: object) -> None:
    assert tomllib.loads(f"value = {literal(value)}")["value"] == value


def test_every_value_is_followed_by_its_origin(load_toml) -> None:
    text = resolved_toml(load_toml("[network]\nrank = 16\n", "--learning_rate", "1e-3"))
    assert "network_dim = 16  # " in text and "run.toml:2\n" in text
    assert "learning_rate = 0.001  # --learning_rate\n" in text
    assert 'network_layout = "fused"  # default\n' in text
    assert "# revision is not set\n" in text


def test_secrets_are_nowhere(load_toml, tmp_path: Path) -> None:
    run = load_toml("", "--hub_token", TOKEN, "--push_to_hub")
    assert run.saving.hub_token == TOKEN
    for text in (resolved_toml(run), metadata_toml(run), repr(run), str(run), repr(identity(run)), repr(changed(run))):
        assert TOKEN not in text
    assert identity_hash(run) == identity_hash(load_toml("", "--push_to_hub"))
    with pytest.raises(ConfigError) as caught:
        load_toml(f'hub_token = ["{TOKEN}"]\n')
    assert "hub_token: needs text" in str(caught.value) and TOKEN not in str(caught.value)


def test_a_secret_in_a_file_is_warned_about(load_toml) -> None:
    assert any("HF_TOKEN" in warning for warning in load_toml(f'hub_token = "{TOKEN}"\n').warnings)
    assert not load_toml("", "--hub_token", TOKEN).warnings


def test_metadata_holds_names_and_no_folders(load_toml, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "start.safetensors").touch()
    run = load_toml('pretrained_model_name_or_path = "base"\nnetwork_weights = "start.safetensors"\nrank = 16\n')
    text = metadata_toml(run)
    assert str(tmp_path) not in text
    content = tomllib.loads(text)
    assert content["model"]["pretrained_model_name_or_path"] == "base"
    assert content["network"] == {"network_dim": 16, "network_weights": "start.safetensors"}
    assert content["datasets"][0]["subsets"][0]["image_dir"] == "images"
    hub = load_toml('pretrained_model_name_or_path = "owner/base"\n')
    assert tomllib.loads(metadata_toml(hub))["model"]["pretrained_model_name_or_path"] == "owner/base"


@pytest.mark.parametrize(
    ("line", "same"),
    [
        ("max_train_steps = 900", True),
        ("save_every_n_steps = 7", True),
        ("learning_rate = 1e-3", True),
        ("sample_at_first = true", True),
        ("validation_prompt = 'a'", True),
        ("blocks_to_swap = 4", True),
        ("hub_model_id = 'a/b'", True),
        ("cache_workers = 1", True),
        ("output_dir = 'elsewhere'", True),
        ("rank = 5", False),
        ("seed = 5", False),
        ("flip_aug = true", False),
        ("resolution = 256", False),
        ("network_targets = 'attn'", False),
        ("optimizer_type = 'Prodigy'", False),
        ("guidance_scale = 1", False),
        ("gradient_accumulation_steps = 2", False),
    ],
)
def test_what_makes_a_run_another_run(line: str, same: bool, load_toml) -> None:
    first, second = load_toml(""), load_toml(line)
    assert (identity_hash(first) == identity_hash(second)) is same
    assert bool(differences(identity(first), identity(second))) is not same


def test_differences_name_old_and_new(load_toml) -> None:
    old, new = identity(load_toml("rank = 4\n")), identity(load_toml("rank = 8\nseed = 1\n"))
    assert differences(old, new) == ["network_dim: 4 -> 8", "seed: not set -> 1"]


def test_values_settled_later_are_checked_and_named(load_toml) -> None:
    run = load_toml("").with_values("training", "drawn", seed=7)
    assert run.training.seed == 7
    assert run.origins["seed"] == "drawn"
    assert "seed = 7  # drawn\n" in resolved_toml(run)
    assert [setting.place for setting in changed(run)].count("seed") == 1


def test_a_run_cannot_be_changed(load_toml) -> None:
    run = load_toml("")
    for target, name in ((run, "model"), (run.network, "network_dim"), (run.datasets[0].subsets[0], "mode")):
        with pytest.raises(ValueError, match="frozen"):
            setattr(target, name, None)
