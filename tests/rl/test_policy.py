"""Trained policies: chunks in the environment's units, the command, pictures, figures of four ways."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from genkit.cli.main import main as cli
from genkit.core import Vector, pictures
from genkit.data.codecs import Actions
from genkit.envs.four_ways import FourWays
from genkit.rl.policies.episodes import run_episodes
from genkit.rl.policies.plots import SAMPLES, plot_actions
from genkit.rl.policies.policy import Policy
from tests.support.refusals import refuses

CLEAN = ["--objective.prediction=x0", "--objective.loss-space=x0", "--objective.cond-dropout=0"]
ROOT = Path(__file__).parents[2]
QUICK = ["--device=cpu", "--tensorboard=false", "--sample-every=0", "--log-every=50", "--data=four-ways"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A flow on a few demonstrations, hardly trained."""
    out = tmp_path_factory.mktemp("runs")
    args = ["--objective.prediction=x0", "--backbone.width=32", "--data.n=8", "--steps=30", f"--out={out}"]
    assert cli(["train", "--objective=flow", *QUICK, *args]) == 0
    return (out / "latest").resolve()


def test_a_policy_acts_from_now_on_in_the_worlds_units(run):
    policy = Policy.load(run, steps=2)
    assert policy.obs_shape == (1, 2)
    policy.reset([3, 4])
    obs = np.zeros((2, 1, 2))
    actions = policy.act(obs)
    assert actions.shape == (2, 8, 2)
    policy.reset([4])
    alone = policy.act(obs[0, 0])
    assert np.allclose(alone, actions[1], atol=1e-5)  # a row depends on its own seed
    policy.reset([3, 4])
    whole = policy.chunk(torch.zeros(2, 1, 2)).transpose(1, 2).numpy()
    assert np.allclose(whole[:, :8], actions, atol=1e-5)
    spread = policy.run.codec.decode(torch.tensor([-1.0, 1.0]).reshape(2, 1, 1).expand(2, 2, 16))
    assert float((spread[1] - spread[0]).max()) < 0.3  # metres, not numbers of order one
    refuses(lambda: policy.act(np.zeros((2, 3, 2))), "(2, 3, 2)", "[N, 1, 2]")
    refuses(lambda: policy.act(np.full((1, 1, 2), np.nan)), "row 0", "finite")
    refuses(lambda: Policy.load(run, act_steps=17), "act_steps: given 17")


def test_past_steps_are_predicted_but_not_carried_out(run):
    """With To = 3 the first two actions of a chunk lie in the past."""
    policy = Policy.load(run, steps=1)
    spec = replace(policy.run.spec, cond={"obs": Vector((3, 2))})
    policy.run = replace(policy.run, spec=spec, codec=Actions((0.0, 0.0), (1.0, 1.0)))
    policy.generate = lambda z, cond, noise=None: torch.arange(16.0).expand(len(z), 2, 16)
    assert policy.act(np.zeros((1, 3, 2)))[0, :, 0].tolist() == list(range(2, 10))


def test_rollouts_do_not_depend_on_how_many_worlds_there_are(run):
    policy = Policy.load(run, steps=1)
    many = run_episodes(policy, FourWays(7), range(50, 57))
    for env in (FourWays(3), policy.make_env(3, workers=2)):
        few = run_episodes(policy, env, range(50, 57))
        assert few.lengths.tolist() == many.lengths.tolist()
        assert all(np.array_equal(a, b) for a, b in zip(few.paths, many.paths, strict=True))
        assert few.info["mode"].tolist() == many.info["mode"].tolist()


