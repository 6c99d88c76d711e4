"""Options whose effect is a file, a number or a refusal rather than another network. One test for each, by its name."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.seed_options.bench import Bench, Outcome
from tests.tiny import tiny_base

Run = Callable[..., Outcome]
PREVIEWS = (
    "--validation_prompt=red --validation_image={source}/0.png --validation_width=64 --validation_height=64 "
    "--sample_steps=1"
)
WITHOUT_PROMPT = "--validation_image={source}/0.png --validation_width=64 --validation_height=64 --sample_steps=1"


@pytest.fixture
def run(bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Cache and train in a folder of its own for each call."""
    count = iter(range(100))

    def call(words: str, common: str = "", **options: object) -> Outcome:
        return bench.run(tmp_path / f"run{next(count)}", words, common, capsys=capsys, **options)

    return call


def test_output_dir(run: Run, tmp_path: Path) -> None:
    for name in ("here", "there"):
        assert "last.safetensors" in run(f"--output_dir={tmp_path / name}").files
    assert {path.name for path in tmp_path.iterdir()} == {"here", "there"}


def test_logging_dir_and_report_to(run: Run) -> None:
    logged = run("--report_to=tensorboard --logging_dir=logs")
    elsewhere = run("--report_to=tensorboard --logging_dir=boards")
    assert any(name.startswith("logs/") for name in logged.files)
    assert any(name.startswith("boards/") for name in elsewhere.files)
    assert not any("events" in name for name in run("--report_to=none").files)
    assert "report_to" in run("--report_to=tensorbord").messages


def test_max_train_steps(run: Run) -> None:
    assert [run(f"--max_train_steps={steps}").steps for steps in (1, 3)] == [1, 3]


def test_num_train_epochs_and_repeats(run: Run) -> None:
    """Five items in buckets of three and two make three batches of at most two."""
    assert [run(f"--num_train_epochs={epochs}").steps for epochs in (1, 2)] == [3, 6]
    assert run("--repeats=2", "--num_train_epochs=1").steps > 3


def test_checkpointing_steps(run: Run) -> None:
    states = [run(f"--checkpointing_steps={steps}", "--max_train_steps=4").files for steps in (1, 2)]
    counts = [len({name for name in files if re.fullmatch(r"[^/]*-step\d+-state", name)}) for files in states]
    assert counts[0] > counts[1] > 0


def test_checkpoints_total_limit(run: Run) -> None:
    common = "--checkpointing_steps=1 --max_train_steps=4"
    states = [
        {name for name in run(words, common).files if re.fullmatch(r"[^/]*-state", name)}
        for words in ("--checkpoints_total_limit=1", "--checkpoints_total_limit=2", "")
    ]
    assert [len(names) for names in states[:2]] == [1, 2]
    assert len(states[2]) > 2


def test_resume_from_checkpoint(run: Run, tmp_path: Path) -> None:
    begun = run(f"--output_dir={tmp_path / 'begun'}", "--checkpointing_steps=1 --max_train_steps=2")
    state = next(name for name in sorted(begun.files) if re.fullmatch(r"[^/]*-step0*1-state", name))
    whole = run("", "--checkpointing_steps=1 --max_train_steps=3")
    resumed = run(f"--resume_from_checkpoint={begun.folder / state}", "--checkpointing_steps=1 --max_train_steps=3")
    assert resumed.trained == 0, resumed.messages
    assert [line["step"] for line in resumed.metrics] == [2, 3]
    assert resumed.network == whole.network
    missing = run("--resume_from_checkpoint=latest")
    assert missing.trained == 0 and missing.metrics[0]["step"] == 1, "the flag may always be on"


def test_upcast_before_saving(run: Run) -> None:
    common = "--mixed_precision=bf16"
    assert run("--upcast_before_saving", common).dtypes == {"F32"}
    assert "BF16" in run("--upcast_before_saving=false", common).dtypes


