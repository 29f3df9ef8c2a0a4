"""An index of the page's tests, built once."""

from pathlib import Path

import pytest

from tests.served_index import build_shop


@pytest.fixture(scope="session")
def shop_index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small index; not to be changed."""
    return build_shop(tmp_path_factory.mktemp("page"))
