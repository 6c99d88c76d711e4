"""A draw depends on its key alone, and different keys are independent."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from library.flow.draws import choice, key_seed, normal, permutation, uniform


def test_a_draw_is_a_function_of_its_key() -> None:
    first = normal((2, 3), 7, "noise", 5, "item")
    torch.rand(100)
    normal((2, 3), 7, "noise", 6, "item")
    assert torch.equal(first, normal((2, 3), 7, "noise", 5, "item"))


@pytest.mark.parametrize("key", [(8, "noise", 5), (7, "t", 5), (7, "noise", 6), (7, "noise", "5"), (7, "noise", 5, 0)])
def test_any_part_of_the_key_changes_the_draw(key: tuple) -> None:
    assert key_seed(7, "noise", 5) != key_seed(*key)


def test_keys_cannot_run_together() -> None:
    assert key_seed(1, "a", "b") != key_seed(1, "ab") and key_seed(1, "a', 'b") != key_seed(1, "a", "b")


def test_another_process_draws_the_same() -> None:
    code = "from library.flow.draws import *; print(uniform(3, 'x', 1), choice(10, 3, 'y'), permutation(4, 3, 'z'))"
    root = Path(__file__).resolve().parents[2]
    printed = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == f"{uniform(3, 'x', 1)} {choice(10, 3, 'y')} {permutation(4, 3, 'z')}"


def test_draws_have_the_right_distribution() -> None:
    values = torch.tensor([uniform(0, "u", i) for i in range(4000)])
    assert abs(values.mean() - 0.5) < 0.02 and abs(values.var() - 1 / 12) < 0.005
    counts = torch.bincount(torch.tensor([choice(4, 0, "c", i) for i in range(4000)]), minlength=4)
    assert counts.min() > 900
    assert sorted(permutation(50, 0, "p")) == list(range(50))
    assert abs(normal((10000,), 0, "n").std() - 1) < 0.03


def test_choosing_from_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="0 things"):
        choice(0, 1, "x")
