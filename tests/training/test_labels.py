"""Classes and conditions as Python gives them: numbers, names, lists, tensors, arrays."""

import numpy as np
import pytest
import torch

import genkit
from genkit.cli.main import main
from genkit.core import Label, Spec
from genkit.training.sampling import sample_conditions

SPEC = Spec((1, 8, 8), {"label": Label(3, ("circle", "square", "triangle"))})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    settings = {"steps": 2, "batch": 8, "tensorboard": False, "workers": 0, "device": "cpu"}
    return genkit.train(backbone={"width": 8}, out=str(tmp_path_factory.mktemp("runs")), **settings)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (1, [1] * 5),
        ("square", [1] * 5),
        ("2", [2] * 5),
        (["triangle", "circle"], [2, 0, 2, 0, 2]),
        ((0, "square"), [0, 1, 0, 1, 0]),
        (torch.tensor(2), [2] * 5),
        (torch.tensor([2, 1, 0, 1, 2]), [2, 1, 0, 1, 2]),
        (np.array([1, 2]), [1, 2, 1, 2, 1]),
        (np.int64(1), [1] * 5),
        (range(3), [0, 1, 2, 0, 1]),
    ],
)
def test_classes_are_given_by_number_or_name_one_or_several(given, expected):
    assert sample_conditions(SPEC, 5, given)["label"].tolist() == expected


@pytest.mark.parametrize(
    "given", ["round", 3, -1, 0.5, True, [], ["circle", "round"], torch.tensor([0.5]), [[0, 1]], {}]
)
def test_what_is_no_class_is_refused_in_one_line(given):
    with pytest.raises(ValueError, match="label: given") as refused:
        sample_conditions(SPEC, 5, given)
    assert "\n" not in str(refused.value)


def test_samples_of_several_classes_and_conditions_as_arrays(run):
    x, cond = run.sample(4, steps=1, label=["3", 1])
    assert cond["label"].tolist() == [3, 1, 3, 1]
    for given in ([3, 1, 3, 1], np.array([3, 1, 3, 1])):
        assert torch.equal(run.sample(4, steps=1, cond={"label": given}).x, x)


def test_a_class_or_prompt_beside_all_conditions_is_refused(run):
    """It had no effect."""
    for name, given in {"label": 3, "prompt": "a three"}.items():
        with pytest.raises(ValueError, match=f"{name}: given {given!r} beside cond, which has all conditions"):
            run.sample(2, steps=1, cond={"label": [1, 1]}, **{name: given})
    assert run.sample(2, steps=1, cond={"label": [1, 1]}, prompt=()).x.shape == (2, 1, 8, 8)


@pytest.mark.parametrize("n", [0, -1, 2.5, True, "3", None])
def test_what_is_no_number_of_samples_is_refused(run, n):
    with pytest.raises(ValueError, match=r"n: given .*; needs a whole number from 1"):
        run.sample(n, steps=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lable": 3}, "lable: unknown setting.*did you mean label|lable: unknown setting"),
        ({"steps": "many"}, "steps: given 'many'"),
        ({"sampler": "euler"}, "euler is ddim here"),
        ({"cond": {"label": ["three"]}}, "cond: needs tensors"),
        ({"label": "eleven"}, "label: given eleven"),
    ],
)
def test_mistakes_are_one_line(run, options, message):
    with pytest.raises(ValueError, match=message) as refused:
        run.sample(4, **options)
    assert "\n" not in str(refused.value)


def test_classes_without_samples_are_not_asked_for(tmp_path, capsys, caplog):
    """Neither by the printed next step nor by samples in turn; one that is given is mentioned."""
    x = np.random.default_rng(0).integers(0, 255, (30, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "gap.npz", x=x, y=np.array([0, 2, 4] * 10))
    argv = ["--backbone.width=8", "--steps=2", "--batch=8", "--no-tensorboard", "--workers=0", "--device=cpu"]
    assert main(["train", f"--data={tmp_path}/gap.npz", f"--out={tmp_path}/runs", "--sample-every=0", *argv]) == 0
    assert "next     genkit sample" in (out := capsys.readouterr().out)
    assert "--label 2 " in out
    run = genkit.load(tmp_path / "runs" / "latest")
    assert run.sample(7, steps=1).cond["label"].tolist() == [0, 2, 4, 0, 2, 4, 0]
    assert not caplog.text.count("had no sample")
    assert run.sample(2, steps=1, label=3).cond["label"].tolist() == [3, 3]
    assert "label: 3 had no sample in training" in caplog.text
    np.savez(tmp_path / "gap.npz", x=x, y=np.array([0, 1, 2, 3, 4] * 6))  # now there are some
    assert main(["train", f"--resume={tmp_path}/runs/latest", "--steps=3"]) == 0
    assert genkit.load(tmp_path / "runs" / "latest").spec.cond["label"].trained == [0, 1, 2, 3, 4]
