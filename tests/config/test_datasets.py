"""Data sets: the tables, what they inherit, and the seed's spelling without tables."""

from pathlib import Path

import pytest

from library.config import load
from library.errors import ConfigError

TWO = """
flip_aug = true
[general]
caption_extension = ".caption"
resolution = 640
[[datasets]]
resolution = 768
num_repeats = 3
[[datasets.subsets]]
image_dir = "images"
mode = "spatial"
[[datasets.subsets]]
image_dir = "images"
mode = "spatial"
num_repeats = 5
caption_extension = ".txt"
[[datasets]]
[[datasets.subsets]]
image_dir = "images"
mode = "spatial"
"""


def test_subset_over_dataset_over_general_over_default(load_toml) -> None:
    first, second = load_toml(TWO).datasets
    assert (first.resolution, second.resolution) == (768, 640)
    assert [subset.num_repeats for subset in first.subsets] == [3, 5]
    assert [subset.caption_extension for subset in first.subsets] == [".caption", ".txt"]
    assert second.subsets[0].num_repeats == 1
    assert all(subset.flip_aug for dataset in (first, second) for subset in dataset.subsets)


def test_origins_name_the_line_of_each_subset(load_toml) -> None:
    origins = load_toml(TWO).origins
    assert origins["datasets.0.subsets.1.num_repeats"].endswith(":15")
    assert origins["datasets.0.subsets.0.num_repeats"].endswith(":8")
    assert origins["datasets.1.resolution"].endswith(":5")


def test_the_command_line_reaches_a_subset_only_where_there_is_one(load_toml) -> None:
    with pytest.raises(ConfigError, match="--num_repeats: there are 3 subsets; say it in the table"):
        load_toml(TWO, "--num_repeats", "2")
    with pytest.raises(ConfigError, match=r"--resolution: there are 2 \[\[datasets\]\]"):
        load_toml(TWO, "--resolution", "512")
    one = '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "images"\nmode = "spatial"\nnum_repeats = 3\n'
    assert load_toml(one, "--num_repeats", "2").datasets[0].subsets[0].num_repeats == 2


def test_without_tables_the_keys_make_one_subset(load_toml) -> None:
    run = load_toml('[dataset]\ninstance_data_dir = "images"\nuse_split_mask = true\nrepeats = 2\nbatch_size = 1\n')
    (dataset,) = run.datasets
    (subset,) = dataset.subsets
    assert (dataset.train_batch_size, subset.mode, subset.num_repeats) == (1, "spatial", 2)


def test_a_dataset_may_be_its_own_subset(load_toml) -> None:
    run = load_toml('[[datasets]]\nimage_dir = "images"\nmode = "spatial"\nresolution = 256\n')
    assert [len(dataset.subsets) for dataset in run.datasets] == [1]


def test_datasets_in_a_file_of_their_own(tmp_path: Path, images: Path) -> None:
    folder = tmp_path / "sets"
    folder.mkdir()
    (folder / "data.toml").write_text(
        '[general]\nresolution = 256\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = "../images"\nmode = "spatial"\n'
    )
    (tmp_path / "run.toml").write_text(
        'pretrained_model_name_or_path = "a/b"\ndataset_config = "sets/data.toml"\nresolution = 1024\nflip_aug = true\n'
    )
    run = load(["--config_file", str(tmp_path / "run.toml")], "train")
    subset = run.datasets[0].subsets[0]
    assert (run.datasets[0].resolution, subset.image_dir, subset.flip_aug) == (256, images, True)


