from pathlib import Path

import pytest


@pytest.fixture
def write_config(tmp_path, monkeypatch):
    """A function that writes c.yaml in the current directory, which is empty at first."""
    monkeypatch.chdir(tmp_path)
    return lambda text: Path("c.yaml").write_text(text)
