"""Policies as one graph: the written file, opened by other code than ours, gives the policy's own actions."""

import dataclasses
import json
import logging
import sys

import numpy as np
import pytest
import torch

import genkit
from genkit.cli.main import main as cli
from genkit.core import Label
from genkit.data.codecs import Pixels
from genkit.integrations import policy_export
from genkit.integrations.policy_export import PolicyGraph, ToTorchScript, example_inputs
from genkit.rl.policies.policy import Policy
from tests.support.refusals import refuses

OBJECTIVES = {
    "flow": {"objective": {"name": "flow", "prediction": "x0", "cond_dropout": 0.0}},
    "anchored": {"objective": {"name": "anchored", "cond_dropout": 0.0}, "data": {"anchors": 4}},
    "pictures": {"objective": {"name": "ddpm", "cond_dropout": 0.0}, "data": {"pixels": 16}},
    "regression": {"objective": "regression"},
}


def trained(name, out):
    settings = OBJECTIVES[name]
    data = {"name": "four-ways", "n": 6, **settings.get("data", {})}
    run = genkit.train(objective=settings["objective"], data=data, backbone={"name": "mlp", "width": 16, "depth": 1},
                       steps=1, batch=16, sample_every=0, tensorboard=False, device="cpu", precision="fp32",
                       out=str(out))  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    for net in run.nets.values():  # a new network's output is 0, whatever it sees
        for p in net.parameters():
            p += 0.2 * torch.randn(p.shape, generator=draw)
    return run


class Draws:
    """The graph's own noise, for the policy: the first call is the start, the second the choice of an anchor."""

    def __init__(self, *values):
        self.values = list(values)

    def __call__(self, shape):
        return self.values.pop(0)


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    return trained("flow", tmp_path_factory.mktemp("flow"))


NAMES = ["anchored", *(pytest.param(name, marks=pytest.mark.slow) for name in ("flow", "pictures", "regression"))]


@pytest.mark.parametrize("name", NAMES)
def test_the_file_gives_the_actions_of_the_policy(name, tmp_path):
    run, out = trained(name, tmp_path / "runs"), tmp_path / "graph"
    for p in run.nets["bank"].parameters() if name == "anchored" else ():
        p *= 0.01  # so that all anchors are about as likely
    exported = genkit.export(run, out, to={"name": "torchscript", "act_steps": 5})
    about = json.loads((out / "policy.json").read_text())
    assert about["output"] == [1, 5, 2]
    assert any("differs" in line for line in exported.instructions)
    loaded, policy = torch.jit.load(out / "policy.pt"), Policy.load(run, act_steps=5)
    inputs = dict(zip(about["inputs"], example_inputs(policy, list(about["inputs"]), 77), strict=True))
    policy.noise = Draws(*(inputs[n] for n in ("noise", "choice") if n in inputs))
    obs = inputs["obs"].numpy() if "obs" in inputs else np.zeros((1, *policy.obs_shape), np.float32)
    expected = policy.act(obs, inputs["frames"].numpy() if "frames" in inputs else None)
    assert np.abs(loaded(*inputs.values()).numpy() - expected).max() < 1e-5
    for normal in (-1.5, -0.58, 0.2, 0.58, 1.5) if "choice" in inputs else ():  # by quantiles
        inputs["choice"] = torch.full_like(inputs["choice"], normal)
        policy.noise = Draws(inputs["noise"], inputs["choice"])
        expected = policy.act(obs)
        assert np.abs(loaded(*inputs.values()).numpy() - expected).max() < 1e-5
    other = dict(zip(about["inputs"], example_inputs(policy, list(about["inputs"]), 78), strict=True))
    if name != "regression":
        assert np.abs(loaded(*{**inputs, "noise": other["noise"]}.values()).numpy() - expected).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["anchored", "flow"])
def test_an_exported_program_gives_the_actions_of_the_policy(name, flow, tmp_path, caplog):
    run, out = flow if name == "flow" else trained(name, tmp_path / "runs"), tmp_path / "p.pt2"
    assert cli(["export", str(run.directory), str(out), "--to", "torch.export", "--to.steps", "2"]) == 0
    policy = Policy.load(run.directory, steps=2)
    names = ["noise", *(["choice"] if name == "anchored" else []), "obs"]
    inputs = dict(zip(names, example_inputs(policy, names, 9), strict=True))
    policy.noise = Draws(*(inputs[n] for n in names[:-1]))
    actions = torch.export.load(out).module()(*inputs.values())
    assert np.abs(actions.numpy() - policy.act(inputs["obs"].numpy())).max() < 1e-5
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("name", ["flow", pytest.param("anchored", marks=pytest.mark.slow)])
def test_onnx(name, flow, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    run = flow if name == "flow" else trained(name, tmp_path / "runs")
    assert cli(["export", str(run.directory), str(tmp_path / "p.onnx"), "--to", "onnx", "--to.steps", "3"]) == 0
    policy = Policy.load(run.directory, steps=3)
    names = ["noise", *(["choice"] if name == "anchored" else []), "obs"]
    inputs = dict(zip(names, example_inputs(policy, names, 9), strict=True))
    session = onnxruntime.InferenceSession(str(tmp_path / "p.onnx"))
    (actions,) = session.run(None, {k: v.numpy() for k, v in inputs.items()})
    policy.noise = Draws(*(inputs[n] for n in names[:-1]))
    assert np.abs(actions - policy.act(inputs["obs"].numpy())).max() < 1e-5


def test_a_graph_that_differs_is_not_written(flow, tmp_path, monkeypatch):
    monkeypatch.setattr(ToTorchScript, "load_graph", lambda self, file, names: lambda *i: 0.001 + torch.zeros(1, 8, 2))
    refuses(lambda: genkit.export(flow, tmp_path / "graph", to="torchscript"), "differs from the policy", "1e-05")
    assert not (tmp_path / "graph").exists()


def test_what_has_no_graph(flow, tmp_path, monkeypatch):
    pixels = dataclasses.replace(flow, codec=Pixels())
    refuses(lambda: genkit.export(pixels, tmp_path / "graph", to="torchscript"), "no policy of action chunks")
    for dropped in (0.0, 0.2):  # without it, the policy would act by no skill
        asked = dataclasses.replace(flow.config.objective, cond_dropout_each=dropped)
        config = dataclasses.replace(flow.config, objective=asked)
        spec = dataclasses.replace(flow.spec, cond={**flow.spec.cond, "skill": Label(4)})
        skilled = dataclasses.replace(flow, config=config, spec=spec)
        refuses(lambda run=skilled: genkit.export(run, tmp_path / "graph", to="torchscript"), "trained with skill")
    noisy = PolicyGraph(Policy.load(flow, sampler="ancestral", steps=2))
    refuses(lambda: noisy(*example_inputs(noisy.policy, noisy.names, 0)), "draws noise at every step", "ddim")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    refuses(policy_export.require_onnx, "pip install 'genkit-torch[onnx]'")
