"""N steps equal k steps, a state folder and N - k more, bit for bit; and what may change on the way."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.data.cached import open_cache
from library.tensorfile import data_hash
from library.training import state
from tests.training.project import Project, make_pairs

STEPS = 7  # of batches: 7 items in two buckets make 4 batches of two an epoch
CASES = {
    "adamw": ({}, 3),
    "adamw8bit-accumulation": ({"optimizer_type": "AdamW8bit", "gradient_accumulation_steps": 3}, 2),
    "paged-epoch-edge": ({"optimizer_type": "PagedAdamW8bit"}, 4),
    "paged32-dropout": ({"optimizer_type": "PagedAdamW", "network_dropout": 0.3}, 5),
    "lion-ema": ({"optimizer_type": "Lion", "use_ema": True}, 3),
    "lion8bit-fp16": ({"optimizer_type": "Lion8bit", "mixed_precision": "fp16"}, 3),
    "pagedlion-checkpointing": ({"optimizer_type": "PagedLion8bit", "gradient_checkpointing": True}, 1),
    "prodigy-two-rates": (
        {"optimizer_type": "Prodigy", "learning_rate": 1.0, "train_x_embedder": True, "x_embedder_lr": 0.5}, 3,
    ),
    "adafactor-cosine": ({"optimizer_type": "Adafactor", "lr_scheduler": "cosine", "lr_warmup_steps": 2}, 3),
    "schedulefree-ema": ({"optimizer_type": "AdamWScheduleFree", "use_ema": True, "ema_cpu": True}, 3),
    "schedulefree-sgd": ({"optimizer_type": "SGDScheduleFree", "save_every_n_steps": 2}, 4),
    "schedulefree-radam": ({"optimizer_type": "RAdamScheduleFree", "rank_dropout": 0.3}, 5),
    "sgd-full-bf16": ({"optimizer_type": "SGD", "full_bf16": True, "mixed_precision": "bf16"}, 3),
    "adamw-full-bf16-ema": ({"full_bf16": True, "mixed_precision": "bf16", "use_ema": True}, 5),
    "schedulefree-full-bf16": (
        {"optimizer_type": "AdamWScheduleFree", "full_bf16": True, "mixed_precision": "bf16"}, 3,
    ),
    "schedulefree-sgd-full-bf16-ema": (
        {"optimizer_type": "SGDScheduleFree", "full_bf16": True, "mixed_precision": "bf16", "use_ema": True}, 2,
    ),
    "schedulefree-radam-full-bf16": (
        {"optimizer_type": "RAdamScheduleFree", "full_bf16": True, "mixed_precision": "bf16"}, 5,
    ),
    "dotted-module-dropout": ({"optimizer_type": "torch.optim.NAdam", "module_dropout": 0.3}, 3),
    "workers-rex-accumulation": (
        {"dataloader_num_workers": 3, "lr_scheduler": "rex", "gradient_accumulation_steps": 2}, 3,
    ),
    "stratified-guidance": ({"stratified_timesteps": True, "guidance_scale_range": "1;4"}, 3),
    "split-loraplus-huber": ({"network_layout": "split", "loraplus_lr_ratio": 4.0, "loss_type": "huber"}, 3),
}  # fmt: skip


@pytest.fixture
def dropping(cached, tmp_path) -> Project:
    """A project that drops captions."""
    subset = "caption_dropout_rate = 0.5"
    return Project(cached.root, cached.base, subset=subset, settings={"output_dir": tmp_path / "out"})


@pytest.mark.parametrize("case", CASES)
def test_resuming_is_bit_identical(dropping, tmp_path, case):
    """The network's tensors, its average, and the whole final state."""
    resumes_bit_for_bit(dropping, tmp_path, *CASES[case])


@pytest.fixture(scope="module")
def varied(tmp_path_factory, base) -> Project:
    """A project whose items have variants: mirrored, cropped in several ways, captions shuffled."""
    root = tmp_path_factory.mktemp("varied")
    make_pairs(root)
    for path in (root / "source").glob("*.txt"):
        path.write_text(path.read_text() + ", in oil, at night, by the sea")
    subset = "flip_aug = true\nrandom_crop = true\ncrop_variants = 3\nshuffle_caption = true\ncaption_variants = 3"
    return Project(root, base, subset=subset, settings={"bucket_reso_steps": 32}).cache()


