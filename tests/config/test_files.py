"""What can be wrong with a TOML file: one message with file, line and cure, never a crash, never a silent default."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from library.config import load
from library.errors import ConfigError


def message_of(path: Path, content: str | bytes, command: str = "train") -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as caught:
        load(["--config_file", str(path)], command)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("rank = 4\nrank = 8\n", 2, "rank stands twice, on lines 1 and 2. Keep one."),
        ("rank = 4\n[network]\nnetwork_dim = 8\n", 3, "network_dim says the same as rank (line 1). Keep one of them."),
        ("[network]\nrank = 4\n[network]\n", 3, "network stands twice, on lines 1 and 3. Keep one."),
        ("save_every_n_steps = 5\ncheckpointing_steps = 10\n", 2, "but save_every_n_steps = 5 (line 1). Keep one"),
        ("mode = 'edit'\nuse_split_mask = true\n", 2, 'means mode = "spatial", but mode = "edit" (line 1)'),
        ("[networks]\nrank = 4\n", 1, "there is no table [networks]. Did you mean network?"),
        ("[network.more]\nrank = 4\n", 1, "there is no key more"),
        ("[network]\nlearning_rate = 1\n", 2, "learning_rate does not belong in [network]; it belongs in [optimizer]"),
        ("learnig_rate = 1\n", 1, "there is no key learnig_rate. Did you mean learning_rate?"),
        ("network_train_unet_only = true\n", 1, "this is the default here; remove the line"),
        ("dry_run = true\n", 1, "dry_run is an action, not a setting: give it on the command line, as --dry_run."),
        ("rank = { a = 1 }\n", 1, "there is no table [rank]"),
        ("[network]\nrank = { a = 1 }\n", 2, "rank is a key, not a table."),
        ("rank = True\n", 1, "Write true."),
        ("revision = None\n", 1, "To leave a key unset, remove its line."),
        ("revision = main\n", 1, "Text needs quotes."),
        ("image_dir = data/train\n", 1, "Text needs quotes."),
        ('image_dir = "C:\\models"\n', 1, "A backslash needs single quotes: `image_dir = 'C:\\models'`"),
        ('image_dir = "C:\\Users\\me"\n', 1, "A backslash needs single quotes: `image_dir = 'C:\\Users\\me'`"),
        ("rank = 4 seed = 1\n", 1, "this is no TOML"),
        ("rank 4\n", 1, "this is no TOML"),
        ("[network\n", 1, "this is no TOML"),
        ("rank = \n", 1, "this is no TOML"),
        ("rank = 1e-4\n", 1, "rank = 0.0001: needs a whole number, at least 1."),
        ("lora_layers = [1, 'a']\n", 1, "lora_layers = [1, \"a\"]: needs a list: text."),
        ("network_args = ['conv_dim']\n", 1, '"conv_dim" has not the form "name=value".'),
        ("cache_latents = false\n", 1, "the trainer never holds the VAE encoder"),
        ("weighting_scheme = 'mode'\ntimestep_sampling = 'shift'\n", 1, "both choose the density of timesteps"),
        ("dim_from_weights = true\n", 1, "needs network_weights"),
        ("use_dora = true\nbase_precision = 'nf4'\n", 1, "DoRA over a base in nf4 would train as a plain network"),
        ("network_args = ['dora_wd=True']\nbase_precision = 'int8'\n", 1, "DoRA over a base in int8"),
        ("train_single_block_indices = '0-a'\n", 1, "write all, none, or numbers and ranges as 0-3,5."),
        ("include_patterns = ['(']\n", 1, '"(" is no regular expression'),
        ("optimizer_type = 'os.system()'\n", 1, "is not known."),
        ("optimizer_type = 'AdamV'\n", 1, "Did you mean AdamW?"),
        ("optimizer_args = ['betas=0.9,0.9']\nadam_beta1 = 0.8\n", 1, "say the same. Keep one."),
        ("full_bf16 = true\nmixed_precision = 'fp16'\n", 1, "exclude each other"),
        ("cpu_offload_checkpointing = true\n", 1, "set gradient_checkpointing = true"),
        ("output_name = '../x'\n", 1, "a plain file name, without folders"),
        ("upcast_before_saving = true\nsave_precision = 'bf16'\n", 1, "means fp32, but save_precision = bf16"),
        ("report_to = ['none', 'wandb']\n", 1, "none cannot stand beside others"),
        ("guidance_scale_range = [4.0, 1.0]\n", 1, "low above high"),
        ("guidance_scale_range = [1, 4]\nguidance_scale = 2\n", 1, "say one thing in two ways"),
        ("min_timestep = 800\nmax_timestep = 300\n", 1, "is not below max_timestep = 300"),
        ("base_weights_multiplier = [1.0]\n", 1, "1 strengths for 0 files"),
        ("validation_prompt = ['a', 'b']\nvalidation_image = ['x', 'y', 'z']\n", 2, "give one for all or one for each"),
    ],
)  # fmt: skip
def test_mistakes_name_line_and_cure(text: str, line: int, message: str, tmp_path: Path) -> None:
    found = [part for part in message_of(tmp_path / "run.toml", text).splitlines() if message in part]
    assert found, message_of(tmp_path / "run.toml", text)
    assert f"run.toml:{line}" in found[0]


@pytest.mark.parametrize(("escaped", "letter"), [(r"\n", "n"), (r"\t", "t"), (r"\b", "b"), (r"\f", "f"), (r"\r", "r")])
def test_a_windows_path_read_as_control_characters_is_refused_with_the_fix(
    escaped: str, letter: str, tmp_path: Path
) -> None:
    text = f'image_dir = "C:{escaped}ew"\n'
    found = message_of(tmp_path / "run.toml", text)
    assert "run.toml:1: image_dir: the backslashes of this path were read as control characters" in found
    assert f"image_dir = 'C:\\{letter}ew'" in found
    assert f'image_dir = "C:/{letter}ew"' in found


def test_byte_order_mark_and_windows_line_ends_are_read(load_toml, tmp_path: Path) -> None:
    path = tmp_path / "bom.toml"
    path.write_bytes(b"\xef\xbb\xbfrank = 8\r\n\r\nlearnig_rate = 1\r\n")
    with pytest.raises(ConfigError, match="bom.toml:3: there is no key learnig_rate"):
        load(["--config_file", str(path)], "train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"rank = 4\nnote = '\xe9'\n", "run.toml:2: this is not UTF-8 text. Save the file as UTF-8."),
        ("rank = 4\n".encode("utf-16"), "this is not UTF-8 text"),
        (b"a = " + b"[" * 5000, "this is no TOML"),
        (b"\x00", "this is no TOML"),
    ],
)
def test_bytes_that_are_no_text(content: bytes, message: str, tmp_path: Path) -> None:
    assert message in message_of(tmp_path / "run.toml", content)


@pytest.mark.parametrize("content", ["rank 4\n", "rank = 4\nrank = 5\n", "a = '\0'\n"])
def test_a_file_that_cannot_be_read_is_the_only_complaint(content: str, tmp_path: Path) -> None:
    """What would be missing (a base, a data set) stands, most likely, in the file."""
    assert "\n- " not in message_of(tmp_path / "run.toml", content)
    with pytest.raises(ConfigError) as caught:
        load(["--config_file", str(tmp_path / "nowhere.toml")], "train")
    assert "\n- " not in str(caught.value)


def test_a_missing_file_and_the_suffix_left_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere.toml: cannot be read: No such file or directory"):
        load(["--config_file", str(tmp_path / "nowhere.toml")], "train")
    (tmp_path / "run.toml").write_text("rnk = 1\n")
    with pytest.raises(ConfigError, match="run.toml:1"):
        load(["--config_file", str(tmp_path / "run")], "train")


def test_a_key_may_stand_in_its_table_or_at_the_top_or_be_dotted(load_toml) -> None:
    for text in ("rank = 8\n", "[network]\nrank = 8\n", "network.rank = 8\n", "network = { rank = 8 }\n"):
        assert load_toml(text).network.network_dim == 8


def test_arguments_may_be_a_table(load_toml) -> None:
    run = load_toml("[optimizer]\noptimizer_args = { weight_decay = 0.1, betas = [0.9, 0.95] }\n")
    assert run.optimizer.optimizer_args == ("weight_decay=0.1", "betas=0.9,0.95")


def test_what_a_command_needs_is_told_together(tmp_path: Path) -> None:
    assert message_of(tmp_path / "run.toml", "").count("\n- ") == 2
    assert "image is not set" in message_of(tmp_path / "run.toml", "", "infer")


FRAGMENTS = st.lists(
    st.sampled_from(
        ["rank", "network", "[", "]", "[[datasets]]", "[[datasets.subsets]]", "=", " = ", "\n", '"', "'", '"""', "1",
         "-1", "true", "nan", "1e400", "{", "}", ",", ".", "image_dir", "resolution", "mode", '"edit"', '"a,b"', "#",
         "\\", "\\n", "é", "\x7f", "1979-05-27", "[model]", "[general]", "use_split_mask", "size", "optimizer_args"]
    ),
    max_size=24,
).map("".join)  # fmt: skip


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(FRAGMENTS)
def test_any_text_ends_in_a_run_or_a_config_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "fuzz.toml"
    path.write_text(text, encoding="utf-8")
    try:
        load(["--config_file", str(path)], "train")
    except ConfigError as error:
        assert str(error).strip()


