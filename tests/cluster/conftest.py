import pytest

from pipeline.data.stream import DataConfig
from tests.small import small_data


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Small pictures that all runs of these tests learn from."""
    return small_data(tmp_path_factory.mktemp("data"))
