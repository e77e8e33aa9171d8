"""Starting from another run's weights: what they meant there, and what they are taken for."""

import pytest

from genkit.cli.main import main

TINY = ["train", "--data=moons", "--data.n=64", "--backbone=mlp", "--backbone.width=8", "--batch=8", "--steps=1",
        "--device=cpu", "--sample-every=0", "--no-tensorboard"]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    assert main([*TINY, "--objective=ddpm", f"--out={out}"]) == 0
    return (out / "latest").resolve()


@pytest.mark.parametrize(
    ("args", "taken"),
    [([], None), (["--objective=ddpm", "--objective.cond-dropout=0.2"], None),
     (["--objective=ddpm", "--objective.prediction=v"], "V on the path VP"),
     (["--objective=flow"], "Velocity on the path Linear")],
)  # fmt: skip
def test_weights_that_are_taken_for_something_else_are_mentioned(run, args, taken, tmp_path, capsys):
    assert main([*TINY, f"--init={run}", *args, f"--out={tmp_path}"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert ("at first its output means something else" in said) == (taken is not None)
    if taken:
        assert f"continuing with {taken}" in said
        assert "was trained to predict Epsilon on the path VP" in said
