"""A fixture of every test of tpu_scripts/."""

import pytest
from cloud_scripts import Cloud


@pytest.fixture
def cloud(tmp_path):
    """A fake cloud of this test's own, with one package and one configuration."""
    return Cloud(tmp_path / "cloud")
