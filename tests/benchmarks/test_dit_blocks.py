"""genkit bench dit-blocks: variants of one network, each trained for the same CPU time."""

import json

from benchmarks import dit_blocks
from genkit.backbones import DiT
from genkit.cli.main import main
from genkit.config import dump, from_dict


def test_every_variant_is_another_network():
    base = {k: v for k, v in dit_blocks.BASE.items() if k != "name"}
    made = {name: from_dict(DiT, {**base, **change}) for name, change in dit_blocks.VARIANTS.items()}
    assert len({str(dump(cfg)) for cfg in made.values()}) == len(made)
    assert made["modern"] == from_dict(
        DiT, {"width": 64, "depth": 4, "head_size": 32, "norm": "rms", "qk_norm": True, "mlp": "swiglu", "rope": True}
    )


def test_a_second_call_adds_to_the_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dit_blocks, "BASE", {"name": "dit", "width": 8, "depth": 1, "head_size": 4})
    monkeypatch.setattr(dit_blocks, "step_seconds", lambda options: 0.5)
    out = tmp_path / "a.json"
    quick = ["bench", "dit-blocks", "--seeds", "1", "--seconds", "1", "--out", str(out)]
    assert main([*quick, "--only", "default"]) == 0
    first = json.loads(out.read_text())["cells"]["default"]
    assert first["steps"] == 2
    assert len(first["loss"]) == len(first["cpu_seconds"]) == 1
    assert 0.5 < first["loss"][0] < 5  # of a network that has hardly been trained
    assert main([*quick, "--only", "default", "rope"]) == 0
    cells = json.loads(out.read_text())["cells"]
    assert cells["default"] == first
    assert cells.keys() == {"default", "rope"}
    assert "against default" in capsys.readouterr().out
