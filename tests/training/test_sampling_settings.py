"""Settings of sampling that would do nothing, or harm, are refused in one line."""

import json

import pytest
import torch

import genkit
from genkit.cli.main import main
from genkit.diffusion.samplers import find_sampler
from genkit.evaluation.sweeps import SweepSettings, list_combinations
from genkit.training.averages import ema_decay
from genkit.training.run import load_run, open_reference
from genkit.training.samples import count_calls
from genkit.training.sampling import Sampling
from genkit.training.session import Session

SMALL = ["--backbone=mlp", "--backbone.width=8", "--batch=16", "--steps=3", "--workers=0", "--no-tensorboard",
         "--sample-every=0", "--device=cpu", "--ema", "0.9", "0.99"]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One run that was trained without its classes now and then, and one that never was."""
    out = {}
    for name, dropout in (("dropped", 0.2), ("always", 0.0)):
        folder = tmp_path_factory.mktemp(name)
        argv = ["train", "--data=moons", f"--objective.cond-dropout={dropout}", *SMALL, f"--out={folder}"]
        assert main(argv) == 0
        out[name] = load_run(folder / "latest", device="cpu")
    return out


def test_guidance_needs_a_null_that_was_trained(runs):
    assert runs["dropped"].sample(2, steps=2, guidance=3.0).x.shape == (2, 2)
    with pytest.raises(ValueError, match="never trained without its conditions"):
        runs["always"].sample(2, steps=2, guidance=3.0)
    assert runs["always"].sample(2, steps=2, label=1).x.shape == (2, 2)


def test_a_model_that_is_given_leaves_the_other_that_is_named(runs, tmp_path):
    """``weak`` was not opened if a classifier was given as an object, and guidance was classifier-free."""
    assert main(["train", "--data=moons", "--objective=classifier", *SMALL, f"--out={tmp_path}"]) == 0
    run, classifier = runs["dropped"], load_run(tmp_path / "latest", device="cpu")
    weak = open_reference(run, "ema:0.9")
    z, cond = torch.randn(4, 2), {"label": torch.tensor([0, 1, 0, 1])}
    sampling = Sampling(steps=2, guidance=3.0, autoguide="ema:0.9", classifier=str(classifier.directory))
    both = run.generator(sampling)(z, cond)
    for given in ({"classifier": classifier}, {"weak": weak}, {"weak": weak, "classifier": classifier}):
        assert torch.equal(run.generator(sampling, **given)(z, cond), both)
    assert not torch.equal(run.generator(Sampling(steps=2, guidance=3.0), classifier=classifier)(z, cond), both)


def test_a_condition_may_be_left_out_only_if_it_was_in_training(runs):
    assert runs["dropped"].sample(2, steps=2, cond={}).x.shape == (2, 2)
    with pytest.raises(ValueError, match="'label' is missing, and this model was never trained without it"):
        runs["always"].sample(2, steps=2, cond={})


def test_only_another_model_guides(runs):
    """Averages of different decay differ from the first steps on; weights are compared, not their names."""
    run = runs["dropped"]
    with pytest.raises(ValueError, match="the model itself"):
        run.sample(2, steps=2, guidance=2.0, weak=load_run(run.directory, device="cpu"))
    plain, guided = run.sample(2, steps=2), run.sample(2, steps=2, guidance=3.0, autoguide="ema:0.9")
    assert not plain.x.allclose(guided.x)
    weak = open_reference(run, "ema:none")
    assert genkit.sample(run, 2, steps=2, guidance=2.0, weak=weak).x.shape == (2, 2)


@pytest.mark.parametrize(("data", "allowed"), [("moons", False), ("digits", True)])
def test_clipping_is_for_data_within_one(tmp_path, data, allowed):
    assert main(["train", f"--data={data}", *SMALL, f"--out={tmp_path}"]) == 0
    run = load_run(tmp_path / "latest", device="cpu")
    batch = run.codec.encode(run.config.data.load("train").batch(torch.arange(4), None))
    assert (float(batch.x.abs().max()) <= 1.001) == allowed
    generate = lambda: run.generator(genkit.Sampling(clip=True))  # noqa: E731
    if allowed:
        assert generate()
    else:
        with pytest.raises(ValueError, match=r"clip: .* go beyond"):
            generate()


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.99, 0.999, 0.9999])
def test_each_average_has_its_own_warm_up(decay):
    rates = [ema_decay(decay, step) for step in range(0, 200_000, 97)]
    assert rates == sorted(rates)
    assert rates[-1] == decay
    for step in (1, 60, 5000):
        slower = ema_decay(1 - (1 - decay) / 10, step)
        assert slower > ema_decay(decay, step) or slower == decay


@pytest.mark.parametrize(
    ("objective", "steps", "other"),
    [
        (["flow"], 20, ("ddim", 20)),
        (["flow-map"], 1, ("heun", 20)),
        (["flow-map", "--objective.rule=consistency"], 1, None),
        (["drift"], None, None),
    ],
)
def test_the_default_number_of_steps_is_the_samplers(tmp_path, monkeypatch, objective, steps, other):
    """In pictures and evaluations of training, from Python, in file names and in cards alike."""
    pictured, inner = [], Session.generator

    def counting(self, nets, step=0):
        generate = inner(self, nets, step)

        def count(*args):
            with count_calls(nets) as calls:
                drawn = generate(*args)
            pictured.append(calls.calls)
            return drawn

        return count

    monkeypatch.setattr(Session, "generator", counting)
    argv = [*SMALL, "--sample-every=3", "--eval-every=3", "--eval-n=8", "--eval-features=raw", "--eval-metrics=fid"]
    assert (
        main(["train", "--data=moons", f"--objective={objective[0]}", *objective[1:], *argv, f"--out={tmp_path}"]) == 0
    )
    run = load_run(tmp_path / "latest", device="cpu")
    evaluations = 1 if steps is None else find_sampler(run.objective.sampler).evaluations(steps)
    assert pictured == [evaluations]
    assert run.sample(2).evaluations == evaluations
    (card,) = (json.loads(f.read_text()) for f in (run.directory / "eval").glob("*.json"))
    assert card["settings"]["steps"] == steps
    assert steps is None or card["settings"]["nfe"] == evaluations
    assert main(["sample", str(run.directory), "--n=2", "--device=cpu"]) == 0
    picture, *_ = (run.directory / "samples").glob("sample-step*")
    assert (f"{run.objective.sampler}{steps}-" if steps else "one-pass") in picture.name
    if other:
        sampler, many = other
        assert run.sample(2, sampler=sampler).evaluations == find_sampler(sampler).evaluations(many)


def test_a_sweep_tries_the_samplers_own_numbers_of_steps(tmp_path):
    assert main(["train", "--data=moons", "--objective=flow-map", *SMALL, f"--out={tmp_path}"]) == 0
    combinations = list_combinations(
        tmp_path / "latest", SweepSettings(sampler=("flow_map", "ddim")), torch.device("cpu")
    )
    tried = [(c.sampling.sampler, c.sampling.steps) for c in combinations]
    assert tried == [("flow_map", 1), ("flow_map", 2), ("flow_map", 4), ("ddim", 5), ("ddim", 10), ("ddim", 20)]
