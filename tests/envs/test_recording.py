"""Recording an expert: one call that returns what it wrote, prints nothing and refuses in one line."""

import numpy as np
import pytest

from genkit.data.demonstrations.replay import Replay
from genkit.envs.ars import LinearPolicy, episode_returns
from genkit.envs.four_ways import FourWaysExpert
from genkit.envs.recording import DemoSettings, Saved, record_demonstrations, run_wave
from tests.support.breaking import Gaps
from tests.support.refusals import refuses


def test_a_recording_is_a_replay_buffer(tmp_path, capsys):
    calls = []
    settings = DemoSettings(env="four-ways", episodes=8, seed=3)
    made = record_demonstrations(settings, tmp_path / "d.npz", progress=lambda *call: calls.append(call))
    assert capsys.readouterr() == ("", "")
    assert calls[-1] == ("episodes", 8, 8)
    assert made.returns == (1.0,) * 8
    assert made.num_tried >= 8
    assert made.expert_path is None
    with np.load(made.path) as stored:
        assert list(stored) == ["episode_ends", "obs", "action", "reward", "mode"]
        assert stored["episode_ends"][-1] == made.num_steps == len(stored["obs"])
    assert len(Replay(root=str(made.path), obs_steps=1).episodes("train")) == 8


def test_failures_are_dropped_unless_they_are_wanted(tmp_path, monkeypatch):
    act = FourWaysExpert.act
    monkeypatch.setattr(FourWaysExpert, "act", lambda self, obs: act(self, obs) * (self.modes > 1)[:, None])
    made = record_demonstrations(DemoSettings(env="four-ways", episodes=8), tmp_path / "a.npz")
    assert (len(made.returns), made.num_tried) == (8, 16)
    assert min(made.returns) == 1
    both = record_demonstrations(DemoSettings(env="four-ways", episodes=8, keep_failures=True), tmp_path / "b.npz")
    assert (both.num_tried, sorted(set(both.returns))) == (8, [0.0, 1.0])


def test_a_linear_expert_is_saved_beside_its_recording(tmp_path):
    policy = LinearPolicy(
        np.zeros((2, 2)), np.zeros(2), np.ones(2), np.array([0.1, 0.0]), np.array([0.1, 0.0]), "by hand"
    )
    policy.save(tmp_path / "e.json")
    settings = DemoSettings(env="four-ways", expert=Saved(str(tmp_path / "e.json")), episodes=4, keep_failures=True)
    made = record_demonstrations(settings, tmp_path / "d.npz")
    assert (made.expert_path, made.expert_origin) == (tmp_path / "d.expert.json", "by hand")
    assert np.array_equal(LinearPolicy.load(made.expert_path).low, policy.low)


def test_what_is_no_replay_buffer_is_refused_before_anything_is_recorded(tmp_path):
    with pytest.raises(ValueError, match=r"d\.zip; a replay buffer is an \.npz"):
        record_demonstrations(DemoSettings(env="four-ways"), tmp_path / "d.zip")


@pytest.mark.parametrize("name", ["obs", "reward"])
def test_what_is_no_number_is_the_environments_fault(name):
    expert = LinearPolicy(np.zeros((1, 1)), *np.ones((4, 1)))
    told = f"env: gave {name} nan in step 3 of the episode of seed 8;"
    refuses(lambda: run_wave(Gaps(2, name), expert, [7, 8], None), told)
    refuses(lambda: episode_returns(Gaps(2, name), expert, [7, 8]), told)
