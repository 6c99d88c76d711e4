"""The ready-made configurations for FLUX.1 Fill: each fits the card in its name, says what it needs, and runs."""

import re
from pathlib import Path

import pytest
import torch

from library.config import load
from library.forecast import PRECISION_NAMES, work_of
from library.models import budget, cost
from library.models.checkpoint_file import TransformerFile
from library.models.cost import GB
from library.models.setup import load as load_model
from library.models.setup import set_up_training
from library.models.shape import FluxShape
from library.networks import build
from tests.models.test_flux import inputs
from tests.tiny import tiny_transformer

FOLDER = Path(__file__).resolve().parents[2] / "config_examples"
EXAMPLES = sorted(FOLDER.glob("fill_edit_*gb*.toml"))
SAID = re.compile(
    r"# Predicted: ([\d.]+) GB of VRAM \((?:([\d.]+) GB while a preview is made|no more for previews)\),"
    r" ([\d.]+) GB of RAM,\n# ([\d.]+) s per step and ([\d.]+) hours on a (.+?)\. Not measured"
)


def test_there_is_one_for_every_card() -> None:
    sizes = {re.match(r"fill_edit_(\d+)gb", path.stem)[1] for path in EXAMPLES}
    assert sizes == {"4", "6", "8", "12", "16", "24"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_fits_its_name_and_says_what_it_needs(path) -> None:
    run = load(["--config_file", str(path)], "train")
    shape = FluxShape()
    work = work_of(run.with_values("sampling", "test", sample_items=0), shape)
    shown = work_of(run, shape)
    assert work.preview is None and shown.preview is not None, "an example that promises previews makes them"
    setting = budget.setting_of(run.memory, shape, PRECISION_NAMES[run.training.mixed_precision])
    vram, ram = cost.training_vram(shape, setting, work).total, cost.training_ram(shape, setting, work).total
    most = cost.training_vram(shape, setting, shown).total
    card_gb = int(re.match(r"fill_edit_(\d+)gb", path.stem)[1])
    assert most / GB <= 0.93 * card_gb * 1.024**3, "the desktop needs some of the card too"
    said = SAID.search(path.read_text(encoding="utf-8"))
    seconds = (
        cost.step_seconds(shape, setting, work, cost.card_named(said[6])) * run.training.gradient_accumulation_steps
    )
    hours = seconds * run.training.max_train_steps / 3600
    needs = [vram / GB, most / GB, ram / GB, seconds, hours]
    told = [float(number) for number in (said[1], said[2] or said[1], *said.groups()[2:5])]
    assert told == pytest.approx(needs, abs=0.051)
    if path.stem.endswith("16gb_ram"):
        locked = cost.training_ram(shape, setting, work).parts["streamed blocks (page-locked)"]
        assert ram <= 12 * GB and locked <= 6 * GB


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_its_network_and_memory_settings_train(path, tmp_path) -> None:
    run = load(["--config_file", str(path)], "train")
    tiny_transformer(double=2, single=4).save_pretrained(tmp_path)
    model = load_model(TransformerFile.open(tmp_path), dtype=torch.bfloat16, memory=run.memory)
    set_up_training(model, run.memory)
    parameters = build(run.network, model).attach()
    output = model(**inputs(run.datasets[0].train_batch_size, torch.bfloat16))
    output.float().square().mean().backward()
    assert all(parameter.grad is not None for parameter in parameters)
    assert any(parameter.grad.abs().sum() > 0 for parameter in parameters)
