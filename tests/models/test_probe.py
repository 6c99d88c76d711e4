"""The probe runs the largest batch and leaves no trace."""

import pytest
import torch

from library.config.tables import NetworkTable
from library.models.checkpoint_file import TransformerFile
from library.models.load import load_transformer
from library.models.probe import probe_step
from library.networks import build
from tests.tiny import tiny_transformer


def test_it_leaves_no_trace(tmp_path) -> None:
    tiny_transformer().save_pretrained(tmp_path)
    model = load_transformer(TransformerFile.open(tmp_path))
    parameters = build(NetworkTable(network_dim=2), model).attach()
    kept = torch.ones_like(parameters[0])
    parameters[0].grad = kept
    seen = []
    model.img_in.register_forward_hook(lambda module, args, output: seen.append(tuple(args[0].shape)))
    before = torch.get_rng_state()
    assert probe_step(model, width=96, height=64, batch=3, text_length=32) == 0.0
    assert seen == [(3, 24, 384)]
    assert torch.equal(torch.get_rng_state(), before)
    assert parameters[0].grad is kept and torch.equal(kept, torch.ones_like(kept))
    assert all(parameter.grad is None for parameter in parameters[1:])


def test_running_out_shows_at_once(tmp_path, monkeypatch) -> None:
    tiny_transformer().save_pretrained(tmp_path)
    model = load_transformer(TransformerFile.open(tmp_path))
    build(NetworkTable(network_dim=2), model).attach()

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(model.final_layer), "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        probe_step(model, 64, 64, 1, 32)


def test_the_job_probes_its_largest_batch(monkeypatch) -> None:
    from types import SimpleNamespace

    from library.config.tables import CacheTable, MemoryTable
    from library.errors import OutOfMemory
    from library.training import job

    asked = []
    monkeypatch.setattr(job, "probe_step", lambda *arguments: asked.append(arguments) or 3.5)
    members = [
        SimpleNamespace(group=(0, [(512, 512), (768, 320)]), batch_size=2),
        SimpleNamespace(group=(1, [(640, 640)]), batch_size=1),
    ]
    site = SimpleNamespace(
        run=SimpleNamespace(memory=MemoryTable(), cache=CacheTable(t5xxl_max_token_length=256)),
        device=SimpleNamespace(type="cuda"), dataset=SimpleNamespace(listing=SimpleNamespace(members=members)),
    )  # fmt: skip
    trainer = SimpleNamespace(predict=SimpleNamespace(transformer="model"), bucket=(0, 0))
    job._probe(site, trainer, None)
    assert asked == [("model", 512, 512, 2, 256)] and trainer.bucket == (512, 512)

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(job, "probe_step", full)
    monkeypatch.setattr(job, "_out_of_memory", lambda *_: OutOfMemory("too small"))
    with pytest.raises(OutOfMemory, match="too small"):
        job._probe(site, trainer, None)
    site.run.memory = MemoryTable(memory_probe=False)
    job._probe(site, trainer, None)
