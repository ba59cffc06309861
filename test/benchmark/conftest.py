from pathlib import Path

import pytest

from benchmark.peers import models


@pytest.fixture(scope="session")
def envs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all that a measurement makes, with the model "tiny" in it."""
    folder = tmp_path_factory.mktemp("bench")
    models.build("tiny", folder / "models" / "tiny")
    return folder
