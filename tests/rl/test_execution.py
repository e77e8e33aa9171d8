"""Chunks carried out step by step, and by a policy that takes time to decide: schedules and weights by hand."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from genkit.cli.main import main as genkit
from genkit.core import Vector
from genkit.data.codecs import Actions
from genkit.envs import make
from genkit.rl.policies.episodes import run_episodes
from genkit.rl.policies.execution import DelayedPolicy
from genkit.rl.policies.policy import Policy
from tests.support.refusals import refuses


def counting(run, act_steps, obs_steps=1):
    """A policy whose chunk number n has the actions 100 n, 100 n + 1, ..., and the observations that it was given."""
    policy = Policy.load(run, steps=1, act_steps=act_steps)
    spec = replace(policy.run.spec, cond={"obs": Vector((obs_steps, 2))})
    policy.run = replace(policy.run, spec=spec, codec=Actions((0.0, 0.0), (1.0, 1.0)))
    given = []

    def generate(z, cond, noise=None):
        given.append(cond["obs"].clone())
        past = obs_steps - 1
        return (100.0 * (len(given) - 1) + torch.arange(16.0) - past).expand(len(z), 2, 16)

    policy.generate = generate
    return policy, given


def carried_out(actor, decisions, start=(0,)):
    actor.reset(list(start))
    return np.concatenate([actor.act(np.zeros((len(start), 1, 2)))[0, :, 0] for _ in range(decisions)]).tolist()


def test_without_a_delay_nothing_changes(policy):
    plain, env = Policy.load(policy, steps=2), make("four-ways", 3)
    a = run_episodes(plain, env, range(5))
    b = run_episodes(DelayedPolicy(plain, 0), env, range(5))
    assert all(np.array_equal(x, y) for x, y in zip(a.paths, b.paths, strict=True))
    c = run_episodes(DelayedPolicy(plain, 2), env, range(5))
    assert not all(np.array_equal(x, y) for x, y in zip(a.paths, c.paths, strict=True))


@pytest.mark.parametrize("execution", ["naive", "ensemble", "real-time"])
def test_results_do_not_depend_on_which_starts_run_side_by_side(policy, execution):
    """Rows take the next start at different times; each then has chunks under way of its own, or none."""
    actor, seeds = DelayedPolicy(Policy.load(policy, steps=2, act_steps=4), 3, execution, limit=5.0), range(12)
    few, many = (run_episodes(actor, make("four-ways", n, max_steps=24), seeds) for n in (5, 12))
    assert len(set(many.lengths.tolist())) > 1, "no row takes another start while others go on"
    assert all(np.array_equal(a, b) for a, b in zip(few.paths, many.paths, strict=True))


@pytest.mark.parametrize(
    ("act_steps", "delay", "expected"),
    [
        (4, 0, [0, 1, 2, 3, 100, 101, 102, 103, 200]),
        (4, 3, [0, 1, 2, 3, 4, 5, 6, 103, 104, 105, 106, 203]),
        (4, 4, [0, 1, 2, 3, 4, 5, 6, 7, 104, 105, 106, 107, 204]),
        (4, 6, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 106, 107, 108, 109, 206]),  # two decisions are under way
        (1, 2, [0, 1, 2, 102, 202, 302]),
    ],
)
def test_actions_under_way_are_held_until_the_next_chunk_arrives(policy, act_steps, delay, expected):
    actor = DelayedPolicy(counting(policy, act_steps)[0], delay)
    for _ in range(2):  # a new episode begins anew, but for the number of the chunk
        actor.policy, _ = counting(policy, act_steps)
        assert carried_out(actor, -(-len(expected) // act_steps))[: len(expected)] == expected


@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("delay", [0, 1])
def test_an_ensemble_averages_what_has_arrived_with_falling_weights(policy, decay, delay):
    actor = DelayedPolicy(counting(policy, 1)[0], delay, "ensemble", decay)
    actions = carried_out(actor, 20)
    for t in range(20):
        chunks = [n for n in range(max(0, t - 15), t + 1) if n == 0 or n + delay <= t]
        weights = [math.exp(-decay * i) for i in range(len(chunks))]  # the oldest first
        values = [100 * n + (t - n) for n in chunks]
        expected = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
        assert actions[t] == pytest.approx(expected, rel=1e-5)


def test_an_ensemble_of_chunks_that_agree_is_any_of_them(policy):
    actor, given = counting(policy, 2)
    generate = actor.generate
    # the chunk at step t has the actions t, t + 1, ..., whatever was drawn before
    actor.generate = lambda z, cond, noise=None: generate(z, cond) % 100 + 2 * (len(given) - 1)
    assert carried_out(DelayedPolicy(actor, 3, "ensemble", 0.3), 5) == pytest.approx(list(range(10)))


def test_a_step_at_a_time_is_the_same_episode(policy):
    plain, env, seeds = Policy.load(policy, steps=2), make("four-ways", 8), range(7, 15)
    path = run_episodes(plain, env, seeds).paths
    plain.reset(seeds)
    seen = [env.reset(seeds)]
    for _ in range(max(map(len, path)) - 1):
        seen.append(env.step(plain.step(seen[-1]))[0])
    rows = np.stack(seen, 1)
    assert all(np.array_equal(rows[i, : len(p)], p) for i, p in enumerate(path))


def test_a_step_keeps_the_newest_observations_and_draws_when_the_queue_is_empty(policy):
    actor, given = counting(policy, 2, obs_steps=3)
    for episode in range(2):
        given.clear()
        actor.reset([0])
        actions = [actor.step(np.array([float(t), -1.0])) for t in range(5)]
        assert [a.tolist() for a in actions] == [[0, 0], [1, 1], [100, 100], [101, 101], [200, 200]], episode
        assert [g[0, :, 0].tolist() for g in given] == [[0, 0, 0], [0, 1, 2], [2, 3, 4]]
    actor.reset([0, 1])
    assert actor.step(np.zeros((2, 2))).shape == (2, 2)


def test_chunks_that_are_too_short_for_the_delay_are_refused(policy, capsys, tmp_path):
    refuses(lambda: DelayedPolicy(Policy.load(policy, act_steps=8), 9), "delay: given 9", "0 … 8", "--act-steps")
    assert genkit(["rollout", str(policy), "--delay", "9", "--episodes", "2"]) == 2
    assert "delay: given 9" in capsys.readouterr().err
    usual = ["rollout", str(policy), "--episodes", "2", "--json", "--no-picture", "--out", str(tmp_path)]
    assert genkit([*usual, "--delay", "4", "--act-steps", "4"]) == 0
    assert genkit([*usual, "--delay", "4", "--act-steps", "4", "--execution", "ensemble"]) == 0
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["settings"]["delay"], r["settings"]["execution"]) for r in results] == [(4, "naive"), (4, "ensemble")]
    assert len(list(tmp_path.glob("*delay=4*.json"))) == 2
