"""docs/contributing/guidance-rule.md, executed: a new guidance rule is one class and one line."""

import numpy as np
import pytest
import torch

from genkit.cli.commands.sample import Sample
from genkit.cli.main import main
from genkit.config import parse
from genkit.diffusion.guidance import RULES
from tests.recipes.guidance_rule import CFGZeroStar
from tests.support import guidance as contract
from tests.support.recipes import TINY, page_shows


def test_the_page_shows_this_recipe():
    page_shows("guidance-rule")


def test_a_rule_is_one_class_and_one_line(monkeypatch):
    monkeypatch.setitem(RULES, "cfg-zero-star", CFGZeroStar)
    contract.check_all(CFGZeroStar())
    assert parse(Sample, ["run", "--guidance-rule=cfg-zero-star"]).guidance_rule == CFGZeroStar()


def test_it_extrapolates_from_the_projection():
    good, bad = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0]])
    got, memory = CFGZeroStar()(good, bad, 3.0, None)
    assert memory is None
    assert got.tolist() == [[1.0, 6.0]]  # s bad = (1, 0); (1, 0) + 3 (0, 2)
    assert torch.isfinite(CFGZeroStar()(good, 0 * bad, 3.0, None)[0]).all()


@pytest.mark.parametrize("rule", ["cfg-zero-star", "tests.recipes.guidance_rule:CFGZeroStar"])
def test_the_command_line_knows_it(rule, monkeypatch, tmp_path):
    """By its name, and without any line, from outside the package."""
    monkeypatch.setitem(RULES, "cfg-zero-star", CFGZeroStar)
    assert main(["train", *TINY, "--data.labels=true", f"--out={tmp_path}"]) == 0
    out = tmp_path / "guided.npz"
    command = ["sample", str(tmp_path / "latest"), "--n=8", "--steps=5", "--format=npz", f"--out={out}"]
    assert main([*command, "--guidance=3", f"--guidance-rule={rule}"]) == 0
    with np.load(out) as arrays:
        assert np.isfinite(arrays["arr_0"]).all()
