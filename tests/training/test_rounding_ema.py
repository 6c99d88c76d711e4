"""bfloat16 weights that lose no small updates, and the moving average."""

import pytest
import torch
from torch import nn

from library.training.ema import Ema
from library.training.rounding import float32_step, stochastic_round


def generator(seed: int = 0) -> torch.Generator:
    """A seeded generator."""
    return torch.Generator().manual_seed(seed)


def test_rounding_is_right_on_average():
    """1 + 2^-10 lies an eighth of the way between two bfloat16 values: it goes up one time in eight."""
    value = torch.full((100_000,), 1 + 2**-10)
    rounded = stochastic_round(value, generator()).float()
    assert set(rounded.unique().tolist()) == {1.0, 1 + 2**-7}
    assert rounded.mean().item() == pytest.approx(1 + 2**-10, abs=1e-4)


def test_rounding_keeps_what_is_exact_and_what_is_not_finite():
    """Values bfloat16 can hold stay; so do infinities and NaN."""
    exact = torch.tensor([0.0, -1.5, 3e38, float("inf"), -float("inf")])
    assert torch.equal(stochastic_round(exact, generator()).float(), exact.bfloat16().float())
    assert stochastic_round(torch.tensor([float("nan")]), generator()).isnan().all()


@pytest.mark.parametrize(("stochastic", "moves"), [(True, True), (False, False)])
def test_small_updates_survive_only_stochastic_rounding(stochastic, moves):
    """An update of a hundredth of the last bit, 400 times."""
    parameter = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([parameter], lr=2**-7 / 100)
    source = generator()
    for _ in range(400):
        parameter.grad = -torch.ones_like(parameter)
        if stochastic:
            with float32_step([parameter], source):
                optimizer.step()
        else:
            optimizer.step()
    assert parameter.dtype == torch.bfloat16
    expected = 1 + (4 * 2**-7 if moves else 0)
    assert parameter.float().mean().item() == pytest.approx(expected, abs=2e-3)


def test_ema_follows_the_formula_and_gives_the_weights_back():
    """average += (1 - decay)(weight - average), decay warming up."""
    parameter = nn.Parameter(torch.zeros(3))
    ema = Ema({"w": parameter}, decay=0.9)
    expected = 0.0
    for update in range(1, 6):
        parameter.data.fill_(float(update))
        ema.update()
        decay = min(0.9, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * update
    torch.testing.assert_close(ema.averages["w"], torch.full((3,), expected))
    with ema.applied():
        torch.testing.assert_close(parameter.data, torch.full((3,), expected))
    assert torch.equal(parameter.data, torch.full((3,), 5.0))


def test_ema_of_bfloat16_weights_is_float32():
    """A bfloat16 average would stand still."""
    parameter = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    ema = Ema({"w": parameter}, decay=0.999, device="cpu")
    assert ema.averages["w"].dtype == torch.float32
    with ema.applied():
        assert parameter.dtype == torch.bfloat16
