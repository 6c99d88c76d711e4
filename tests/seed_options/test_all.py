"""Every one of InFluxEdit's 87 options has a behavioural test: two values that differ where they must, or a refusal."""

import inspect

from library.config.seed_options import SEED_OPTIONS
from tests.seed_options import test_data, test_outcomes, test_training


def options_with_tests() -> set[str]:
    """Options of the tables, and those that a test function's name spells."""
    found = {*test_training.NETWORKS, *test_data.CASES}
    for module in (test_data, test_outcomes):
        for name, _ in inspect.getmembers(module, inspect.isfunction):
            found |= spelled(name.removeprefix("test_")) if name.startswith("test_") else set()
    return found


def spelled(name: str) -> set[str]:
    """The options in a name such as `push_to_hub_hub_token_and_hub_model_id`: longest first, from the left."""
    found = set()
    while name:
        option = max((option for option in SEED_OPTIONS if name.startswith(option)), key=len, default=None)
        if option is None:
            name = name.partition("_")[2]
        else:
            found.add(option)
            name = name[len(option) :].lstrip("_")
    return found


def test_every_option_has_a_behavioural_test() -> None:
    assert set(SEED_OPTIONS) - options_with_tests() == set()


def test_names_are_read_as_meant() -> None:
    assert spelled("push_to_hub_hub_token_and_hub_model_id") == {"push_to_hub", "hub_token", "hub_model_id"}
    assert spelled("something_else") == set()
