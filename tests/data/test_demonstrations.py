"""Demonstrations: windows of episodes, scalings, replay buffers and what is wrong with them."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from genkit.backbones import BACKBONES, MLP
from genkit.cli.main import main as cli
from genkit.core import Batch, Label, Spec, Vector, spec_from_dict, spec_to_dict
from genkit.data import DATA
from genkit.data.codecs import Actions
from genkit.data.demonstrations.replay import Replay
from genkit.data.demonstrations.windows import Episode, check_horizons, window_starts, window_steps
from genkit.envs.four_ways import GOAL
from tests.support.refusals import refuses


def test_windows_are_those_of_diffusion_policy():
    """Two episodes of 5 and 3 steps, To = 2, Tp = 4, Ta = 2, by hand: first and last step are repeated."""
    count = np.arange(8.0)[:, None]
    episodes = [Episode(count[:5], 10 * count[:5]), Episode(count[5:], 10 * count[5:])]
    steps, states = window_steps(episodes, 2, 4, 2)
    byhand = [[0, 0, 1, 2], [0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 4], [5, 5, 6, 7], [5, 6, 7, 7]]
    assert steps.tolist() == byhand
    assert states.tolist() == [[0, 0, 1, 2], [0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5], [6, 6, 7, 8], [6, 7, 8, 9]]
    assert window_starts(2, 1, 16, 8).tolist() == [0]  # too short, but at least one window
    # sampler.py of diffusion_policy: range(-pad_before, length - sequence_length + pad_after + 1)
    assert window_starts(161, 2, 16, 8).tolist() == list(range(-1, 161 - 16 + 7 + 1))


def test_horizons_have_to_nest():
    check_horizons(2, 16, 15)
    refuses(lambda: check_horizons(2, 16, 16), "act_steps: given 16", "leaves 15")
    refuses(lambda: DATA["four-ways"](pred_steps=4), "act_steps: given 8", "leaves 4")


@pytest.fixture
def buffer(tmp_path):
    def make(**changes) -> str:
        rng = np.random.default_rng(0)
        arrays: dict[str, Any] = {
            "obs": rng.normal(size=(40, 3)), "action": rng.normal(size=(40, 2)), "episode_ends": np.array([10, 25, 40]),
        } | changes  # fmt: skip
        np.savez(tmp_path / "demos.npz", **arrays)
        return str(tmp_path / "demos.npz")

    return make


def test_scalings_are_of_the_training_episodes_alone(buffer):
    test_episode = int(np.random.default_rng(0).permutation(3)[0])  # the one episode of three that a third takes
    wild = np.load(buffer())["action"].copy()
    wild[[0, 10, 25][test_episode]] = 1000.0
    loud = Replay(root=buffer(action=wild), held_out=1 / 3)
    train, test = loud.load("train"), loud.load("test")
    assert train.codec == test.codec
    assert isinstance(train.codec, Actions)
    assert train.spec == test.spec
    assert max(train.codec.scale) < 10
    assert float(test.codec.encode(Batch(test.x)).x.max()) > 100
    x = train.codec.encode(Batch(train.x)).x
    assert float(x.amin()) == pytest.approx(-1)
    assert float(x.amax()) == pytest.approx(1)
    assert len(Replay(root=buffer(), act_steps=8).load("train").x) == sum(n - 7 for n in (10, 15, 15))
    refuses(lambda: Replay(root=buffer()).load("test"), "no episode is left", "--data.held-out")


def test_constant_dimensions_and_scaled_observations(buffer):
    obs = np.load(buffer())["obs"].copy()
    obs[:, 1] = 7.0
    data = Replay(root=buffer(obs=obs), scaling="standardize").load()
    kind = data.spec.cond["obs"]
    assert isinstance(kind, Vector)
    assert kind.scale[1] == 1
    assert kind.shift[1] == pytest.approx(7)
    assert spec_from_dict(json.loads(json.dumps(spec_to_dict(data.spec)))) == data.spec
    nets = [
        MLP(width=16, depth=1).denoiser(Spec((2, 16), {"obs": k})) for k in (kind, replace(kind, shift=(), scale=()))
    ]
    for net in nets:
        torch.manual_seed(0)
        for p in net.parameters():  # at the start conditions have no effect
            nn.init.normal_(p, std=0.3)
    scaled, plain = nets
    by_hand = (data.cond["obs"] - torch.tensor(kind.shift)) / torch.tensor(kind.scale)
    x, t = torch.randn(len(data), 2, 16), torch.rand(len(data))
    out = scaled(x, t, {"obs": data.cond["obs"]})
    assert torch.allclose(out, plain(x, t, {"obs": by_hand}), atol=1e-4)
    assert not torch.allclose(out, plain(x, t, {"obs": data.cond["obs"]}), atol=0.01)


def test_relative_actions_come_back_absolute(buffer):
    root = buffer()
    relative = Replay(root=root, observed=("obs[2:3]", "obs[0:2]"), relative_to="obs[0:2]").load()
    absolute = Replay(root=root).load()
    assert isinstance(relative.codec, Actions)
    assert relative.codec.reference == (1.0, 2.0)
    x = relative.codec.encode(Batch(relative.x)).x
    assert torch.allclose(relative.codec.to_absolute(x, relative.cond["obs"]), absolute.x, atol=1e-5)
    assert not torch.allclose(relative.codec.decode(x), absolute.x, atol=0.1)
    refuses(lambda: Replay(root="x", relative_to="state"), "relative_to: given 'state'", "obs")


def test_zarr_buffers_read_as_npz_does(buffer, tmp_path):
    zarr = pytest.importorskip("zarr")
    arrays = dict(np.load(buffer()))
    group = zarr.open_group(str(tmp_path / "demos.zarr"), mode="w")
    for name, values in arrays.items():
        group[f"meta/{name}" if name == "episode_ends" else f"data/{name}"] = values
    one, two = (Replay(root=str(tmp_path / f"demos.{kind}")).load() for kind in ("npz", "zarr"))
    assert torch.equal(one.x, two.x)
    assert torch.equal(one.cond["obs"], two.cond["obs"])


def test_parts_of_a_zarr_that_are_not_stored_are_named(buffer, tmp_path, caplog):
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(str(tmp_path / "demos.zarr"), mode="w")
    for name, values in dict(np.load(buffer())).items():
        place = f"meta/{name}" if name == "episode_ends" else f"data/{name}"
        group.create_array(place, data=values, chunks=(10, *values.shape[1:]) if name == "action" else values.shape)
    Replay(root=str(tmp_path / "demos.zarr")).load()
    assert not caplog.records
    (tmp_path / "demos.zarr/data/action/c/2/0").unlink()
    assert not Replay(root=str(tmp_path / "demos.zarr")).load().x[25:27].any()
    assert "demos.zarr: 1 of 4 chunks of action are not stored and read as 0.0: " in caplog.text


def test_damaged_demonstrations_are_refused_with_the_episodes_number(buffer, tmp_path):
    good = np.load(buffer())
    broken = {k: good[k].copy() for k in good.files}
    broken["action"][12] = np.nan
    refuses(lambda: Replay(root=buffer(**broken)).load(), "episode 1 has an action that is not finite", "step 2")
    refuses(lambda: Replay(root=buffer(action=good["action"][:30])).load(), "action has 30 steps of 40", "episode 2")
    refuses(lambda: Replay(root=buffer(episode_ends=np.array([10, 10, 40]))).load(), "episode 1 is empty")
    refuses(lambda: Replay(root=buffer(), observed=("state",)).load(), "no array 'state'", "obs, action")
    refuses(lambda: Replay(root=buffer(), observed=("obs[5:]",)).load(), "obs[5:None] has no columns")
    refuses(lambda: Replay(root=buffer(), observed=("obs[a]",)).load(), "state[0:2]")
    refuses(lambda: Replay(root=str(tmp_path / "none.npz")).load(), "no such replay buffer", "genkit demo")
    path = tmp_path / "demos.npz"
    path.write_bytes(path.read_bytes()[:300])
    refuses(lambda: Replay(root=str(path)).load(), "cannot be read", "truncated")
    np.savez(path, action=np.array([{}], dtype=object), episode_ends=np.array([1]))
    refuses(lambda: Replay(root=str(path)).load(), "holds pickled objects")


def test_each_chunk_gets_its_nearest_anchor():
    data = DATA["four-ways"](n=8, anchors=4).load()
    kind = data.spec.cond["anchor"]
    assert isinstance(kind, Label)
    centers = torch.tensor(kind.centers).reshape(4, *data.spec.shape)
    x = data.codec.encode(Batch(data.x)).x
    distances = torch.stack([((x - c) ** 2).sum((1, 2)) for c in centers], 1)
    assert torch.equal(distances.argmin(1), data.cond["anchor"])
    assert torch.allclose(torch.stack([x[data.cond["anchor"] == k].mean(0) for k in range(4)]), centers, atol=0.05)


@pytest.mark.parametrize("family", [name for name in BACKBONES if 1 in BACKBONES[name].axes and name != "diffusers"])
def test_every_family_serves_action_chunks(family):
    data = DATA["four-ways"](n=2, obs_steps=2).load()
    net = BACKBONES[family]().denoiser(data.spec)
    out = net(torch.randn(3, 2, 16), torch.rand(3), {"obs": data.cond["obs"][:3]})
    assert out.shape == (3, 2, 16)


def test_recorded_demonstrations_are_learned_from(tmp_path, capsys):
    out = tmp_path / "demos.npz"
    assert cli(["demo", "four-ways", "--episodes=5", f"--out={out}"]) == 0
    assert "5 episodes" in capsys.readouterr().out
    data = Replay(root=str(out), env="four-ways", obs_steps=1).load()
    assert data.x.shape[1:] == (2, 16)
    with np.load(out) as stored:
        assert len(stored["episode_ends"]) == 5
        first = stored["obs"][: stored["episode_ends"][0]], stored["action"][: stored["episode_ends"][0]]
    assert np.allclose(first[0][:-1] + first[1][:-1], first[0][1:])  # each action leads to the next position
    assert np.linalg.norm(first[0][-1] + first[1][-1] - GOAL) < 0.25