VARIANT_CASES = {
    "variants": ({}, 3),
    "variants-accumulation-workers": ({"gradient_accumulation_steps": 2, "dataloader_num_workers": 3}, 2),
    "variants-edge-of-an-epoch": ({"use_ema": True}, 4),
}


@pytest.mark.parametrize("case", VARIANT_CASES)
def test_resuming_draws_the_same_flips_crops_and_captions(varied, tmp_path, case):
    """The variants of an item that a step sees are drawn as if nothing had happened in between."""
    resumes_bit_for_bit(varied, tmp_path, *VARIANT_CASES[case])
    drawn = open_cache(varied.run(dataset_cache_dir=varied.root / "cache"))
    try:
        seen = {}
        for position in range(40):
            batch = drawn.batch(position)
            for key, caption, mean in zip(batch.item_keys, batch.captions, batch.mean):
                pictures, captions = seen.setdefault(key, (set(), set()))
                pictures.add(mean.sum().item())
                captions.add(caption)
        assert max(len(pictures) for pictures, _ in seen.values()) > 2, "flips and crops were drawn"
        assert max(len(captions) for _, captions in seen.values()) > 1, "captions were drawn"
    finally:
        drawn.close()


def resumes_bit_for_bit(dropping: Project, tmp_path: Path, options: dict, k: int) -> None:
    """A run that is killed right after it saved step k, and goes on, ends as one that was not."""
    options = {"save_state_on_train_end": True, "save_every_n_steps": k, **options}
    assert dropping.train(output_dir=tmp_path / "whole", max_train_steps=STEPS, **options) == 0
    half = tmp_path / "half"
    shutil.copytree(tmp_path / "whole", half)
    for path in half.iterdir():  # as a kill right after the save of step k leaves it
        if path.name.startswith("net") and path.name != f"net-step{k:08d}-state":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    record = json.loads((half / "run.json").read_text())
    (half / "run.json").write_text(json.dumps({**record, "finished_steps": None, "finished_epochs": None}))
    assert dropping.train(output_dir=half, max_train_steps=STEPS, **options) == 0

    whole, again = (state.load(tmp_path / name / "net-state") for name in ("whole", "half"))
    assert again.scalars["progress"] == whole.scalars["progress"]
    assert again.scalars["optimizer"] == whole.scalars["optimizer"]
    for part in whole.tensors:
        for name, tensor in whole.tensors[part].items():
            assert torch.equal(again.tensors[part][name], tensor), f"{part}: {name}"
    for file in sorted((tmp_path / "whole").glob("net*.safetensors")):
        if (half / file.name).exists():
            a, b = load_file(file), load_file(half / file.name)
            assert all(torch.equal(a[name], b[name]) for name in a), file.name
    lines = [[json.loads(line) for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()] for n in
             ("whole", "half")]  # fmt: skip
    strip = [[{k: v for k, v in line.items() if k != "seconds"} for line in each] for each in lines]
    assert strip[0] == strip[1]


