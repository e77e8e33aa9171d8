"""docs/contributing/sampler.md, executed: a new sampler is one function and one line."""

import numpy as np

from genkit.cli.main import main
from genkit.diffusion.samplers import SAMPLERS
from tests.recipes.sampler import ENTRY
from tests.support import samplers as contract
from tests.support.recipes import TINY, page_shows


def test_the_page_shows_this_recipe():
    page_shows("sampler")


def test_a_sampler_is_one_function_and_one_line(monkeypatch):
    monkeypatch.setitem(SAMPLERS, "midpoint", ENTRY)
    contract.check_all("midpoint")


def test_the_command_line_knows_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(SAMPLERS, "midpoint", ENTRY)
    assert main(["train", *TINY, f"--out={tmp_path}"]) == 0
    out = tmp_path / "midpoint.npz"
    command = ["sample", str(tmp_path / "latest"), "--n=8", "--steps=5", "--format=npz", f"--out={out}"]
    assert main([*command, "--sampler=midpoint"]) == 0
    with np.load(out) as arrays:
        assert np.isfinite(arrays["arr_0"]).all()
    assert main([*command, "--sampler=midpiont"]) == 2
    assert "midpoint" in capsys.readouterr().err