@pytest.mark.parametrize(
    ("data", "main", "message"),
    [
        ("[network]\nrank = 4\n", "", "rank is no key of a data set; it belongs in the configuration file."),
        ("[general]\n", "", "there is no [[datasets]] table"),
        ("[[datasets]]\n", "[[datasets]]\n", "data sets stand here and in"),
        (None, "", "data.toml: cannot be read: No such file or directory"),
    ],
)
def test_mistakes_across_two_files(data: str | None, main: str, message: str, tmp_path: Path) -> None:
    if data is not None:
        (tmp_path / "data.toml").write_text(data)
    (tmp_path / "run.toml").write_text(f'dataset_config = "data.toml"\n{main}')
    with pytest.raises(ConfigError) as caught:
        load(["--config_file", str(tmp_path / "run.toml")], "cache")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("[datasets]\nresolution = 512\n", 1, "it is written with double brackets: [[datasets]]"),
        ("[[datasets]]\n[datasets.subsets]\n", 2, "it is written with double brackets: [[datasets.subsets]]"),
        ("[[datasets]]\n[[datasets.subsets]]\nresolution = 512\n", 3, "resolution cannot differ between subsets"),
        ("[[datasets]]\n[[datasets.subsets]]\nimage_dri = 'x'\n", 3, "no key image_dri. Did you mean image_dir"),
        ("[[datasets]]\nrank = 4\n", 2, "rank does not belong in [dataset]; it belongs in [network]"),
        ("[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'images'\nmode = 'edit'\n", 4, "mode = edit needs targets"),
        ("[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'images'\n", 2, "mode = mask needs masks"),
        ("[[datasets]]\n[[datasets.subsets]]\nmode = 'spatial'\n", 2, "a subset has no images"),
        ("[[datasets]]\nimage_dir = 'images'\nmode = 'spatial'\ndataset_name = 'a/b'\n", 4, "one thing in two ways"),
        ("resolutions = [512, 768]\nresolution = 640\n", 1, "say one thing in two ways. Keep one of them."),
        ("resolution = [8, 512]\n", 1, "a side is at least 16 pixels"),
        ("resolution = 520\nenable_bucket = false\n", 1, "both sides must be multiples of 16"),
        ("min_bucket_reso = 512\nmax_bucket_reso = 256\n", 1, "is above max_bucket_reso"),
        ('background_color = "red"\n', 1, 'write it as "#rrggbb"'),
        ('image_dir = "nowhere/images"\nmode = "spatial"\n', 1, "no such file or folder. (The path exists"),
    ],
)  # fmt: skip
def test_mistakes_name_their_line(text: str, line: int, message: str, load_toml) -> None:
    with pytest.raises(ConfigError) as caught:
        load_toml(text, command="cache")
    found = [part for part in str(caught.value).splitlines() if message in part]
    assert found, caught.value
    assert f"run.toml:{line}" in found[0]


@pytest.mark.parametrize(
    ("written", "sizes"),
    [
        ("resolution = 768", (768,)),
        ("resolution = [768, 512]", ((768, 512),)),
        ('resolution = "704,1024"', (704, 1024)),
        ("resolutions = [704, 1024]", (704, 1024)),
        ("size = 768", (768,)),
        ('size = "256,512,768"', (256, 512, 768)),
        ("resolution = 512\nsize = 512", (512,)),
    ],
)
def test_sizes(written: str, sizes: tuple[object, ...], load_toml) -> None:
    assert load_toml(written).datasets[0].sizes == sizes


def test_class_images_become_a_subset(load_toml) -> None:
    run = load_toml('with_prior_preservation = true\nclass_data_dir = "images"\nclass_prompt = "a dog"\n')
    added = run.datasets[0].subsets[-1]
    assert len(run.datasets[0].subsets) == 2
    assert (added.is_reg, added.instance_prompt, added.mode, added.generate_mask) == (True, "a dog", "mask", ("full",))
    with pytest.raises(ConfigError, match="needs class_data_dir and class_prompt"):
        load_toml("with_prior_preservation = true\n")


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ('keep_tokens_separator = "|||"', "use keep_tokens with the number of tags"),
        ("enable_wildcard = true", "caption_per_line"),
        ("debug_dataset = true", "--preview"),
        ('caption_extension = "txt"', 'write it with its dot, ".txt"'),
    ],
)
def test_kohyas_keys_that_are_not_here_say_what_is(line: str, advice: str, load_toml) -> None:
    with pytest.raises(ConfigError) as error:
        load_toml(line)
    assert advice in str(error.value) and "Did you mean" not in str(error.value)