def test_the_same_command_again_continues_then_stops(project, tmp_path, caplog):
    """An unfinished run goes on; a finished one says so; a longer one goes on from its last state."""
    options = {"save_state_on_train_end": True}
    assert project.train(max_train_steps=2, **options) == 0
    assert project.train(max_train_steps=2, **options) == 0
    assert "nothing is left to do" in caplog.text
    assert "starts again" not in caplog.text
    assert project.train(max_train_steps=5, **options) == 0
    assert "continuing" in caplog.text
    whole = tmp_path / "whole"
    assert project.train(output_dir=whole, max_train_steps=5, **options) == 0
    a, b = (load_file(folder / "net.safetensors") for folder in (tmp_path / "out", whole))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_finished_run_is_made_longer_as_its_message_says(project, tmp_path, caplog):
    """Without a key beyond the ones it names: the end has a state, and the result is that of one long run."""
    assert project.train(max_train_steps=2) == 0
    assert project.train(max_train_steps=2) == 0
    assert "Raise max_train_steps" in caplog.text
    assert project.train(max_train_steps=5) == 0
    assert "step 2, epoch 0" in caplog.text
    assert project.train(output_dir=tmp_path / "whole", max_train_steps=5) == 0
    assert data_hash(tmp_path / "out/net.safetensors") == data_hash(tmp_path / "whole/net.safetensors")
    steps = [json.loads(line)["step"] for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("finished", [True, False])
def test_nothing_is_overwritten_where_no_state_was_saved(project, tmp_path, capsys, finished):
    """A folder with networks and without a state is refused, with the way on; the way works."""
    out, options = tmp_path / "out", {"save_state": False, "save_every_n_steps": 2}
    assert project.train(**options) == 0
    if not finished:  # as a kill after the save of step 2 leaves it
        record = json.loads((out / "run.json").read_text())
        (out / "run.json").write_text(json.dumps({**record, "finished_steps": None}))
        (out / "net.safetensors").unlink()
    before = {path.name: path.read_bytes() for path in out.glob("net*")} | {"m": (out / "metrics.jsonl").read_bytes()}
    assert project.train(**options, max_train_steps=5) == 2
    error = capsys.readouterr().err
    assert "--fresh" in error and "network_weights" in error
    assert {p.name: p.read_bytes() for p in out.glob("net*")} | {"m": (out / "metrics.jsonl").read_bytes()} == before
    newest = "net.safetensors" if finished else "net-step00000002.safetensors"
    assert str(out / newest) in error
    assert project.train(**options, max_train_steps=5, fresh=True, network_weights=out / newest) == 0
    assert (tmp_path / "out-2/net.safetensors").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"network_dim": 8}, "network_dim: 4 -> 8"),
        ({"seed": 8}, "seed: 7 -> 8"),
        ({"loss_type": "l1"}, "loss_type: l2 -> l1"),
        ({"network_targets": "attn"}, "network_targets: blocks -> attn"),
        ({"optimizer_type": "Lion"}, "optimizer_type: AdamW -> Lion"),
    ],
)
def test_another_run_in_the_folder_is_refused(project, tmp_path, capsys, changed, message):
    """Old and new value are named, nothing is touched, and --fresh starts beside it."""
    assert project.train() == 0
    before = (tmp_path / "out/net.safetensors").read_bytes()
    assert project.train(**changed) == 2
    error = capsys.readouterr().err
    assert message in error.replace('"', "")
    assert "--fresh" in error
    assert (tmp_path / "out/net.safetensors").read_bytes() == before
    assert project.train(**changed, fresh=True) == 0
    assert (tmp_path / "out-2/net.safetensors").exists()


def test_what_may_change_when_continuing(project, tmp_path, caplog):
    """Rates, length, saving, previews and memory settings."""
    assert project.train(max_train_steps=2, save_state_on_train_end=True) == 0
    assert project.train(
        max_train_steps=4, learning_rate=5e-4, save_every_n_steps=3, gradient_checkpointing=True, lr_scheduler="linear"
    ) == 0  # fmt: skip
    assert "step 2, epoch 0" in caplog.text
    assert (tmp_path / "out/net-step00000003.safetensors").exists()


def test_precisions_may_change_with_a_warning(project, tmp_path, caplog):
    """As the advice after NaN or without memory says; twice the same is no change any more."""
    options = {"mixed_precision": "fp16", "save_every_n_steps": 1}
    assert project.train(max_train_steps=2, **options) == 0
    changed = {"mixed_precision": "bf16", "base_precision": "int8", "save_every_n_steps": 1}
    assert project.train(max_train_steps=3, **changed) == 0
    assert 'base_precision: not set -> "int8"; mixed_precision: "fp16" -> "bf16"' in caplog.text
    assert "continuing" in caplog.text
    assert state.load(tmp_path / "out/net-state").scalars["loss_scale"] is None
    caplog.clear()
    assert project.train(max_train_steps=4, **changed) == 0
    assert "another precision" not in caplog.text
    assert project.train(max_train_steps=5, **options) == 0
    assert state.load(tmp_path / "out/net-state").scalars["loss_scale"][0] > 1


