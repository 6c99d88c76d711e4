"""One project with one cache for all cases: what differs between them is what the options change."""

import pytest

from tests.seed_options.bench import Bench, make_data
from tests.tiny import tiny_base


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    root = tmp_path_factory.mktemp("seed_options")
    make_data(root)
    return Bench(root, tiny_base(tmp_path_factory.mktemp("bases") / "base"))
