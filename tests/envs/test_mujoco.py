"""MuJoCo's tasks: experts by search, messages if something is missing, and the best checkpoint."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from genkit.backbones import MLP
from genkit.cli.commands.finetune import main as finetune_main
from genkit.cli.commands.train import main as train
from genkit.cli.main import main as genkit
from genkit.core import Spec, Vector, spec_from_dict, spec_to_dict
from genkit.data import DATA
from genkit.diffusion.paths import Linear as Straight
from genkit.envs import ars
from genkit.envs.ars import SURVIVAL_BONUS, LinearPolicy, RunningStats, SearchSettings, episode_returns, search
from genkit.objectives import Flow
from genkit.rl.finetune.chain import Chain
from genkit.rl.finetune.dppo import DPPO
from genkit.rl.finetune.experience import Experience
from genkit.rl.finetune.learner import Critic, Learner
from genkit.rl.finetune.loop import CHECKPOINT_SEED
from genkit.rl.finetune.noise import FixedNoise
from genkit.training.best import BestCheckpoint
from genkit.training.directory import find_run, read_log
from genkit.training.run import load_run
from genkit.training.state import State

ROOT = Path(__file__).parents[2]


def refused(capsys, *argv):
    assert genkit(list(argv)) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


# ------------------------------------------------------------------------------------------------- the search
def test_running_mean_and_standard_deviation():
    x = np.random.default_rng(0).normal((3.0, -1.0, 2.0), (0.1, 5.0, 0.0), (70, 3))
    stats = RunningStats(3)
    for part in np.split(x, (1, 4, 50)):
        stats.add(part)
    assert np.allclose(stats.mean, x.mean(0))
    assert np.allclose(stats.std, [*x.std(0)[:2], 1.0])


def test_a_linear_expert_scales_clips_and_is_saved(tmp_path):
    expert = LinearPolicy(
        np.array([[2.0, 0.0]]), np.array([1.0, 9.0]), np.array([4.0, 1.0]), np.array([-1.0]), np.array([5.0])
    )
    assert expert.act(np.array([[2.0, 0.0], [100.0, 0.0], [-100.0, 0.0]])).tolist() == [[2 + 3 * 0.5], [5.0], [-1.0]]
    expert.save(tmp_path / "e.json")
    again = LinearPolicy.load(tmp_path / "e.json")
    assert again.act(np.array([[2.0, 0.0]])).tolist() == [[3.5]]
    for text in ("{", "[]", '{"weight": 3}', '{"weight": [[1, 2]], "mean": [0], "std": [1], "low": [0], "high": [1]}'):
        (tmp_path / "e.json").write_text(text)
        with pytest.raises(ValueError, match=r"expert: .*e\.json is") as e:
            LinearPolicy.load(tmp_path / "e.json")
        assert "\n" not in str(e.value)


@pytest.fixture(scope="module")
def pole(tmp_path_factory):
    """Demonstrations of a balanced pole, by an expert of a search."""
    pytest.importorskip("mujoco")
    out = tmp_path_factory.mktemp("pole") / "demos.npz"
    before = os.getcwd()
    os.chdir(out.parent)
    options = ["--expert.target=300", "--expert.rounds=40", "--expert.noise=0.1", "--expert.step-size=0.1"]
    assert genkit(["demo", "InvertedPendulum-v5", "--expert=ars", *options, "--episodes=3", f"--out={out}"]) == 0
    os.chdir(before)
    return out


def test_the_search_balances_a_pole_and_its_expert_is_recorded(pole, capsys):
    result = LinearPolicy.load(pole.with_suffix(".expert.json"))
    assert result.weight.shape == (1, 4)
    assert result.high.tolist() == [3.0]
    with np.load(pole) as stored:
        ends, action, obs = stored["episode_ends"], stored["action"], stored["obs"]
    assert len(ends) == 3
    assert ends[-1] > 3 * 200  # without a push a pole falls after about 35 steps
    assert np.allclose(result.act(obs), action)
    assert not (pole.parent / "MUJOCO_LOG.TXT").exists()
    again = pole.with_name("again.npz")
    expert = ["--expert=saved", f"--expert.path={pole.with_suffix('.expert.json')}"]
    assert genkit(["demo", "InvertedPendulum-v5", *expert, "--episodes=3", f"--out={again}"]) == 0
    with np.load(again) as stored:
        assert np.array_equal(stored["obs"], obs)
    message = refused(capsys, "demo", "Pendulum-v1", *expert, "--episodes=2", f"--out={again}")
    assert "expert: is for 4 observed numbers and 1 of action; Pendulum-v1 has 3 and 1" in message


class Ledge:
    """A reward of 1 for each of 20 steps, and 0.1 times the action, 0 … 1; an action over 0.5 ends the episode."""

    num, obs_dim, action_dim, max_steps = 16, 1, 1, 20
    action_space = type("Box", (), {"low": np.zeros(1), "high": np.ones(1)})

    def reset(self, seeds, rows=None):
        self.at = 0
        return np.ones((self.num, 1))

    def step(self, actions):
        self.at += 1
        over = actions[:, 0] > 0.5
        return np.ones((self.num, 1)), 1 + 0.1 * actions[:, 0], over, np.full(self.num, self.at == 20), {}


def test_a_search_may_subtract_the_bonus_for_standing(monkeypatch):
    """Jumping at once returns 1.1, of which 1 is for standing; standing about 21. Without the bonus: 0.1, or 1."""
    for action, with_it, without in ((1.0, 1.1, 0.1), (0.5, 21.0, 1.0)):
        policy = LinearPolicy(np.zeros((1, 1)), np.zeros(1), np.ones(1), np.full(1, action), np.full(1, action))
        assert np.allclose(episode_returns(Ledge(), policy, range(16)), with_it)
        assert np.allclose(episode_returns(Ledge(), policy, range(16), None, 1.0), without)
    monkeypatch.setattr(ars, "Gym", lambda num, name: Ledge())
    bonuses = []
    spy = lambda env, policy, seeds, stats=None, survival=0.0: bonuses.append(survival) or np.arange(16.0)  # noqa: E731
    monkeypatch.setattr(ars, "episode_returns", spy)
    for name, given in (("Hopper-v5", None), ("Hopper-v5", 0.5), ("Other-v0", None)):
        with contextlib.suppress(ValueError):
            search(name, SearchSettings(target=1e3, rounds=1, survival_bonus=given))
    assert bonuses[::2] == [1.0, 0.5, 0.0]  # every other call evaluates the centre, without the bonus
    assert set(bonuses[1::2]) == {0.0}


def test_known_bonuses_for_standing_are_those_of_the_environments():
    pytest.importorskip("mujoco")
    import gymnasium

    for name, pay in SURVIVAL_BONUS.items():
        env = gymnasium.make(name)
        env.reset(seed=0)
        assert env.step(np.zeros(env.action_space.shape))[4]["reward_survive"] == pay, name


def test_experts_that_never_succeed_are_refused(tmp_path, capsys):
    pytest.importorskip("mujoco")
    LinearPolicy(np.zeros((1, 4)), np.zeros(4), np.ones(4), -np.ones(1), np.ones(1)).save(tmp_path / "e.json")
    out = f"--out={tmp_path}/d.npz"
    expert = ["--expert=saved", f"--expert.path={tmp_path}/e.json"]
    message = refused(capsys, "demo", "InvertedPendulum-v5", *expert, "--episodes=2", out)
    assert "did not succeed once in 8 episodes of InvertedPendulum-v5" in message
    assert "of 1000 steps" in message
    aim = ["--expert.target=1e6", "--expert.rounds=2"]
    assert "in 2 rounds, not 1e+06" in refused(capsys, "demo", "InvertedPendulum-v5", "--expert=ars", *aim, out)
    assert "say which mean return" in refused(capsys, "demo", "InvertedPendulum-v5", "--expert=ars", out)
    assert "ars finds one" in refused(capsys, "demo", "InvertedPendulum-v5", out)


def test_a_search_depends_on_its_seed(tmp_path):
    pytest.importorskip("mujoco")
    options = {"target": 40.0, "directions": 2, "top_directions": 1, "rounds": 30, "noise": 0.3, "step_size": 0.1}
    one, same, other = (search("InvertedPendulum-v5", SearchSettings(**options, seed=s)) for s in (0, 0, 1))
    assert np.array_equal(one.weight, same.weight)
    assert not np.array_equal(one.weight, other.weight)


# ------------------------------------------------------------------------------------------------- what is missing
def test_without_mujoco_one_line_says_what_to_install(tmp_path):
    pytest.importorskip("gymnasium")
    script = (
        "import sys; sys.modules['mujoco'] = None\n"
        "from genkit.cli.main import main\n"
        "sys.exit(main(['demo', 'HalfCheetah-v5', '--expert', 'ars', '--out', sys.argv[1]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "d.npz")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert 'pip install "gymnasium[mujoco]" "mujoco<4"' in done.stderr


def test_an_unknown_id_is_refused(capsys, tmp_path):
    pytest.importorskip("gymnasium")
    message = refused(capsys, "demo", "HalfCheeta-v5", "--expert=ars", "--expert.target=1", f"--out={tmp_path}/d.npz")
    assert "HalfCheetah" in message


# ------------------------------------------------------------------------------------------------- fine-tuning
def test_a_policy_of_a_pole_is_trained_acts_and_is_improved(pole, tmp_path, capsys):
    train(["--data=replay", f"--data.root={pole}", "--data.env=InvertedPendulum-v5", "--data.obs-steps=1",
           "--data.pred-steps=2", "--data.act-steps=2", "--objective.prediction=x0", "--objective.loss-space=x0",
           "--backbone.width=32", "--backbone.depth=1", "--steps=60", "--batch=128", "--lr=3e-3", "--sample-every=0",
           "--no-tensorboard", "--device=cpu", "--precision=fp32", "--workers=0", f"--out={tmp_path}"])  # fmt: skip
    argv = [str(tmp_path / "latest"), "--steps=2", "--num-envs=8", "--num-steps=32", "--iterations=2",
            "--eval-episodes=2", "--method.ft-denoising-steps=2", "--method.warmup=1", "--method.bc-coef=0",
            "--checkpoint-eval-episodes=2", "--save-every=1", "--no-tensorboard"]  # fmt: skip
    finetune_main([*argv, f"--out={tmp_path}/tuned"])
    log = read_log(find_run(tmp_path / "tuned" / "latest"))
    assert {"before/return", "checkpoint/return", "after/return"} <= {k for r in log for k in r}
    assert [r for r in log if "critic_loss" in r][-1]["cpu_seconds"] > 0
    capsys.readouterr()
    assert genkit(["rollout", str(tmp_path / "tuned" / "latest"), "--steps=2", "--episodes=2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["return"]["value"] > 0
    assert "success" not in result


def test_the_critic_learns_in_batches_of_its_own_and_says_what_it_explains():
    spec = Spec((1,), {"obs": Vector((1, 2))})
    critic = Critic(spec, width=8, depth=1)
    critic.scale.fill_(2.0)
    fit = torch.optim.Adam(critic.parameters(), lr=1e-3)
    nets = {"net": MLP(width=8, depth=1).denoiser(spec)}
    objective = Flow(prediction="x0")
    state = State(nets, {}, {"denoise": torch.optim.SGD(nets["net"].parameters(), lr=0.1)})
    trainer = Learner(objective, state, Chain.on_grid(Straight(), 1, FixedNoise(0.1)), spec, None, 0, critic, fit)
    returns = torch.tensor([0.0, 2.0] * 4)
    for advantages, explained in ((torch.zeros(8), 1.0), (returns, 0.0), (returns / 2, 0.75)):
        experience = Experience(None, {"obs": torch.randn(8, 1, 2)}, advantages, returns, {})
        logs = DPPO(critic_batch=4, critic_epochs=3).update_critic(trainer, experience, 0)
        assert logs["explained_variance"] == pytest.approx(explained)
    assert {int(v["step"]) for v in fit.state.values()} == {3 * 3 * 2}
    DPPO(critic_epochs=1).update_critic(trainer, experience, 0)
    assert {int(v["step"]) for v in fit.state.values()} == {19}


def test_networks_see_no_observation_that_is_further_than_the_limit():
    """Of demonstrations the limit is 5; a cheetah on its back is a hundred deviations from those of a gait."""
    near, far = torch.tensor([[[2.0 + 5 * 0.1, 0.0]]]), torch.tensor([[[2.0 + 100 * 0.1, 0.0]]])
    for limit, same in ((5.0, True), (None, False)):
        spec = spec_from_dict(spec_to_dict(Spec((1,), {"obs": Vector((1, 2), (2.0, 0.0), (0.1, 1.0), limit)})))
        torch.manual_seed(0)
        critic = Critic(spec, width=8, depth=1)
        for p in critic.parameters():
            torch.nn.init.normal_(p)
        assert torch.equal(critic(near), critic(far)) is same
    assert DATA["four-ways"](n=2).load().spec.cond["obs"].limit == 5


def test_best_and_patience():
    best = BestCheckpoint("return", "higher")
    for step, value, stale in ((10, 1.0, False), (20, 3.0, False), (30, 2.0, False), (40, 3.0, True)):
        best.update(step, value)
        assert best.is_stale(2) is stale
    assert (best.step, best.value) == (20, 3.0)
    assert not best.is_stale(None)


@pytest.fixture(scope="module")
def ways(tmp_path_factory):
    out = tmp_path_factory.mktemp("ways")
    train(["--data=four-ways", "--data.n=20", "--objective.prediction=x0", "--backbone.width=32", "--backbone.depth=1",
           "--steps=30", "--batch=64", "--sample-every=0", "--no-tensorboard", "--device=cpu", "--precision=fp32",
           "--workers=0", f"--out={out}"])  # fmt: skip
    return out / "latest"


def test_the_best_checkpoint_is_what_the_run_is_and_the_newest_what_it_goes_on_from(ways, tmp_path, monkeypatch):
    from genkit.rl.finetune import loop

    returns = {2: 0.1, 4: 0.9, 6: 0.5, 8: 0.4, 10: 0.3, 12: 0.2}
    asked_for = []

    def evaluate_policy(settings, base, nets, seeds):
        asked_for.append((seeds, {k: v.clone() for k, v in nets["net"].state_dict().items()}))
        return {"return": returns.get(2 * (len(asked_for) - 1), 0.0)}  # the first is the start, step 0

    monkeypatch.setattr(loop, "evaluate_policy", evaluate_policy)
    argv = [str(ways), "--num-envs=4", "--num-steps=2", "--eval-episodes=0", "--method.batch=64", "--method.warmup=0",
            "--save-every=2", "--checkpoint-eval-episodes=3", "--method.bc-coef=0", "--no-tensorboard"]  # fmt: skip
    finetune_main([*argv, "--iterations=10", "--out", str(tmp_path / "part")])
    run = find_run(tmp_path / "part" / "latest")
    assert asked_for[0][0] == range(CHECKPOINT_SEED, CHECKPOINT_SEED + 3)
    kept = load_run(run)
    assert kept.step == 4
    assert all(torch.equal(kept.nets["net"].state_dict()[k], v) for k, v in asked_for[2][1].items())
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        f"step-{n:07d}" for n in (4, 6, 8, 10)
    ]  # three of the newest, and the best
    finetune_main(["--resume", str(run), "--iterations=12"])
    assert load_run(run).step == 4
    newest = load_file(run / "checkpoints" / "step-0000012" / "nets.safetensors")
    asked_for.clear()
    finetune_main([*argv, "--iterations=12", "--out", str(tmp_path / "whole")])
    uninterrupted = find_run(tmp_path / "whole" / "latest")
    same = load_file(uninterrupted / "checkpoints" / "step-0000012" / "nets.safetensors")
    assert all(torch.equal(newest[k], same[k]) for k in same)
    asked_for.clear()
    finetune_main([*argv, "--iterations=12", "--patience=2", "--out", str(tmp_path / "short")])
    assert [r["step"] for r in read_log(find_run(tmp_path / "short" / "latest"))][-1] == 8
