"""A budget's choice in a real run: printed, agreed on, and kept when the run is continued."""

import pytest

from library.errors import ConfigError
from library.models import budget
from tests.training.project import make_project


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("budget"))


def test_a_continued_run_keeps_the_precision_it_began_with(project, monkeypatch, capsys, caplog) -> None:
    """What is free in RAM is another day's: the budget alone might choose another base."""
    keys = {"vram_budget_gb": 4.0, "max_train_steps": 2, "save_state_on_train_end": True}
    with monkeypatch.context() as scarce:
        scarce.setattr(budget, "PRECISIONS", ("int8",))
        assert project.train("run", **keys) == 0
    assert 'base_precision = "int8"' in capsys.readouterr().out
    assert project.train("run", dry_run=True, **keys) == 0
    assert 'base_precision = "int8"' in capsys.readouterr().out
    assert project.train("run", **{**keys, "max_train_steps": 3}) == 0
    out = capsys.readouterr().out
    assert 'base_precision = "int8"' in out and "ram_budget_gb not set: " in out
    with monkeypatch.context() as scarcer:  # the budget was lowered: int8 does not fit, and something smaller does
        scarcer.setattr(budget, "PRECISIONS", ("nf4",))
        original = budget.choose

        def refused(shape, memory, *arguments, **options):
            if memory.base_precision == "int8":
                raise ConfigError("does not fit")
            return original(shape, memory, *arguments, **options)

        scarcer.setattr(budget, "choose", refused)
        assert project.train("run", **{**keys, "max_train_steps": 4}) == 0
    assert "another precision" in caplog.text
    assert 'base_precision = "nf4"' in capsys.readouterr().out
    assert project.train("another", **keys) == 0
    assert 'base_precision = "bf16"' in capsys.readouterr().out
