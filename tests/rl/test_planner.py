"""Plans: windows that stand still at the end, what is fixed, inverse dynamics, and what a policy is told."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from genkit.cli.main import main as cli
from genkit.core import Batch, Label, Prediction, Vector
from genkit.data import DATA
from genkit.data.codecs import Plans, from_dict, to_dict
from genkit.data.demonstrations.replay import Replay
from genkit.data.demonstrations.windows import Episode, discounted_return
from genkit.diffusion.paths import PATHS
from genkit.diffusion.samplers import SAMPLERS, Seeds, bind
from genkit.envs.four_ways import MAX_STEP, MODE_NAMES, OBSTACLES, FourWays
from genkit.rl.policies.episodes import run_episodes
from genkit.rl.policies.inverse_dynamics import FILE, fit_inverse_dynamics
from genkit.rl.policies.planner import Planner, inpaint
from genkit.rl.policies.plots import SAMPLES, plot_plans
from genkit.rl.policies.policy import Policy, condition_guidance, condition_tensors
from tests.support.refusals import refuses

ROOT = Path(__file__).parents[2]


# ----------------------------------------------------------------------------------------------------------- data
@pytest.fixture
def buffer(tmp_path):
    """Two episodes of 4 and 3 steps: obs count the steps, actions are 10 times that, rewards 1 at the ends."""
    count = np.arange(7.0)[:, None]
    arrays = {"obs": count, "action": 10 * count, "reward": np.array([0, 0, 0, 1.0, 0, 0, 1]),
              "kind": np.array([2, 2, 2, 2, 0, 0, 0]), "episode_ends": np.array([4, 7])}  # fmt: skip

    def make(**changes) -> str:
        np.savez(tmp_path / "demos.npz", **{**arrays, **changes})
        return str(tmp_path / "demos.npz")

    return make


def test_plans_reach_over_the_end_and_stand_still_there(buffer):
    data = Replay(root=buffer(), plan="both", obs_steps=2, pred_steps=4, act_steps=2).load()
    world = data.x
    states = [
        [0, 0, 1, 2], [0, 1, 2, 3], [1, 2, 3, 3], [2, 3, 3, 3],
        [4, 4, 5, 6], [4, 5, 6, 6], [5, 6, 6, 6],
    ]  # fmt: skip
    assert world[:, 1].tolist() == states
    assert (world[:, 0] / 10).tolist() == states
    assert data.cond["obs"][:, :, 0].tolist() == [row[:2] for row in states]
    only = Replay(root=buffer(), plan="states", obs_steps=2, pred_steps=4, act_steps=2).load()
    assert torch.equal(only.x, world[:, 1:])


def test_where_it_is_known_the_last_state_is_what_the_last_action_led_to():
    for obs, actions, rewards, way, last, _ in DATA["four-ways"](n=8).episodes("train"):
        assert np.allclose(last, obs[-1] + actions[-1])
        assert rewards.tolist() == [0.0] * (len(actions) - 1) + [1.0]
        assert set(way) == {way[0]}
        above = [obs[np.abs(obs[:, 0] - x).argmin(), 1] > 0 for x, _ in OBSTACLES]
        assert way[0] == 2 * above[0] + above[1]
    data = DATA["four-ways"](n=8, plan="states", pred_steps=12).load()
    ends = np.stack([e[4] for e in DATA["four-ways"](n=8).episodes("train")])
    stands = data.x[(data.x[:, :, -1] == data.x[:, :, -2]).all(1)][:, :, -1]
    assert torch.cdist(stands, torch.from_numpy(ends).float()).min(1).values.max() < 1e-6


def test_returns_are_those_of_the_episode_and_skills_those_of_now(buffer):
    assert discounted_return(np.array([1.0, 2.0, 4.0]), 0.5) == 3
    how = {"obs_steps": 1, "pred_steps": 2, "act_steps": 1, "reward": "reward", "skill": "kind", "discount": 0.5}
    data = Replay(root=buffer(), conditions=("returns", "skill", "goal"), **how).load()
    assert data.cond["returns"][:, 0].tolist() == [0.125] * 3 + [0.25] * 2  # chunks need no window at the last step
    assert data.cond["skill"].tolist() == [2, 2, 2, 0, 0]
    assert data.cond["goal"][:, 0].tolist() == [1, 2, 3, 5, 6]
    assert data.spec.cond["skill"] == Label(3)
    assert data.spec.cond["goal"].shape == (1,)  # type: ignore[union-attr]
    assert torch.equal(data.cond["obs"], Replay(root=buffer(), **how).load().cond["obs"])
    silent = Replay(root=buffer(), conditions=("returns",), **{**how, "reward": ""})
    refuses(silent.load, "have no rewards", "--data.reward")
    refuses(Replay(root=buffer(kind=np.full(7, 0.5)), conditions=("skill",), **how).load, "kind holds 0.5")
    refuses(Replay(root=buffer(reward=np.full(7, np.nan)), conditions=("returns",), **how).load, "episode 0", "reward")
    refuses(lambda: Replay(root=buffer(), plan="states", relative_to="obs").load(), "relative_to", "plan")
    refuses(lambda: Replay(root=buffer(), plan="states", pred_steps=8, obs_steps=1), "act_steps: given 8", "have 7")


def test_the_codec_of_plans_scales_states_as_samples_do():
    data = DATA["four-ways"](n=4, plan="both", obs_steps=2).load()
    codec = data.codec
    assert isinstance(codec, Plans)
    assert (codec.actions, codec.states) == (2, (2.0,))
    assert from_dict(json.loads(json.dumps(to_dict(codec)))) == codec
    x = codec.encode(Batch(data.x)).x
    assert torch.allclose(codec.decode(x), data.x, atol=1e-6)
    seen = codec.encode_states(data.cond["obs"].transpose(1, 2))
    assert torch.allclose(seen, x[:, 2:, :2], atol=1e-6)


# ------------------------------------------------------------------------------------------------------ inpainting
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_what_is_known_travels_along_its_own_noise_and_arrives_exactly(name):
    """At every node the known numbers are ``alpha known + sigma z``; the others are those of the denoiser."""

    class Toy:
        path = PATHS[name]()

        def __call__(self, x, t, cond):
            self.seen = x
            alpha, sigma = self.path.alpha(t)[:, None, None], self.path.sigma(t)[:, None, None]
            x0 = 0.3 * x.flip(2)
            return Prediction(x0, (x - alpha * x0) / sigma)

    toy, mask = Toy(), torch.zeros(2, 6, dtype=torch.bool)
    mask[1, :2] = mask[1, -1] = True
    value = torch.randn(3, 2, 6, generator=torch.Generator().manual_seed(0))
    z = torch.randn(3, 2, 6, generator=torch.Generator().manual_seed(1))
    seen = []

    def watched(denoise):
        def see(x, t, cond):
            seen.append((x, float(t[0])))
            return denoise(x, t, cond)

        return replace(toy_wrap(denoise), function=see)

    from genkit.diffusion.guidance import Wrapped, compose

    toy_wrap = lambda d: Wrapped(d, d)  # noqa: E731
    guide = compose(watched, inpaint(lambda x, cond: (mask, value)))
    out = bind("ddim", 8, guide)(toy)(z, {})
    assert torch.equal(out[:, mask], value[:, mask])
    for x, t in seen:
        at = torch.tensor([t], dtype=torch.float64)
        alpha, sigma = float(toy.path.alpha(at)), float(toy.path.sigma(at))
        assert torch.allclose(x[:, mask], (alpha * value + sigma * z)[:, mask], atol=1e-5)
    free = bind("ddim", 8)(toy)(z, {})
    assert torch.equal(out[:, 0], free[:, 0])  # a row without anything known
    assert not torch.allclose(out[:, 1, 2:-1], free[:, 1, 2:-1], atol=0.01)


def test_guidance_goes_toward_what_is_given_and_leaves_the_rest(monkeypatch):
    """x0 = 10 obs + 3 skill, each only where it is kept: at scale 2 the skill counts twice, obs once."""

    class Sees:
        path = PATHS["linear"]()

        def __call__(self, x, t, cond):
            kept = lambda k: cond.get(f"keep.{k}", torch.ones(len(x), dtype=torch.bool)).float()  # noqa: E731
            x0 = 10 * cond["obs"] * kept("obs") + 3 * cond["skill"] * kept("skill")
            return Prediction(x0[:, None], (x - (1 - t[:, None]) * x0[:, None]) / t[:, None])

    asked = {"obs": torch.ones(2), "skill": torch.ones(2)}
    p = condition_guidance(["skill"], 2.0)(Sees())(torch.zeros(2, 1), torch.full((2,), 0.5), asked)
    assert p.x0[:, 0].tolist() == [16, 16]


# ------------------------------------------------------------------------------------------------ inverse dynamics
def test_inverse_dynamics_find_what_was_done():
    """s' = s + B a: a is linear in the difference of states, and does not depend on where one is."""
    rng = np.random.default_rng(0)
    mix = np.array([[0.02, 0.01], [0.0, 0.03]])
    episodes = []
    for _ in range(20):
        actions = rng.normal(size=(30, 2))
        states = 5 + np.concatenate([np.zeros((1, 2)), (actions @ mix.T).cumsum(0)])
        episodes.append(Episode(states[:-1], actions, last_obs=states[-1]))
    net, explains = fit_inverse_dynamics(episodes, steps=150)
    assert explains > 0.98
    state = torch.full((4, 2), 5.0)
    action = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.5], [0.0, 0.0]])
    found = net(state, state + action @ torch.from_numpy(mix.T).float())
    assert torch.allclose(found, action, atol=0.2)
    again, _ = fit_inverse_dynamics(episodes, steps=5)
    once, _ = fit_inverse_dynamics(episodes, steps=5)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), once.parameters(), strict=True))
    refuses(lambda: fit_inverse_dynamics([Episode(np.zeros((5, 2)), np.zeros((5, 2)))]), "given 4 steps")


