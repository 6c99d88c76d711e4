"""What a run will train and save is looked at before weights are loaded: mistakes are found by every command alike."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.training.project import Project, make_project
from tests.training.test_around_the_steps import PLAN, ROOT

MISTAKES = {
    "loha for diffusers": ({"network_module": "loha", "save_format": "diffusers"}, "save_format = diffusers"),
    "lokr for diffusers": ({"network_module": "lokr", "save_format": "diffusers"}, "cannot load lokr"),
    "glora for diffusers": ({"network_module": "glora", "save_format": "diffusers"}, "cannot load glora"),
    "diag-oft for diffusers": (
        {"network_module": "diag-oft", "allow_comfy_only": True, "save_format": "diffusers"}, "cannot load oft",
    ),
    "loha for both": ({"network_module": "loha", "save_format": "both"}, "save_format = both"),
    "loha and x_embedder for both": (
        {"network_module": "loha", "train_x_embedder": True, "save_format": "both"}, "cannot load loha",
    ),
    "split lokr for both": (
        {"network_module": "lokr", "network_layout": "split", "save_format": "both"}, "separate linears",
    ),
    "split lokr on all": (
        {"network_module": "lokr", "network_layout": "split", "network_targets": "all-linear"}, "exclude_patterns",
    ),
    "no picture": ({"metadata_thumbnail": "run.toml"}, "metadata_thumbnail"),
    "a misspelt argument": ({"network_module": "lokr", "network_args": "factro=8"}, "did you mean factor"),
    "a pattern of nothing": ({"include_patterns": "img_inn"}, "include_patterns: 'img_inn'"),
    "a refused kind": ({"network_module": "dylora"}, "is refused"),
    "ranks of a kind without": ({"network_module": "loha", "network_dropout": 0.1}, "no ranks to drop"),
    "weights that are none": ({"network_weights": "run.toml"}, "network_weights"),
    "base weights that are none": ({"base_weights": "run.toml"}, "base_weights"),
    "weights of another rank": ({"network_weights": "rank8.safetensors"}, "has rank 8"),
    "LoRA+ without a LoRA": ({"network_module": "loha", "loraplus_lr_ratio": 4}, "loraplus_lr_ratio = 4"),
    "LoRA+ with DoRA": ({"use_dora": True, "loraplus_lr_ratio": 4}, "loraplus_lr_ratio = 4"),
}  # fmt: skip


@pytest.fixture(scope="module")
def rank8(cached, tmp_path_factory):
    """A network of rank 8 for the tiny base."""
    out = tmp_path_factory.mktemp("rank8")
    assert cached.train(output_dir=out, network_dim=8, max_train_steps=1) == 0
    return out / "net.safetensors"


@pytest.mark.parametrize("command", [{}, {"dry_run": True}, {"list_modules": True}], ids=["train", "dry", "list"])
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_found_before_anything_is_loaded(project, tmp_path, monkeypatch, capsys, rank8, name, command):
    """The message says where; no weight is read; the folder is left as it was."""
    from library.models import setup

    options, said = MISTAKES[name]
    files = {"run.toml": project.config, "rank8.safetensors": rank8}
    options = {key: files.get(value, value) for key, value in options.items()}
    monkeypatch.setattr(setup, "load", lambda *_: pytest.fail("weights were loaded"))
    assert project.train(**options, **command) == 2
    error = capsys.readouterr().err
    assert said in error and "error: --" in error, error
    assert not (tmp_path / "out").exists()


def test_the_place_is_that_in_the_file(cached, tmp_path, capsys):
    """File and line of the key that the message names first."""
    config = tmp_path / "run.toml"
    text = cached.config.read_text(encoding="utf-8").replace('= "source"', f'= "{cached.root}/source"')
    text = text.replace('= "target"', f'= "{cached.root}/target"')
    config.write_text(f'[network]\nnetwork_module = "lokr"\nnetwork_args = ["factro=8"]\n{text}', encoding="utf-8")
    words = cached.words("x", output_dir=tmp_path / "out")
    words[1] = str(config)
    from library import training
    from library.start import run_command

    assert run_command("train", training.run, words) == 2
    assert "run.toml:3" in capsys.readouterr().err


def test_looking_at_a_file_to_start_from_needs_no_torch(project, rank8):
    """The plan counts what the file says."""
    words = project.words("x", dry_run=True, network_weights=rank8, dim_from_weights=True)
    done = subprocess.run([sys.executable, "-c", PLAN, *words], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "TORCH False 0" in done.stdout, done.stdout + done.stderr


def test_weights_that_hold_nan_are_refused_at_once(project, tmp_path, capsys, rank8):
    """As loading them would."""
    tensors = load_file(rank8)
    name = next(name for name in tensors if name.endswith("lora_up.weight"))
    tensors[name][0, 0] = float("nan")
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}, tmp_path / "nan.safetensors")
    assert project.train(network_weights=tmp_path / "nan.safetensors", network_dim=8, dry_run=True) == 2
    assert "NaN" in capsys.readouterr().err


LISTED = {
    "lora": {}, "loha": {"network_module": "loha"}, "lokr": {"network_module": "lokr"},
    "glora": {"network_module": "glora"}, "full": {"network_module": "full"},
    "diag-oft": {"network_module": "diag-oft", "allow_comfy_only": True}, "dora": {"use_dora": True},
    "x_embedder": {"train_x_embedder": True}, "text encoder": {"train_text_encoder": True, "text_encoder_dim": 2},
    "both": {"save_format": "both", "save_precision": "bf16"},
    "from a file": {"network_weights": "rank8.safetensors", "dim_from_weights": True, "network_dim": 64},
}  # fmt: skip


@pytest.mark.parametrize("name", LISTED)
def test_the_list_says_what_is_trained_and_written(project, tmp_path, capsys, monkeypatch, rank8, name):
    """Parameters as the optimizer gets them, sizes as the files have, to the shown digit; --dry_run says the same."""
    from library.training import assemble

    counted = []
    original = assemble.make_trained

    def spied(*arguments):
        trained = original(*arguments)
        counted.append(sum(parameter.numel() for parameter in trained.network.trained()))
        return trained

    monkeypatch.setattr(assemble, "make_trained", spied)
    options = {**LISTED[name], "max_train_steps": 1}
    options = {key: rank8 if value == "rank8.safetensors" else value for key, value in options.items()}
    assert project.train(**options) == 0
    assert project.train(**options, list_modules=True) == 0
    listed = capsys.readouterr().out
    assert f"{counted[0]} trained parameters" in listed
    sizes = {path.name: path for path in (tmp_path / "out").glob("net*.safetensors")}
    for file, path in sizes.items():
        written = sum(tensor.numel() * tensor.element_size() for tensor in load_file(path).values())
        assert f"{file}: {written / 1e6:.2f} MB" in listed, listed
    assert listed.count(".safetensors:") == len(sizes)
    assert project.train(**options, dry_run=True) == 0
    planned = capsys.readouterr().out
    assert f"{counted[0] / 1e6:.1f} M trained parameters" in planned
    assert all(line in planned for line in listed.splitlines() if ".safetensors:" in line)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "of rank 4, alpha 4: effective scale 1;"),
        ({"network_alpha": 2}, "of rank 4, alpha 2: effective scale 0.5;"),
        ({"network_alpha": 2, "use_rslora": True}, "of rank 4, alpha 2: effective scale 1;"),
        ({"network_reg_dims": "single_blocks=2"}, "of rank 2, alpha 2: effective scale 1"),
        ({"network_module": "loha", "network_alpha": 1}, "of rank 4, alpha 1: effective scale 0.25;"),
        ({"network_module": "full"}, "full, 20 modules; "),
        ({"train_x_embedder": True}, "; x_embedder in full; "),
        ({"train_text_encoder": True, "text_encoder_dim": 2}, "on CLIP-L of rank 2, alpha 2: effective scale 1;"),
    ],
)
def test_the_effective_scale_is_printed(project, capsys, caplog, options, said):
    """By the plan, and by the run before it loads anything."""
    assert project.train(**options, dry_run=True) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("network: ")]
    assert said in line, line
    assert project.train(**options, max_train_steps=1) == 0
    assert line in caplog.messages


NOT_TO_BE = {
    "a misspelt argument": ({"optimizer_args": "weight_decai=1"}, "did you mean 'weight_decay'"),
    "a value of another kind": ({"optimizer_args": "betas=5"}, "takes 2 numbers"),
    "no argument of a schedule": ({"lr_scheduler_args": "foo=1"}, "'foo' is not known"),
    "cycles below none": (
        {"lr_scheduler": "cosine_with_restarts", "lr_scheduler_args": "num_cycles=-3"}, "at least 1, at most inf",
    ),
    "more warm-up than steps": (
        {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 7}, "lr_warmup_steps (7)",
    ),
    "more warm-up than epochs": (
        {"lr_scheduler": "warmup_stable_decay", "lr_warmup_steps": 3, "lr_decay_steps": 6, "max_train_steps": "",
         "max_train_epochs": 2}, "the run's 8 steps",
    ),
    "an optimizer that cannot": ({"optimizer_type": "torch.optim.LBFGS"}, "cannot train here"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_TO_BE)
def test_what_cannot_be_is_refused_by_the_plan_and_before_weights_are_loaded(project, capsys, monkeypatch, name):
    """With the same words."""
    from library.models import setup

    monkeypatch.setattr(setup, "load", lambda *arguments: pytest.fail("weights were loaded"))
    options, words = NOT_TO_BE[name]
    for keys in ({"dry_run": True}, {}):
        assert project.train(**options, **keys) == 2
        assert words in capsys.readouterr().err


def test_values_that_only_the_class_knows_are_refused_before_weights_are_loaded(project, capsys, monkeypatch):
    """A beta above 1."""
    from library.models import setup

    monkeypatch.setattr(setup, "load", lambda *arguments: pytest.fail("weights were loaded"))
    assert project.train(optimizer_args="betas=2,0.9") == 2
    assert "refuses its arguments" in capsys.readouterr().err


def planned(project, capsys, **keys) -> str:
    """What the plan prints."""
    assert project.train(**keys, dry_run=True) == 0
    return capsys.readouterr().out


def test_the_plan_says_how_the_folder_stands(project, tmp_path, capsys):
    """New, going on, done, or another run's: what the run itself would do, and nothing is written."""
    out = tmp_path / "out"
    assert f"a new run in {out}\n" in planned(project, capsys) and not out.exists()
    options = {"save_every_n_steps": 2, "save_state_on_train_end": True}
    assert project.train(max_train_steps=5, **options) == 0
    before = sorted((path, path.stat().st_mtime_ns) for path in out.rglob("*"))
    assert f"{out} holds this run, finished after 5 steps: nothing is left" in planned(
        project, capsys, max_train_steps=5
    )
    longer = planned(project, capsys, max_train_steps=9)
    assert f"continues the run in {out} from its newest state (net-state)" in longer
    assert f"a new run in {out}-2\n" in planned(project, capsys, fresh=True)
    assert project.train(network_dim=8, dry_run=True) == 2
    assert "holds another run" in capsys.readouterr().err
    assert sorted((path, path.stat().st_mtime_ns) for path in out.rglob("*")) == before


