"""What a network's file and its workflow say about the data it was trained on, on real runs."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.training.project import COLOURS, Project, make_pairs

HEAD = "[[datasets]]\nresolution = 64\nbucket_reso_steps = 16\ntrain_batch_size = 2\n"
EDIT = '[[datasets.subsets]]\nimage_dir = "source"\ntarget_dir = "target"\nmode = "edit"\n'


@dataclass
class Written(Project):
    """A project with data sets of its own."""

    data: str = ""

    @property
    def config(self) -> Path:
        path = self.root / "run.toml"
        path.write_text(HEAD + self.data, encoding="utf-8")
        return path


def trained(root: Path, base: Path, data: str, **options) -> Path:
    """One step on these data; returns the network."""
    make_pairs(root)
    project = Written(root, base, data=data, settings=options).cache()
    assert project.train(max_train_steps=1) == 0
    return root / "out/net.safetensors"


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def workflow(path: Path, name: str = "net") -> list[dict]:
    return list(json.loads((path.parent / f"{name}_workflow_api.json").read_text()).values())


def rows(root: Path) -> str:
    """A table of the pairs with their masks."""
    lines = [
        {"image": f"source/{n}.png", "target": f"target/{n}.png", "mask": f"masks/{n}.png", "caption": COLOURS[n]}
        for n in range(7)
    ]
    (root / "items.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return '[[datasets.subsets]]\nmetadata_file = "items.jsonl"\nmode = "edit"\n'


REGIONS = {
    "no masks": (lambda root: EDIT, False),
    "a black mask value": (lambda root: EDIT + "edit_mask_value = 0.0\n", False),
    "a folder": (lambda root: EDIT + 'mask_dir = "masks"\n', True),
    "a table's column": (rows, True),
    "drawn masks": (lambda root: EDIT + 'generate_mask = "box"\n', True),
}


@pytest.mark.parametrize("name", REGIONS)
def test_edits_of_a_region_get_the_workflow_for_it(tmp_path, base, name):
    """Wherever the masks come from."""
    make, region = REGIONS[name]
    tmp_path.mkdir(exist_ok=True)
    path = trained(tmp_path, base, make(tmp_path))
    assert any(node["class_type"] == "SetLatentNoiseMask" for node in workflow(path)) == region


def test_the_workflow_begins_with_the_first_previews_prompt(tmp_path, base):
    """Those of a prompt file too."""
    (tmp_path / "prompts.txt").write_text(
        "paint the door green --w 64 --h 64 --ci source/0.png\nanother --w 64 --h 64 --ci source/0.png\n"
    )
    path = trained(tmp_path, base, EDIT, sample_prompts=tmp_path / "prompts.txt", sample_steps=2)
    (text,) = [node["inputs"]["text"] for node in workflow(path) if node["class_type"] == "CLIPTextEncode"]
    assert text == "paint the door green"


def test_only_what_is_trained_counts_as_a_mode(tmp_path, base):
    """Regularisation and held-out subsets are not what the network is for; inference needs no --mode then."""
    masked = '[[datasets.subsets]]\nimage_dir = "target"\nmask_dir = "masks"\ninstance_prompt = "a"\nmode = "mask"\n'
    data = f"{EDIT}{masked}is_reg = true\n{masked}is_validation = true\n"
    path = trained(tmp_path, base, data)
    assert json.loads(metadata(path)["influx_modes"]) == ["edit"] and metadata(path)["influx_mode"] == "edit"
    assert not (path.parent / "net_mask_workflow.json").exists()


def test_two_mask_values_are_said(tmp_path, base, caplog):
    """The commonest goes into the file, with a warning."""
    other = EDIT.replace('"source"', '"few"').replace('"target"', '"few_targets"')
    make_pairs(tmp_path / "more", 2)
    (tmp_path / "more/source").rename(tmp_path / "few")
    (tmp_path / "more/target").rename(tmp_path / "few_targets")
    path = trained(tmp_path, base, f"{other}edit_mask_value = 0.5\n{EDIT}")
    assert metadata(path)["influx_edit_mask_value"] == "1.0"
    assert "edit_mask_value is 1, 0.5" in caplog.text


def test_what_lora_browsers_show_is_there(tmp_path, base):
    """Tags, folders and buckets as kohya writes them: JSON objects, no paths."""
    said = metadata(trained(tmp_path, base, EDIT + "num_repeats = 3\n"))
    tags, dirs, buckets = (json.loads(said[f"ss_{name}"]) for name in ("tag_frequency", "dataset_dirs", "bucket_info"))
    assert tags == {"source": {f"make it {colour}": 1 for colour in COLOURS}}
    assert dirs == {"source": {"n_repeats": 3, "img_count": 7}}
    assert sum(bucket["count"] for bucket in buckets["buckets"].values()) == 7
    assert [64, 64] in [bucket["resolution"] for bucket in buckets["buckets"].values()]


def test_the_rank_is_the_files(project, tmp_path):
    """Not the key's, where a file or a start say otherwise."""
    assert project.train(output_dir=tmp_path / "a", max_train_steps=1) == 0
    runs = {
        "b": ({"network_weights": tmp_path / "a/net.safetensors", "dim_from_weights": True, "network_dim": 64}, "4"),
        "c": ({"network_init": "pissa"}, "8"),
        "d": ({"use_dora": True, "export_rank": 3}, "3"),
    }
    for name, (options, rank) in runs.items():
        assert project.train(output_dir=tmp_path / name, max_train_steps=1, **options) == 0
        said = metadata(tmp_path / name / "net.safetensors")
        assert (said["ss_network_dim"], said["ss_network_alpha"]) == (rank, rank), name
    assert project.train(output_dir=tmp_path / "e", max_train_steps=1, network_module="full") == 0
    assert "ss_network_dim" not in metadata(tmp_path / "e/net.safetensors")