def test_the_network_is_asked_for_rows_that_go_on_only(run):
    policy, asked, drawn = Policy.load(run, steps=1, act_steps=3), [], []
    generate = policy.generate
    policy.generate = lambda z, cond, noise=None: drawn.append(len(z)) or generate(z, cond, noise)
    done = run_episodes(
        policy, FourWays(20, max_steps=30), range(60), on_decision=lambda rows, *_: asked.append(len(rows))
    )
    decisions = -(-done.lengths // policy.act_steps)
    assert decisions.min() < decisions.max()
    assert sum(asked) == decisions.sum()
    assert asked[0] == 20
    assert drawn == [max(8, n) for n in asked]


def test_genkit_rollout_reports_its_results(run, capsys, tmp_path):
    assert cli(["rollout", str(run), "--episodes=6", "--film=1", f"--out={tmp_path}", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["episodes"] == 6
    assert set(summary["success"]) == {"value", "low", "high"}
    assert summary["ms_per_chunk"] > 0
    assert 0 <= summary["mode_entropy_bits"]["value"] <= 2
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".png", ".gif"}


def test_mistakes_take_one_line(run, capsys, tmp_path):
    def refused(*argv):
        assert cli(list(argv)) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        return err

    assert "did you mean four-ways?" in refused("rollout", str(run), "--env=four-way")
    assert "act_steps" in refused("rollout", str(run), "--act-steps=40")
    assert "there are experts for four-ways" in refused("demo", "pusht")
    assert "an .npz" in refused("demo", "four-ways", f"--out={tmp_path}/demos.zip")
    assert "act_steps: given 30" in refused("train", "--data=four-ways", "--data.act-steps=30")


def test_sampled_actions_are_drawn_at_three_moments(monkeypatch):
    """Of 9 steps at 0, 3 and 6, from the newest two observations there, the first repeated before the start."""

    class Both:
        obs_shape, act_steps = (2, 1), 2

        def reset(self, seeds):
            self.sign = torch.tensor([1.0 if s % 2 else -1.0 for s in seeds])

        def chunk(self, obs):
            return (self.sign * (10 * obs[:, 0, 0] + obs[:, 1, 0]))[:, None, None].repeat(1, 1, 4)

    kept: list[Any] = []
    figures = pictures.draw_figures

    def keep(draw, shape, size, **options):
        return figures(lambda axes: (kept.append(axes), draw(axes)), shape, size, **options)

    monkeypatch.setattr(pictures, "draw_figures", keep)
    image = plot_actions(Both(), np.arange(9.0)[:, None])  # type: ignore[arg-type]
    assert image.width > 300
    for row, value in zip(kept[0], (0, 23, 56), strict=True):
        lines = [line.get_ydata() for line in row[0].lines]
        assert len(lines) == SAMPLES
        assert {float(v[0]) for v in lines} == {-value, value}
        assert row[0].lines[0].get_xdata().tolist() == [-1, 0, 1, 2]


@pytest.mark.slow
def test_the_anchored_configuration_needs_one_step(tmp_path):
    args = [
        "--config",
        str(ROOT / "configs/four_ways_anchored.yaml"),
        f"--out={tmp_path}",
        "--tensorboard=false",
        "--device=cpu",
    ]
    assert cli(["train", *args]) == 0
    done = run_episodes(Policy.load(tmp_path / "latest", steps=1), FourWays(200), range(100_000, 100_400))
    assert done.info["success"].mean() >= 0.93  # 0.953 and 0.960 were measured
    assert (done.mode_entropy_bits or 0) >= 1.9


@pytest.mark.slow
def test_a_flow_takes_all_four_ways_and_regression_none(tmp_path):
    for name, extra in (("flow", CLEAN), ("regression", [])):
        config = str(ROOT / "configs/four_ways_flow.yaml")
        args = ["--config", config, f"--objective={name}", *extra, f"--out={tmp_path}/{name}"]
        assert cli(["train", *args, "--tensorboard=false", "--device=cpu"]) == 0
    many = range(100_000, 100_400)
    flow = run_episodes(Policy.load(tmp_path / "flow/latest", steps=16), FourWays(200), many)
    assert flow.info["success"].mean() >= 0.95
    assert (flow.mode_entropy_bits or 0) >= 1.9
    mean = run_episodes(Policy.load(tmp_path / "regression/latest"), FourWays(200), many)
    assert mean.info["success"].mean() <= 0.2
