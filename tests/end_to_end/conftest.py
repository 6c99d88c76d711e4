"""A small project folder: the repository's own examples beside the nano base and a little data, as a user has them."""

import shutil
from pathlib import Path

import pytest

from tests.end_to_end.scripts import ROOT
from tools.circle_regions import add_regions
from tools.fill_circles import generate

NUM_TRAIN = 20
NUM_TEST = 2


def new_project(folder: Path) -> Path:
    """nano/, data/fill_circles/ and config_examples/ side by side, so that the examples' relative paths hold."""
    (folder / "nano").symlink_to(ROOT / "nano", target_is_directory=True)
    shutil.copytree(ROOT / "config_examples", folder / "config_examples")
    data = folder / "data" / "fill_circles"
    generate(data, NUM_TRAIN, NUM_TEST, num_unseen_words=1, num_seen_pairs=1)
    add_regions(data)
    return folder


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by tests that only add to it, each in an output folder of its own."""
    return new_project(tmp_path_factory.mktemp("project"))


@pytest.fixture
def own_project(tmp_path: Path, project: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(project, tmp_path / "project", symlinks=True, ignore=shutil.ignore_patterns("output"))
    return tmp_path / "project"