def test_previews_may_change_when_continuing(cached, tmp_path):
    """Other prompts need the caching command again; what is trained on is the same."""
    from library import caching
    from library.start import run_command

    prompts = {"validation_prompt": "make it red", "validation_image": cached.root / "source/0.png"}
    folders = {"dataset_cache_dir": tmp_path / "cache", "output_dir": tmp_path / "out"}
    project = Project(cached.root, cached.base, settings={**folders, **prompts, "sample_at_end": False})
    project.cache()
    assert project.train(max_train_steps=2) == 0
    changed = {"validation_prompt": "a quite different one", "validation_width": 32, "validation_height": 32}
    assert run_command("cache", caching.run, project.words("unused", **changed)) == 0
    assert project.train(max_train_steps=3, **changed) == 0


def test_resume_names_a_state_or_the_latest(project, tmp_path, capsys, caplog):
    """By path, by name in the folder, `latest`; what is not there or damaged is a plain error."""
    options = {"max_train_steps": 4, "save_every_n_steps": 1}
    assert project.train(**options) == 0
    out = tmp_path / "out"
    for number, name in enumerate(["net-step00000002-state", str(out / "net-step00000002-state")]):
        assert project.train(**options, output_dir=tmp_path / f"by{number}", resume_from_checkpoint=out / name) == 0
        a, b = load_file(out / "net.safetensors"), load_file(tmp_path / f"by{number}/net.safetensors")
        assert all(torch.equal(a[n], b[n]) for n in a)
    assert project.train(**options, output_dir=tmp_path / "none", resume="latest") == 0, "a flag that is always on"
    assert "holds no state yet" in caplog.text
    assert project.train(**options, output_dir=tmp_path / "none2", resume=out / "nowhere") == 2
    assert "no such folder" in capsys.readouterr().err
    (out / "net-step00000002-state/network.safetensors").write_bytes(b"damaged")
    assert project.train(**options, output_dir=tmp_path / "bad", resume=out / "net-step00000002-state") == 2
    assert "is damaged" in capsys.readouterr().err
    assert (
        project.train(**options, output_dir=tmp_path / "w", network_dim=2, resume=out / "net-step00000001-state") == 2
    )
    assert "network_dim: 4 -> 2" in capsys.readouterr().err


def test_going_back_is_a_timeline_of_its_own(project, tmp_path, caplog):
    """resume = an early state: taken up once; what came after it is kept aside; a plain rerun follows the new one."""
    out, options = tmp_path / "out", {"save_every_n_steps": 2, "sample_every_n_steps": 2}
    assert project.train(max_train_steps=8, **options) == 0
    old = {path.name: path.read_bytes() for path in out.glob("net-*.safetensors")} | {
        "net.safetensors": (out / "net.safetensors").read_bytes()
    }
    back = {**options, "resume": out / "net-step00000002-state", "learning_rate": 5e-4}
    assert stopped_after(project, 5, max_train_steps=8, **back) == 130
    assert (out / "net-step00000005-state").exists() and not (out / "net-step00000006-state").exists()
    assert not (out / "net.safetensors").exists()
    for name in set(old) - {"net-step00000002.safetensors"}:
        assert (out / "set-aside-1" / name).read_bytes() == old[name]
    assert (out / "set-aside-1/net-state").exists() and (out / "set-aside-1/metrics.jsonl").exists()
    caplog.clear()
    assert stopped_after(project, 7, max_train_steps=8, **back) == 130
    assert "step 5, epoch" in caplog.text, "not from the beginning of the branch"
    caplog.clear()
    assert project.train(max_train_steps=8, **{**options, "learning_rate": 5e-4}) == 0
    assert "step 7, epoch" in caplog.text
    other = {"output_dir": tmp_path / "other", "max_train_steps": 8, **back}
    assert project.train(**other) == 0
    assert data_hash(out / "net.safetensors") == data_hash(tmp_path / "other/net.safetensors")
    assert project.train(max_train_steps=8, **back) == 0
    assert "nothing is left to do" in caplog.text and not (out / "set-aside-2").exists()


