"""What an edit is decided to be: the network's word, the user's word, and every wrong input in one plain message."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.config import Run
from library.errors import UserError
from library.inference.plan import Plan, make_plan, safe_name
from library.models.base import Base, Defaults
from tests.oracle.reference import noisy_mask, noisy_picture

Ask = Callable[..., Run]


def planned(run: Run) -> Plan:
    return make_plan(run, Base.open(run.model).defaults)


def network(path: Path, **metadata: object) -> Path:
    """A network file with one tensor and this metadata."""
    import torch

    from library.tensorfile import save_tensors

    save_tensors(path, {"lora_unet_x.alpha": torch.ones(())}, {name: str(value) for name, value in metadata.items()})
    return path


@pytest.fixture
def trained(folder: Path) -> Path:
    return network(
        folder / "trained.safetensors", influx_modes='["edit"]', influx_edit_mask_value="0.0",
        influx_sample_guidance="12.5", influx_train_guidance="1.0", influx_resolution="32x32",
    )  # fmt: skip


def test_the_network_says_how_it_is_used(ask: Ask, trained: Path) -> None:
    plan = planned(ask("--lora", str(trained)))
    assert plan.mode == "edit"
    assert plan.mode_settings.edit_mask_value == 0.0
    assert plan.guidance == 12.5, "inference guidance, not the training's 1.0"
    assert plan.steps == 4, "from the base's influx.json"
    assert [request.fit.canvas for request in plan.requests] == [(32, 32), (48, 32), (32, 48)]
    assert [request.fit.result for request in plan.requests] == [(64, 64), (96, 64), (50, 80)]
    assert plan.networks[0].strength == 1


def test_the_user_says_otherwise(ask: Ask, trained: Path, folder: Path) -> None:
    plan = planned(
        ask(
            "--lora", str(trained), "--mode", "mask", "--mask", str(folder / "masks"), "--sample_guidance_scale", "3",
            "--sample_steps", "9", "--edit_mask_value", "1", "--resolution", "64", "--lora_strength", "0.5",
        )
    )  # fmt: skip
    assert (plan.mode, plan.guidance, plan.steps, plan.mode_settings.edit_mask_value) == ("mask", 3, 9, 1)
    assert plan.requests[0].fit.canvas == (64, 64)
    assert plan.networks[0].strength == 0.5
    assert plan.requests[1].picture.mask == folder / "masks" / "b.png"


def test_without_any_word_fluxs_own_values(ask: Ask) -> None:
    run = ask("--lora", "none", "--mode", "edit")
    plan = make_plan(run, Defaults())
    assert (plan.guidance, plan.steps, plan.token_length) == (30, 50, 512)
    assert plan.networks == ()
    assert plan.requests[2].fit.canvas == (64, 80) and plan.requests[2].fit.scaled == (50, 80)


def test_seeds_and_names(ask: Ask, folder: Path) -> None:
    plan = planned(ask("--lora", "none", "--mode", "edit", "--seed", "7", "--num_images", "2", image="in/a.png"))
    assert [request.seed for request in plan.requests] == [7, 8]
    assert [request.output.name for request in plan.requests] == ["a_seed7.png", "a_seed8.png"]
    plan = planned(ask("--lora", "none", "--mode", "edit", "--seeds", "3;5", image="in/a.png"))
    assert [request.seed for request in plan.requests] == [3, 5]


def test_nothing_is_overwritten(ask: Ask, folder: Path) -> None:
    edited = folder / "out" / "edited"
    edited.mkdir(parents=True)
    (edited / "a.png").write_bytes(b"mine")
    plan = planned(ask("--lora", "none", "--mode", "edit", image="in/a.png"))
    assert plan.requests[0].output == edited / "a_2.png"


def test_each_picture_has_its_prompt(ask: Ask, folder: Path) -> None:
    words = ["--lora", "none", "--mode", "edit"]
    plan = planned(ask(*words, "--prompt_dir", str(folder / "prompts"), prompt=None))
    assert [request.picture.prompt for request in plan.requests] == ["a a circle", "a b circle", "a c circle"]
    plan = planned(ask(*words, prompt="one;two;three, with commas"))
    assert [request.picture.prompt for request in plan.requests] == ["one", "two", "three, with commas"]


def test_two_networks_that_agree_are_used_together(ask: Ask, trained: Path, folder: Path) -> None:
    other = network(folder / "other.safetensors", influx_modes='["edit"]', influx_sample_guidance="12.5")
    plan = planned(ask("--lora", f"{trained};{other}", "--lora_strength", "1;-0.5"))
    assert [(use.path.name, use.strength) for use in plan.networks] == [
        ("trained.safetensors", 1), ("other.safetensors", -0.5)
    ]  # fmt: skip


def test_other_files_in_the_folder_are_left_out_and_named(ask: Ask, folder: Path) -> None:
    (folder / "in" / "Thumbs.db").write_bytes(b"junk")
    plan = planned(ask("--lora", "none", "--mode", "edit"))
    assert len(plan.requests) == 3
    assert any("Thumbs.db" in line for line in plan.lines())


def test_the_plan_is_told_in_words(ask: Ask, trained: Path) -> None:
    lines = "\n".join(planned(ask("--lora", str(trained), "--seed", "1")).lines())
    for word in ("trained.safetensors at 1", "mode: edit, mask value 0", "4 steps", "guidance 12.5", "a.png (64x64, "):
        assert word in lines


def several_modes(folder: Path) -> list[str]:
    path = network(folder / "mixed.safetensors", influx_modes=json.dumps(["edit", "spatial"]))
    return ["--lora", str(path)]


def no_metadata(folder: Path) -> list[str]:
    return ["--lora", str(network(folder / "foreign.safetensors"))]


def disagreeing(folder: Path) -> list[str]:
    paths = [
        network(folder / f"{value}.safetensors", influx_modes='["edit"]', influx_edit_mask_value=value)
        for value in (0.0, 1.0)
    ]
    return ["--lora", ";".join(map(str, paths))]


def no_network_file(folder: Path) -> list[str]:
    (folder / "text.safetensors").write_text("not a network")
    return ["--lora", str(folder / "text.safetensors")]


def corrupt(folder: Path) -> list[str]:
    (folder / "in" / "b.png").write_bytes((folder / "in" / "b.png").read_bytes()[:200])
    (folder / "in" / "c.png").write_text("<html>")
    return ["--lora", "none", "--mode", "edit"]


def mask_of_another_aspect(folder: Path) -> list[str]:
    noisy_mask(64, 32).save(folder / "masks" / "a.png")
    (folder / "masks" / "c.png").unlink()
    return ["--lora", "none", "--mode", "mask", "--mask", str(folder / "masks")]


def prompt_missing(folder: Path) -> list[str]:
    (folder / "prompts" / "b.txt").unlink()
    return ["--lora", "none", "--mode", "edit", "--prompt_dir", str(folder / "prompts")]


def existing_output(folder: Path) -> list[str]:
    noisy_picture(16, 16).save(folder / "mine.png")
    return [*BASE_ALONE, "--output", str(folder / "mine.png")]


BASE_ALONE = ["--lora", "none", "--mode", "edit"]
WRONG = {
    "several modes": (several_modes, ["edit, spatial", "--mode edit or --mode spatial"]),
    "no metadata": (no_metadata, ["--mode edit"]),
    "networks disagree": (disagreeing, ["0.0.safetensors: 0", "1.0.safetensors: 1", "--edit_mask_value"]),
    "no network": (lambda folder: [], ["last.safetensors", "influx_train.py"]),
    "network is no network": (no_network_file, ["text.safetensors"]),
    "one strength for two files": (
        lambda folder: ["--lora", f"{network(folder / 'a.safetensors')};{network(folder / 'b.safetensors')}",
                        "--lora_strength", "1", "--mode", "edit"],
        ["2 files", "1 numbers"],
    ),
    "corrupt pictures": (corrupt, ["2 of 3 pictures", "b.png: damaged", "c.png: a web page"]),
    "masks": (mask_of_another_aspect, ["2 of 3", "a.png is 64x64, its mask a.png 64x32", "c.png: its mask"]),
    "mask mode without a mask": (lambda folder: ["--lora", "none", "--mode", "mask"], ["needs a mask", "--mask"]),
    "spatial with a mask": (
        lambda folder: ["--lora", "none", "--mode", "spatial", "--mask", str(folder / "masks")],
        ["spatial takes no mask"],
    ),
    "a prompt file is missing": (prompt_missing, ["1 of 3 prompts", "b.png"]),
    "two prompts for three pictures": (lambda folder: [*BASE_ALONE, "--prompt", "a;b"], ["2 prompts for 3 pictures"]),
    "another aspect": (lambda folder: [*BASE_ALONE, "--width", "64", "--height", "64"], ["b.png is 96x64", "fit"]),
    "resolution and width": (
        lambda folder: [*BASE_ALONE, "--width", "64", "--resolution", "64"], ["resolution and width"],
    ),
    "the output exists": (existing_output, ["mine.png exists already"]),
    "many results in one file": (lambda folder: [*BASE_ALONE, "--output", str(folder / "x.png")], ["3 results"]),
    "another kind of file": (lambda folder: [*BASE_ALONE, "--output", str(folder / "x.jpg")], ["x.jpg", "PNG"]),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_input_is_one_plain_message(name: str, ask: Ask, folder: Path) -> None:
    words, said = WRONG[name]
    given = words(folder)
    prompt = None if {"--prompt", "--prompt_dir"} & set(given) else "a red circle"
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError) as caught:
        planned(ask(*given, prompt=prompt, image="in/a.png" if name == "the output exists" else "in"))
    assert caught.value.exit_code == 2
    for part in said:
        assert part in str(caught.value)
    assert sorted(folder.rglob("*")) == before


def test_an_empty_folder_and_no_prompt(ask: Ask, folder: Path) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        planned(ask(*BASE_ALONE, image="empty"))
    with pytest.raises(UserError, match="no prompt"):
        planned(ask(*BASE_ALONE, prompt=None))


@given(st.text())
def test_a_name_never_leaves_its_folder(stem: str) -> None:
    name = safe_name(stem)
    assert name and not set(name) & set('/\\:*?"<>|\0\n ') and name not in (".", "..") and not name.startswith(".")
    assert (Path("/out") / f"{name}.png").resolve().parent == Path("/out").resolve()


def test_a_dry_run_imports_no_torch(base_folder: Path, folder: Path) -> None:
    code = (
        "import sys; from library.start import run_command; from library import inference\n"
        "status = run_command('infer', inference.run, sys.argv[1:])\n"
        "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules\n"
        "sys.exit(status)"
    )
    words = ["--pretrained_model_name_or_path", base_folder, "--image", folder / "in", "--prompt", "x", "--dry_run"]
    words += [*BASE_ALONE, "--output_dir", folder / "out"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "a.png (64x64), seed" in done.stdout
    assert not (folder / "out").exists()


@pytest.mark.parametrize("name", ["width", "height", "resolution"])
def test_a_size_that_no_machine_can_make_is_refused(ask: Ask, name: str) -> None:
    """With the bound in the message; a slip of the finger is not left to the kernel to kill."""
    with pytest.raises(UserError, match=r"4096"):
        ask("--lora", "none", "--mode", "edit", f"--{name}", "5000000")
    ask("--lora", "none", "--mode", "edit", f"--{name}", "4096")


def test_what_the_network_was_trained_over_is_applied_or_missed(ask: Ask, folder: Path) -> None:
    """base_weights of the configuration lie below the network; where they are not given, the plan says so."""
    below = network(folder / "below.safetensors", influx_modes='["mask"]', influx_sample_guidance="99")
    over = network(
        folder / "over.safetensors",
        influx_modes='["edit"]',
        influx_config='[network]\nbase_weights = ["below.safetensors"]'
    )  # fmt: skip
    alone = planned(ask("--lora", str(over)))
    assert "over.safetensors was trained on a base with below.safetensors merged in" in "\n".join(alone.lines())
    both = planned(ask("--lora", str(over), "--base_weights", str(below), "--base_weights_multiplier", "0.5"))
    assert [(use.path.name, use.strength) for use in both.networks] == [
        ("below.safetensors", 0.5), ("over.safetensors", 1)
    ]  # fmt: skip
    assert (both.mode, both.guidance) == ("edit", 3.5), "the base's own word does not count"
    assert "merged in" not in "\n".join(both.lines())
    named = planned(ask("--lora", f"{below};{over}", "--mode", "edit", "--base_weights", str(below)))
    assert [use.path.name for use in named.networks] == ["below.safetensors", "over.safetensors"], "once"
    with pytest.raises(UserError, match="base_weights"):
        planned(ask("--lora", str(over), "--base_weights", str(folder / "nowhere.safetensors")))
