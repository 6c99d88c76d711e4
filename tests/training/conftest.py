"""One small project for all tests of the trainer: they read its cache and write to folders of their own."""

import tempfile
from pathlib import Path

import pytest

from tests.tiny import tiny_base
from tests.training.project import Project, make_project


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A random base of the real classes."""
    return tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def cached(tmp_path_factory, base):
    """A cached project; its folder is shared, so outputs need names of their own."""
    return make_project(tmp_path_factory.mktemp("project"), base)


@pytest.fixture
def project(cached, tmp_path) -> Project:
    """A project whose outputs go to the test's own folder, on the shared cache."""
    return Project(cached.root, cached.base, settings={"output_dir": tmp_path / "out"})


@pytest.fixture(scope="session", autouse=True)
def no_logs_left():
    """What forked runs said is not left in the temporary folder."""
    yield
    for path in Path(tempfile.gettempdir()).glob("influx-test-child-*.log"):
        path.unlink(missing_ok=True)