def test_train_embedder(run: Run) -> None:
    assert any("img_in" in name for name in run("--train_embedder").names)
    assert not any("img_in" in name for name in run("--train_embedder=false").names)


def test_train_text_encoder(run: Run) -> None:
    assert any(name.startswith("lora_te1_") for name in run("--train_text_encoder").names)
    assert not any(name.startswith("lora_te1_") for name in run("--train_text_encoder=false").names)


def test_cache_latents(run: Run) -> None:
    assert run("--cache_latents").trained == 0
    refused = run("--cache_latents=false")
    assert refused.cached == 2 and "the trainer never holds the VAE encoder" in refused.messages


def test_local_rank(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert run("--local_rank=-1").trained == 0
    assert "LOCAL_RANK" not in os.environ
    assert run("--local_rank=0").trained == 0
    assert os.environ["LOCAL_RANK"] == "0"
    monkeypatch.delenv("LOCAL_RANK")


def test_allow_tf32(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for words, expected in (("--allow_tf32", True), ("--allow_tf32=false", False)):
        assert run(words).trained == 0
        assert torch.backends.cuda.matmul.allow_tf32 is expected


def test_gradient_checkpointing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same network, but the blocks run once more in the backward pass."""
    from library.memory import runner

    calls: list[object] = []
    original = runner.run_checkpointed
    monkeypatch.setattr(runner, "run_checkpointed", lambda *given: (calls.append(None), original(*given))[1])
    plain = run("--gradient_checkpointing=false")
    assert not calls
    checkpointed = run("--gradient_checkpointing")
    assert calls
    first, second = (load_file(outcome.folder / "last.safetensors") for outcome in (plain, checkpointed))
    assert all(torch.allclose(first[name], second[name], atol=1e-5) for name in first)


def test_dataloader_num_workers(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """More batches are read ahead; what is trained stays the same."""
    from library.training import data

    ahead: list[int] = []
    original = data.prefetched
    monkeypatch.setattr(
        data, "prefetched", lambda load, order, count: (ahead.append(count), original(load, order, count))[1]
    )
    outcomes = [run(f"--dataloader_num_workers={count}") for count in (0, 6)]
    assert ahead[0] < ahead[-1] == 6
    assert outcomes[0].network == outcomes[1].network


def test_validation_prompt_and_validation_steps(run: Run) -> None:
    every = [run(f"--validation_steps={steps}", PREVIEWS).pictures for steps in (1, 2)]
    assert len(every[0]) > len(every[1]) > 0
    assert run("", "--sample_steps=1").pictures == []
    two = run("--validation_prompt=red,~round;blue", f"{WITHOUT_PROMPT} --max_train_steps=1").pictures
    assert len(two) == 2 and two[0].read_bytes() != two[1].read_bytes()


def test_validation_image(run: Run) -> None:
    words = PREVIEWS.replace("--validation_image={source}/0.png", "")
    one, other = (run(f"--validation_image={{source}}/{name}.png", words).pictures[-1] for name in "02")
    assert one.read_bytes() != other.read_bytes()


def test_validation_mask(run: Run) -> None:
    common = f"{PREVIEWS} --mode=mask --mask_data_dir={{masks}} --no:target_data_dir"
    one, other = (run(f"--validation_mask={{{name}}}/0.png", common).pictures[-1] for name in ("masks", "masks_b"))
    assert one.read_bytes() != other.read_bytes()


def test_validation_width_and_validation_height(run: Run) -> None:
    words = re.sub(r"--validation_(width|height)=64", "", PREVIEWS)
    for width, height in ((96, 64), (64, 96)):
        size = f"--validation_width={width} --validation_height={height} --validation_image={{source}}/0.png"
        made = run(size, words.replace("--validation_image={source}/0.png", "")).pictures
        assert Image.open(made[-1]).size == (width, height)


def test_num_validation_images(run: Run) -> None:
    assert [len(run(f"--num_validation_images={count}", PREVIEWS).pictures) for count in (1, 2)] == [1, 2]


CLASS = "--with_prior_preservation --class_prompt=circle --sample_steps=1 --max_train_steps=1"


def test_num_class_images(run: Run, tmp_path: Path) -> None:
    for count in (1, 2):
        folder = tmp_path / f"class{count}"
        folder.mkdir()
        assert run(f"--num_class_images={count}", f"{CLASS} --class_data_dir={folder}").cached == 0
        assert len(list(folder.glob("*.png"))) == count


def test_sample_batch_size(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same pictures, painted so many at once."""
    from library.caching import class_images

    sizes: list[int] = []
    original = class_images.initial_noise
    monkeypatch.setattr(
        class_images, "initial_noise", lambda seeds, *rest: (sizes.append(len(seeds)), original(seeds, *rest))[1]
    )
    for size in (1, 3):
        folder = tmp_path / f"class{size}"
        folder.mkdir()
        run(f"--sample_batch_size={size}", f"{CLASS} --num_class_images=3 --class_data_dir={folder}", train=False)
    assert sizes == [1, 1, 1, 3]


def test_prior_generation_precision(run: Run, tmp_path: Path) -> None:
    pictures = []
    for precision in ("fp32", "bf16"):
        folder = tmp_path / precision
        folder.mkdir()
        words = f"{CLASS} --num_class_images=1 --class_data_dir={folder}"
        assert run(f"--prior_generation_precision={precision}", words, train=False).cached == 0
        pictures += [path.read_bytes() for path in folder.glob("*.png")]
    assert len(pictures) == 2 and pictures[0] != pictures[1]


def hub_folder(folder: Path, **revisions: Path) -> Path:
    """A hub's download folder with one repository, owner/base, in several revisions."""
    repository = folder / "models--owner--base"
    (repository / "refs").mkdir(parents=True)
    for number, (name, base) in enumerate(revisions.items()):
        commit = f"{number:040x}"
        (repository / "refs" / name).write_text(commit)
        shutil.copytree(base, repository / "snapshots" / commit)
    return folder


@pytest.fixture(scope="session")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("bases") / "other", seed=9)


def test_pretrained_model_name_or_path(run: Run, bench: Bench, other_base: Path) -> None:
    one, other = (run(f"--pretrained_model_name_or_path={base}") for base in (bench.base, other_base))
    assert one.network != other.network


def test_revision_and_cache_dir(run: Run, bench: Bench, other_base: Path, tmp_path: Path) -> None:
    hub = hub_folder(tmp_path / "hub", main=bench.base, other=other_base)
    common = "--pretrained_model_name_or_path=owner/base --max_sequence_length=32"
    found = [run(words, f"{common} --cache_dir={hub}") for words in ("--revision=main", "--revision=other")]
    assert [outcome.trained for outcome in found] == [0, 0], found[0].messages
    assert found[0].network != found[1].network
    nowhere = run(f"--cache_dir={tmp_path / 'empty'}", common)
    assert nowhere.cached == 2 and "owner/base" in nowhere.messages


def test_variant(run: Run, bench: Bench, other_base: Path, tmp_path: Path) -> None:
    base = shutil.copytree(bench.base, tmp_path / "two")
    name = "transformer/diffusion_pytorch_model"
    shutil.copy(other_base / f"{name}.safetensors", base / f"{name}.fp16.safetensors")
    plain, half = (run(words, f"--pretrained_model_name_or_path={base}") for words in ("", "--variant=fp16"))
    assert plain.network != half.network


def test_the_resolved_configuration_names_the_options_origin(run: Run) -> None:
    """The seed's spelling is kept as the origin, so that a user finds back what they wrote."""
    outcome = run("--rank=2 --checkpointing_steps=50")
    text = (outcome.folder / "config.resolved.toml").read_text(encoding="utf-8")
    assert "network_dim = 2  # --rank" in text and "save_every_n_steps = 50  # --checkpointing_steps" in text
    assert json.dumps(str(outcome.folder)) in text
