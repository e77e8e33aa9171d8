import numpy as np
import pytest

from tests.support.evaluation import save_vectors, train


@pytest.fixture(autouse=True, scope="module")
def private_cache(tmp_path_factory):
    """The user's cache is neither read nor written."""
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("cache")
        patch.setenv("GENKIT_CACHE", str(path))
        yield path


@pytest.fixture(scope="module")
def moons(tmp_path_factory):
    """A run on points of two classes, with checkpoints at steps 4 and 8."""
    out = tmp_path_factory.mktemp("moons")
    return train(out, "--data=moons", "--data.n=400", "--backbone.width=16", "--steps=8", "--save-every=4")


@pytest.fixture(scope="module")
def grey(tmp_path_factory):
    """A run on grey images 8x8 of three classes."""
    root = tmp_path_factory.mktemp("grey")
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 255, (60, 8, 8), dtype=np.uint8), np.arange(60) % 3
    np.savez(root / "data.npz", x=x, y=y)
    data = ["--data=npz", f"--data.root={root}/data.npz", "--backbone=unet", "--backbone.width=16"]
    return train(root / "runs", *data, "--steps=1", "--batch=4")


@pytest.fixture
def points(tmp_path):
    """The paths of 90 and 120 vectors from two normal distributions."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(90, 3)), 0.7 * rng.normal(size=(120, 3)) + [1.0, 0, 0]
    return save_vectors(tmp_path / "a.npz", a), save_vectors(tmp_path / "b.npz", b)