def test_the_plan_says_what_is_measured_saved_and_shown(cached, tmp_path, capsys):
    """Everything that the run will leave, and when."""
    project = Project(cached.root, cached.base, held_out=0.3, settings={"output_dir": tmp_path / "out"})
    said = planned(
        project, capsys, validate_every_n_steps=2, validation_generate=1, save_best=True, early_stop_patience=3,
        use_ema=True, save_state_on_train_end=True, save_every_n_steps=1, save_last_n_steps=5,
        checkpoints_total_limit=2, report_html=True, report_to="tensorboard",
    )  # fmt: skip
    for words in (
        "validation: 2 held-out items, every 2 steps and at the end; 1 of them painted and scored; the best loss saved"
        " as net-best.safetensors; stops after 3 measurements without a better loss",
        "net.safetensors, net-ema.safetensors, a state at the end",
        "kept of them: networks of the last 5 steps, states of the last 5 steps, at most 2 states",
        "shown in: metrics.jsonl, report.html, tensorboard",
        "optimizer: AdamW, learning rate 0.001, constant",
        "32 text tokens",
    ):
        assert words in said, (words, said)
    assert "validation: none" in planned(Project(cached.root, cached.base), capsys, output_dir=tmp_path / "x")


def test_the_plan_refuses_what_is_not_there(project, capsys, monkeypatch):
    """A tracker that is not installed; an upload without a token."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for keys, words in (({"report_to": "comet_ml"}, "pip install comet_ml"), ({"push_to_hub": True}, "needs a token")):
        assert project.train(**keys, dry_run=True) == 2
        assert words in capsys.readouterr().err


def test_prompts_of_another_run_do_not_change_this_one(base, tmp_path):
    """Cached meanwhile on the same data: the run goes on."""
    project = make_project(tmp_path, base)
    assert project.train(max_train_steps=2, save_state_on_train_end=True) == 0
    asked = Project(tmp_path, base, settings={"validation_prompt": "make it red;make it blue"})
    asked.cache()
    assert project.train(max_train_steps=3) == 0