# --------------------------------------------------------------------------------------------------------- planners
QUICK = ["--device=cpu", "--tensorboard=false", "--sample-every=0", "--objective=flow", "--objective.prediction=x0"]
SMALL = ["--backbone=mlp", "--backbone.width=32", "--backbone.depth=2", "--data=four-ways", "--data.n=8", "--steps=20"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Plans of states and of both, told of skills and goals, hardly trained."""
    made = {}
    for plan in ("states", "both"):
        out = tmp_path_factory.mktemp(plan)
        more = [
            f"--data.plan={plan}",
            "--data.conditions",
            "skill",
            "goal",
            "--objective.cond-dropout-each=0.2",
            f"--out={out}",
        ]
        assert cli(["train", *QUICK, *SMALL, "--data.obs-steps=2", *more]) == 0
        made[plan] = (out / "latest").resolve()
    return made


@pytest.mark.parametrize("plan", ["states", "both"])
@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpmpp_2m", "ancestral"])
def test_plans_begin_where_one_is_and_end_where_they_should(runs, plan, sampler):
    assert sampler in SAMPLERS
    obs = torch.tensor([[[0.0, 0.0], [0.1, 0.02]], [[0.5, 0.3], [0.55, 0.35]]])
    free = Policy.load(runs[plan], steps=3, sampler=sampler)
    assert isinstance(free, Planner)
    free.reset([1, 2])
    actions, states = free.plan(obs)
    assert actions.shape == (2, 2 if plan == "both" else 0, 16)
    assert torch.allclose(states[:, :, :2], obs.transpose(1, 2), atol=1e-6)
    bound = Policy.load(
        runs[plan], steps=3, sampler=sampler, conditions={"goal": [1.5, -0.4], "skill": [2]}, guidance=1.5
    )
    bound.reset([1, 2])
    _, toward = bound.plan(obs)  # type: ignore[attr-defined]
    assert torch.allclose(toward[:, :, :2], obs.transpose(1, 2), atol=1e-6)
    assert torch.allclose(toward[:, :, -1], torch.tensor([1.5, -0.4]).expand(2, 2), atol=1e-6)
    assert not torch.equal(toward[:, :, 2:-1], states[:, :, 2:-1])
    assert not torch.allclose(states[:, :, -1], torch.tensor([1.5, -0.4]).expand(2, 2), atol=0.01)


def test_plans_of_a_one_pass_model_begin_where_one_is_too(runs):
    """Which no sampler takes there."""
    planner = Policy.load(runs["both"], steps=1)
    assert isinstance(planner, Planner)
    planner.generate = lambda z, cond, noise=None: torch.zeros_like(z)
    obs = torch.tensor([[[0.0, 0.0], [0.1, 0.02]]])
    assert torch.allclose(planner.plan(obs)[1][:, :, :2], obs.transpose(1, 2), atol=1e-6)


def test_a_planner_carries_out_what_its_plan_says(runs):
    obs = np.array([[[0.0, 0.0], [0.1, 0.02]]])
    both = Policy.load(runs["both"], steps=2)
    both.reset([5])
    actions, _ = both.plan(torch.from_numpy(obs).float())  # type: ignore[attr-defined]
    both.reset([5])
    assert np.allclose(both.act(obs)[0], actions[0, :, 1:9].T, atol=1e-6)  # from now on, as of chunks
    states = Policy.load(runs["states"], steps=2)
    assert isinstance(states, Planner)
    assert states.explained_variance is not None
    assert states.explained_variance > 0.99  # displacements
    assert (runs["states"] / FILE).is_file()
    states.reset([5])
    _, planned = states.plan(torch.from_numpy(obs).float())
    states.reset([5])
    done = states.act(obs)[0]
    assert done.shape == (8, 2)
    before, after = planned[0, :, 1:9].T, planned[0, :, 2:10].T
    assert states.inverse_dynamics is not None
    assert np.allclose(done, states.inverse_dynamics(before, after).numpy(), atol=1e-5)
    assert states.obs_shape == (2, 2)
    assert states.action_dim == 2
    finished = run_episodes(states, FourWays(3), range(3))
    assert len(finished) == 3


def test_what_a_run_is_told_is_checked(runs, tmp_path, capsys):
    run = Policy.load(runs["states"], steps=1).run
    assert isinstance(run.spec.cond["goal"], Vector)
    refuses(lambda: condition_tensors(run.spec, {"returns": [1.0]}), "'returns'", "allowed: skill, goal")
    refuses(lambda: condition_tensors(run.spec, {"obs": [1.0]}), "'obs' is not a condition")
    refuses(lambda: condition_tensors(run.spec, {"skill": [1.5]}), "skill is 1.5", "one whole number")
    refuses(lambda: condition_tensors(run.spec, {"skill": [4]}), "skill: given 4..4; allowed 0..3")
    refuses(lambda: condition_tensors(run.spec, {"goal": [1.0]}), "goal", "needs (1, 2)")
    refuses(lambda: Policy.load(runs["states"], act_steps=15), "act_steps: given 15", "have 14 steps")
    always = replace(run, config=replace(run.config, objective=replace(run.objective, cond_dropout_each=0.0)))  # type: ignore[arg-type]
    refuses(lambda: Policy.load(always), "skill is missing", "--objective.cond-dropout-each 0.2")
    assert isinstance(Policy.load(always, conditions={"skill": [1], "goal": [1.0, 0.3]}), Planner)

    def refused(*argv):
        assert cli(list(argv)) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        return err

    assert "not NAME=NUMBER" in refused("rollout", str(runs["states"]), "--conditions", "skill")
    assert "not plans or pictures" in refused("rollout", str(runs["states"]), "--best-of=2")
    data = ["--data=four-ways", "--data.plan=states", "--data.pred-steps=8"]
    assert "act_steps: given 8" in refused("train", *data, f"--out={tmp_path}")
    out = runs["both"].parent / "rolled"
    assert (
        cli(["rollout", str(runs["states"]), "--episodes=2", "--conditions", "skill=3", "--json", f"--out={out}"]) == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["inverse_explained_variance"] > 0.99
    assert found["episodes"] == 2
    assert sorted(p.name.rsplit("-", 1)[1] for p in out.iterdir() if "skill=3" in p.name) == [
        "actions.png", "n2.json", "paths.png", "plans.png"
    ]  # fmt: skip
    (runs["states"] / FILE).write_bytes(b"nothing")
    refuses(lambda: Policy.load(runs["states"]), FILE, "is damaged", "delete it")
    (runs["states"] / FILE).unlink()


def test_plans_are_drawn_from_where_one_was(runs):
    planner = Policy.load(runs["states"], conditions={"skill": [1], "goal": [1.0, 0.3]}, steps=2)
    path, kept = np.stack([np.linspace(0, 1, 31), np.zeros(31)], 1), []
    plot_plans(planner, path, lambda *drawn: kept.append(drawn))  # type: ignore[arg-type,func-returns-value]
    ((ways, colours, title),) = kept
    assert title == "plans at steps 0 (blue), 10 (orange), 20 (green)"
    assert colours == ["tab:blue"] * SAMPLES + ["tab:orange"] * SAMPLES + ["tab:green"] * SAMPLES
    to, _ = planner.obs_shape
    for i, way in enumerate(ways):
        assert np.allclose(way[to - 1], path[10 * (i // SAMPLES)], atol=1e-5)
        assert np.allclose(way[-1], [1.0, 0.3], atol=1e-5)


def test_chunks_of_actions_are_told_of_skills_as_well(tmp_path):
    more = ["--data.conditions", "skill", "returns", f"--out={tmp_path}", "--objective.cond-dropout-each=0.2"]
    assert cli(["train", *QUICK, *SMALL, *more]) == 0
    policy = Policy.load(tmp_path / "latest", conditions={"skill": [1]}, guidance=2.0, steps=2)
    assert type(policy) is Policy
    spec = policy.run.spec
    assert spec.cond["skill"] == Label(4, MODE_NAMES)
    noise = Seeds([0], policy.run.device)
    drawn = [Policy.load(policy.run, conditions={"skill": [k]}, steps=2).generate for k in (1, 1, 2)]
    z, obs = noise(spec.shape), torch.zeros(1, 1, 2)
    one, same, other = (g(z, {"obs": obs, "skill": torch.tensor([k])}) for g, k in zip(drawn, (1, 1, 2), strict=True))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


# ----------------------------------------------------------------------------------------------------------- figures
@pytest.mark.slow
def test_planned_states_take_all_ways_or_the_one_that_is_asked_for(tmp_path):
    args = ["--config", str(ROOT / "configs/four_ways_plan.yaml"), f"--out={tmp_path}", "--tensorboard=false"]
    assert cli(["train", *args, "--device=cpu"]) == 0
    many = range(100_000, 100_200)
    free = run_episodes(Policy.load(tmp_path / "latest", steps=16), FourWays(200), many)
    assert free.info["success"].mean() >= 0.93  # 0.985 was measured; regression's is 0.00
    assert (free.mode_entropy_bits or 0) >= 1.85
    for way in range(4):
        done = run_episodes(
            Policy.load(tmp_path / "latest", steps=16, conditions={"skill": [way]}), FourWays(50), range(50)
        )
        assert done.info["success"].mean() >= 0.9
        assert (done.info["mode"][done.info["success"]] == way).mean() >= 0.98
    planner = Policy.load(tmp_path / "latest", steps=16)
    assert isinstance(planner, Planner)
    planner.reset(range(100))
    _, states = planner.plan(torch.zeros(100, 1, 2))
    assert (
        float(states.diff(dim=2).norm(dim=1).max()) < 1.5 * MAX_STEP
    )  # no jump, not even from the state that is fixed