def test_a_fresh_run_is_told_how_to_go_on(project, tmp_path, capsys, caplog):
    """Its logs lie in its own folder; the file that the messages name continues it, and inference takes its network."""
    from library import training
    from library.config import load
    from library.start import run_command

    board = {"report_to": "tensorboard"}
    assert project.train(**board) == 0
    logs = sorted(path.name for path in (tmp_path / "out/logs").rglob("*"))
    assert stopped_after(project, 2, **board, fresh=True) == 130
    assert "Run the same command" not in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out/logs").rglob("*")) == logs
    assert list((tmp_path / "out-2/logs").rglob("events*"))
    resolved = ["--config_file", str(tmp_path / "out-2/config.resolved.toml")]
    assert run_command("train", training.run, resolved) == 0
    assert "step 2, epoch" in caplog.text and not (tmp_path / "out-3").exists()
    assert data_hash(tmp_path / "out/net.safetensors") == data_hash(tmp_path / "out-2/net.safetensors")
    run = load([*resolved, "--image", str(project.root / "source/0.png")], "infer")
    assert run.saving.output_dir == tmp_path / "out-2"
    assert project.train(**board, fresh=True) == 0
    assert f"influx_infer.py --config_file {tmp_path / 'out-3/config.resolved.toml'}" in caplog.text


def stopped_after(project, step: int, **options) -> int:
    """A run that is asked to stop after a step."""
    from library.training.conduct import Conduct

    original = Conduct.after_step

    def asking(self, result):
        if self.trained.progress.step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, result)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Conduct, "after_step", asking)
        return project.train(**options)


def test_a_damaged_newest_state_falls_back_to_the_one_before(project, tmp_path, caplog):
    """With a warning; the result is the same."""
    options = {"max_train_steps": 4, "save_every_n_steps": 1}
    assert project.train(output_dir=tmp_path / "whole", **options) == 0
    out = tmp_path / "out"
    assert project.train(**options) == 0
    shutil.rmtree(out / "net-state")
    (out / "net-step00000003-state/optimizer.safetensors").write_bytes(b"")
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**record, "finished_steps": None}))
    assert project.train(**options) == 0
    assert "state left out" in caplog.text
    assert "step 2, epoch" in caplog.text
    a, b = (load_file(folder / "net.safetensors") for folder in (tmp_path / "whole", out))
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_a_drawn_seed_is_written_down_and_is_the_whole_run(dropping, tmp_path):
    """Without a seed one is drawn: data draws have it too, the resolved file says it, and saying it is the same run."""
    from library import training
    from library.start import run_command

    def unseeded(output: str, **keys) -> int:
        words = split.words(output, **keys)
        at = words.index("--seed")
        del words[at : at + 2]
        return run_command("train", training.run, words)

    split = Project(dropping.root, dropping.base, held_out=0.3, subset=dropping.subset, settings=dropping.settings)
    out = tmp_path / "out"
    assert unseeded("out", max_train_steps=2) == 0
    seed = json.loads((out / "run.json").read_text())["seed"]
    assert seed > 0 and f"seed = {seed}  # drawn" in (out / "config.resolved.toml").read_text()
    assert unseeded("out", max_train_steps=6) == 0
    assert json.loads((out / "run.json").read_text())["seed"] == seed
    resolved = ["--config_file", str(out / "config.resolved.toml"), "--output_dir", str(tmp_path / "again")]
    assert run_command("train", training.run, resolved) == 0
    assert data_hash(out / "net.safetensors") == data_hash(tmp_path / "again/net.safetensors")


def test_a_drawn_seed_counts_as_said(dropping, tmp_path, capsys):
    """Another seed is another run, the same is the same."""
    from library import training
    from library.start import run_command

    words = dropping.words("out", max_train_steps=1)
    at = words.index("--seed")
    del words[at : at + 2]
    assert run_command("train", training.run, words) == 0
    seed = json.loads((tmp_path / "out/run.json").read_text())["seed"]
    assert dropping.train(max_train_steps=2, seed=seed + 1) == 2
    assert f"seed: {seed} -> {seed + 1}" in capsys.readouterr().err
    assert dropping.train(max_train_steps=2, seed=seed) == 0
    assert dropping.train(output_dir=tmp_path / "said", max_train_steps=2, seed=seed) == 0
    assert data_hash(tmp_path / "out/net.safetensors") == data_hash(tmp_path / "said/net.safetensors")