WORDS = st.sampled_from(
    ["--rank", "--rank=", "--rank=4", "4", "--network_args", "a=1", "--mode", "edit", "--size=1,2", "--resolution", "x",
     "--", "---", "--=", "=", "", "--use_split_mask", "true", "--config_file", "/nowhere", "--image_dir", "--dry_run",
     "--validation_prompt", "a;b", "--generate_mask", "box", "--guidance_scale_range", "[1", "--blocks_to_swap", "é",
     "--checkpointing_steps", "--center_crop", "\x00", "--hub_token"]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(WORDS, max_size=8))
def test_any_command_line_ends_in_a_run_or_a_config_error(words: list[str]) -> None:
    for command in ("cache", "train", "infer"):
        try:
            load(words, command)
        except ConfigError as error:
            assert str(error).strip()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n[[training]]\nseed = 1\n", "run.toml:2: [[training]] stands once, in single brackets: [training]."),
        ("[[dataset]]\nresolution = 64\n", "run.toml:1: [[dataset]] is written [[datasets]]"),
        ("[[datasts]]\nresolution = 64\n", "run.toml:1: there is no table [[datasts]]. Did you mean datasets"),
        ("[[colours]]\nred = 1\n", "run.toml:1: there is no table [[colours]]. The tables are"),
    ],
)
def test_double_brackets_where_none_belong(tmp_path: Path, text: str, message: str) -> None:
    """The line, what it means, and nothing about what seems to be missing then."""
    said = message_of(tmp_path / "run.toml", text)
    assert message in said and said.count("\n") == 0, said
