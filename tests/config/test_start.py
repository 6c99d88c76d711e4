"""The scripts: exit codes, one plain message, and nothing heavy imported before it is needed."""

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from library.config import Run
from library.errors import ConfigError, DataError, NonFiniteError, OutOfMemory, Stopped, UserError
from library.start import run_command

ROOT = Path(__file__).parents[2]
SCRIPTS = ("influx_cache.py", "influx_train.py", "influx_infer.py")
HEAVY = ("torch", "diffusers", "transformers", "accelerate", "PIL", "numpy")


def python(code: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter in the repository."""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        timeout=120,
    )


def in_script(script: str, *argv: str) -> str:
    """Code that runs a script and then prints which heavy packages came in."""
    return (
        f"import runpy, sys\nsys.argv = {[script, *argv]!r}\n"
        f"try:\n    runpy.run_path({str(ROOT / script)!r}, run_name='__main__')\n"
        f"finally:\n    print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])\n"
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_imports_nothing_heavy(script: str) -> None:
    done = python(in_script(script, "--help"))
    assert done.returncode == 0, done.stderr
    assert "HEAVY []" in done.stdout
    assert "[model]" in done.stdout and "--pretrained_model_name_or_path" in done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_configuration_error_imports_nothing_heavy(script: str) -> None:
    done = python(in_script(script, "--rnak", "4"))
    assert done.returncode == 2
    assert "HEAVY []" in done.stdout
    assert "error: " in done.stderr and "--rnak: there is no key rnak. Did you mean rank?" in done.stderr
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback() -> None:
    done = python(in_script("influx_train.py", "--rnak", "4", "--debug"))
    assert done.returncode == 2
    assert "Traceback" in done.stderr and "ConfigError" in done.stderr


def test_help_costs_less_than_a_second_of_work() -> None:
    """Processor time, which a busy machine does not change; what help takes on the clock is in benchmarks/."""
    before = os.times()
    subprocess.run([sys.executable, str(ROOT / "influx_train.py"), "--help"], capture_output=True, check=True)
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    assert spent < 1.0, spent


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_never_imports_torch(script: str, tmp_path: Path) -> None:
    for name, colour in (("source", "red"), ("target", "blue")):
        (tmp_path / name).mkdir()
        Image.new("RGB", (64, 64), colour).save(tmp_path / name / "a.png")
    words = [
        "--dry_run", f"--pretrained_model_name_or_path={ROOT / 'nano'}", f"--image_dir={tmp_path / 'source'}",
        f"--target_dir={tmp_path / 'target'}", "--mode=edit", "--instance_prompt=fill", "--resolution=64",
        "--max_train_steps=2", f"--output_dir={tmp_path / 'out'}", f"--image={tmp_path / 'source/a.png'}",
        "--prompt=fill", "--lora=none",
    ]  # fmt: skip
    words = [word for word in words if script == "influx_infer.py" or not word.startswith(("--prompt", "--lora"))]
    done = python(in_script(script, *words))
    heavy = re.findall(r"HEAVY \[.*\]", done.stdout)
    assert heavy and "torch" not in heavy[-1], (done.stdout, done.stderr)
    assert done.returncode in ((0, 2) if script == "influx_train.py" else (0,)), done.stderr
    assert "Traceback" not in done.stderr


def test_help_shows_only_what_the_command_reads() -> None:
    helps = {script: python(in_script(script, "--help")).stdout for script in SCRIPTS}
    assert "--learning_rate " not in helps["influx_cache.py"] + helps["influx_infer.py"]
    assert "--cache_workers " not in helps["influx_train.py"]
    assert "--lora, " not in helps["influx_train.py"] and "--inference_mode, --mode " in helps["influx_infer.py"]


def test_help_about_one_thing(capsys: pytest.CaptureFixture[str]) -> None:
    for words, inside, outside in (
        (["--help", "optimizer"], "--learning_rate", "--network_dim"),
        (["--help", "[network]"], "--network_dim, --rank", "--learning_rate "),
        (["--help", "rank"], "--network_dim, --rank", "--learning_rate"),
        (["-h", "checkpointing_steps"], "Save the network and the state every N steps", "--network_dim"),
        (["--help", "rnak"], "Did you mean rank?", "--network_dim"),
    ):
        assert run_command("train", lambda run: 1, words) == 0
        shown = capsys.readouterr().out
        assert inside in shown and outside not in shown, words


def test_help_into_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} influx_train.py --help | head -c 10; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


def test_messages_survive_a_terminal_that_knows_no_unicode(tmp_path: Path) -> None:
    done = python(in_script("influx_train.py", "--größe", "4"), LANG="C", LC_ALL="C", PYTHONIOENCODING="ascii")
    assert done.returncode == 2 and "gr\\xf6\\xdfe" in done.stderr


class OutOfMemoryError(RuntimeError):
    """Named as torch's own, which cannot be imported here."""


def raising(error: BaseException) -> Callable[[Run], None]:
    def job(run: Run) -> None:
        raise error

    return job


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("x"), 2, "x"),
        (ConfigError("x"), 2, "x"),
        (DataError("x"), 2, "x"),
        (NonFiniteError("x"), 3, "x"),
        (OutOfMemory("x"), 4, "x"),
        (OutOfMemoryError("CUDA out of memory"), 4, "CUDA out of memory. Try a smaller resolution"),
        (MemoryError(), 4, "out of memory: RAM"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 5, "/x/y: No space left on device."),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 5, "/x: Permission denied."),
        (Stopped("saved", 130), 130, "saved"),
        (Stopped("saved", 143), 143, "saved"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C"),
    ],
)
def test_errors_become_exit_codes_and_one_message(
    error: BaseException, code: int, message: str, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--pretrained_model_name_or_path", "a/b", "--image", str(images)]
    assert run_command("infer", raising(error), words) == code
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and "Traceback" not in err


def test_our_own_mistakes_keep_their_traceback(images: Path) -> None:
    words = ["--pretrained_model_name_or_path", "a/b", "--image", str(images)]
    for error in (RuntimeError("x"), ValueError("x"), KeyError("x")):
        with pytest.raises(type(error)):
            run_command("infer", raising(error), words)


def test_a_job_gets_the_frozen_run_and_gives_the_exit_code(images: Path) -> None:
    words = ["--pretrained_model_name_or_path", "a/b", "--image", str(images)]
    seen: list[Run] = []
    assert run_command("infer", seen.append, words) == 0
    assert seen[0].inference.image == images
    assert run_command("infer", lambda run: 1, words) == 1


def test_local_rank_fills_the_environment_and_gives_way_to_the_launcher(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--pretrained_model_name_or_path", "a/b", "--image", str(images)]
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    run_command("infer", lambda run: 0, words)
    assert "LOCAL_RANK" not in os.environ
    monkeypatch.setenv("LOCAL_RANK", "3")
    run_command("infer", lambda run: 0, [*words, "--local_rank", "1"])
    assert os.environ["LOCAL_RANK"] == "3"
    monkeypatch.delenv("LOCAL_RANK")
    run_command("infer", lambda run: 0, [*words, "--local_rank=1"])
    assert os.environ["LOCAL_RANK"] == "1"
    monkeypatch.delenv("LOCAL_RANK")


def test_a_hub_token_is_there_for_downloads_too(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--pretrained_model_name_or_path", "a/b", "--image", str(images), "--hub_token", "hf_x"]
    for before, after in ((None, "hf_x"), ("hf_own", "hf_own")):
        monkeypatch.setenv("HF_TOKEN", before or "")
        if before is None:
            monkeypatch.delenv("HF_TOKEN")
        assert run_command("infer", lambda run: 0, words) == 0
        assert os.environ["HF_TOKEN"] == after


def test_keys_that_cannot_act_are_warned_about(images: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = ["--pretrained_model_name_or_path", "a/b", "--image_dir", str(images), "--mode=spatial", "--logit_mean=1"]
    assert run_command("train", lambda run: 0, words) == 0
    assert "warning: --logit_mean: logit_mean does nothing here: it acts only with weighting_scheme" in caplog.text
