"""One training step against PEFT on diffusers' transformer, written out independently: loss and LoRA gradients."""

import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig

from library.conditioning.item import Condition
from library.config.tables import ModelTable, NetworkTable, TrainingTable
from library.data.batches import Batch
from library.flow import draws
from library.models import setup
from library.models.base import Base
from library.models.text import TextEmbeddings
from library.networks import build
from library.networks.parts import parts
from library.training.objective import Objective, Place
from library.training.prediction import Predictor

REFERENCE = [
    "attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0", "attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj",
    "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
]  # fmt: skip
KEYS = ("a", "b")
RANK = 4


def made_batch() -> Batch:
    """Two items of 96 x 64 pixels, with a mask and a distribution of target latents."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    mask = (torch.rand(2, 1, 64, 96, generator=generator) > 0.5).float()
    return Batch(
        mean=normal(2, 16, 8, 12), std=normal(2, 16, 8, 12).abs(), condition=Condition(normal(2, 16, 8, 12), mask),
        text=TextEmbeddings(normal(2, 32, 32), normal(2, 32)), clip_ids=torch.zeros(2, 77), t5_ids=torch.zeros(2, 32),
        loss_weight=torch.ones(2), changed=torch.ones(2, 1, 8, 12), item_keys=KEYS, captions=KEYS, position=5,
    )  # fmt: skip


def reference_step(
    base, batch: Batch, weights: dict[str, tuple[torch.Tensor, torch.Tensor]], seed: int, guidance: float
):
    """The published trainer's step: packing, ids, timestep, guidance, velocity target, mean squared error."""
    model = FluxTransformer2DModel.from_pretrained(base / "transformer")
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=REFERENCE))
    with torch.no_grad():
        for name, module in model.named_modules():
            if name in weights:
                module.lora_A["default"].weight.copy_(weights[name][0])
                module.lora_B["default"].weight.copy_(weights[name][1])
    latents, noise, sigmas = [], [], []
    for index, key in enumerate(KEYS):
        noise.append(draws.normal((16, 8, 12), seed, "noise", 5, key, 0))
        sampled = draws.normal((16, 8, 12), seed, "latent", 5, key, 0)
        latents.append(batch.mean[index] + batch.std[index] * sampled)
        u = draws.uniform(seed, "t", 5, key, 0)
        sigmas.append((1000 - int(u * 1000)) / 1000)
    x0, epsilon, sigma = torch.stack(latents), torch.stack(noise), torch.tensor(sigmas)
    noisy = (1 - sigma.view(-1, 1, 1, 1)) * x0 + sigma.view(-1, 1, 1, 1) * epsilon

    def pack(x: torch.Tensor) -> torch.Tensor:
        b, c, h, w = x.shape
        return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, c * 4)

    mask = batch.condition.mask.view(2, 8, 8, 12, 8).permute(0, 2, 4, 1, 3).reshape(2, 64, 8, 12)
    ids = torch.zeros(4, 6, 3)
    ids[..., 1] += torch.arange(4)[:, None]
    ids[..., 2] += torch.arange(6)[None]
    predicted = model(
        hidden_states=torch.cat([pack(noisy), pack(batch.condition.latents), pack(mask)], dim=-1),
        timestep=sigma, guidance=torch.full((2,), guidance), pooled_projections=batch.text.pooled,
        encoder_hidden_states=batch.text.t5, txt_ids=torch.zeros(32, 3), img_ids=ids.reshape(-1, 3), return_dict=False,
    )[0]  # fmt: skip
    predicted = predicted.view(2, 4, 6, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(2, 16, 8, 12)
    loss = ((predicted - (epsilon - x0)) ** 2).mean()
    loss.backward()
    gradients = {
        name: (module.lora_A["default"].weight.grad, module.lora_B["default"].weight.grad)
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    return loss.item(), gradients


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_equal_peft(base, checkpointing):
    """The reference's 12 kinds of linears, each with its own pair, with and without recomputation."""
    opened = Base.open(ModelTable(pretrained_model_name_or_path=str(base)))
    transformer = setup.load(opened.transformer_file)
    transformer.runner.checkpointing = checkpointing
    table = NetworkTable(network_dim=RANK, network_layout="split", network_targets="reference")
    network = build(table, transformer, seed=3)
    network.attach()
    with torch.no_grad():
        for name, parameter in network.named_trained().items():
            if name.endswith("up"):
                parameter.copy_(0.1 * draws.normal(tuple(parameter.shape), 9, name))
    batch = made_batch()
    objective = Objective(TrainingTable(guidance_scale=1.5), seed=11)
    losses = objective.losses(Predictor(transformer), batch, Place(5), torch.device("cpu"))
    losses.mean().backward()

    weights, ours = {}, {}
    for path, adapter in network.by_path.items():
        target = adapter.target
        named = {(p.start, p.stop): p.diffusers for p in parts(path, target.out_features, target.in_features)}
        for pair in adapter.pairs:
            down, up = slice(*pair.hidden), slice(*pair.up)
            name = named[pair.rows]
            weights[name] = (adapter.down.detach()[down], adapter.up.detach()[up])
            ours[name] = (adapter.down.grad[down], adapter.up.grad[up])
    loss, theirs = reference_step(base, batch, weights, seed=11, guidance=1.5)
    assert losses.mean().item() == pytest.approx(loss, rel=1e-6)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        for mine, other in zip(ours[name], theirs[name], strict=True):
            scale = other.abs().max().clamp(min=1e-12)
            assert ((mine - other).abs().max() / scale).item() < 2e-5, name


def test_modulation_made_a_batch_ahead_changes_nothing(base):
    transformer = setup.load(Base.open(ModelTable(pretrained_model_name_or_path=str(base))).transformer_file)
    build(NetworkTable(network_dim=RANK), transformer, 0).attach()
    objective, predictor = Objective(TrainingTable(), 3), Predictor(transformer)
    batch, other, place = made_batch(), made_batch(), Place(5)
    device = torch.device("cpu")
    plain = objective.losses(predictor, batch, place, device)
    assert predictor.modulation_is_frozen and not predictor.works_ahead  # nothing to overlap with on the CPU
    used = []
    modulate = transformer.modulate
    transformer.modulate = lambda *inputs: used.append(1) or modulate(*inputs)
    predictor.prepare(batch, *objective.draw_times(batch, place))
    assert len(used) == 1
    with_another = objective.losses(predictor, other, Place(9), device)  # same position, not the batch it was made for
    assert len(used) == 2 and not torch.equal(with_another, plain)
    assert torch.equal(objective.losses(predictor, batch, place, device), plain) and len(used) == 2
    assert torch.equal(objective.losses(predictor, batch, place, device), plain) and len(used) == 3


def test_trained_modulation_is_never_made_ahead(base):
    transformer = setup.load(Base.open(ModelTable(pretrained_model_name_or_path=str(base))).transformer_file)
    build(NetworkTable(network_dim=RANK, network_targets="all-linear"), transformer, 0).attach()
    assert not Predictor(transformer).modulation_is_frozen
