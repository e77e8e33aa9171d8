"""Policies that observe images: how these are drawn, stored, encoded and passed in a rollout, and what is learned."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from genkit.backbones import BACKBONES, MLP
from genkit.backbones.embed import FramesEmbed
from genkit.cli.main import main as cli
from genkit.core import Draw, Frames, Spec, Vector, spec_from_dict, spec_to_dict
from genkit.data import DATA
from genkit.data.demonstrations.frames import WithFrames
from genkit.data.demonstrations.replay import Replay
from genkit.envs.four_ways import OBSTACLES, FourWays, draw_views
from genkit.rl.policies.episodes import run_episodes
from genkit.rl.policies.policy import Policy, VisualPolicy
from tests.support.refusals import refuses

ROOT = Path(__file__).parents[2]
RED = (215, 40, 40)


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path / "cache"))  # for mapped images


# -------------------------------------------------------------------------------------------------------- pictures
def test_an_image_shows_the_position():
    """The weighted centre of the coloured pixels is the position, to much less than a pixel."""
    places = np.array([[0.0, 0.6], [0.03, 0.6], [1.4, -0.7], [1.4, -0.68]])
    size = (48, 64)
    empty = draw_views(np.array([[50.0, 50.0]]), size)[0].astype(float)
    images = draw_views(places, size)
    assert images.shape == (4, 3, *size)
    assert images.dtype == np.uint8
    share = ((empty - images) / (empty - np.array(RED)[:, None, None] + 1e-9))[:, 1].clip(0, 1)
    x = -0.4 + 3.6 * (np.arange(64) + 0.5) / 64
    y = 0.9 - 1.8 * (np.arange(48) + 0.5) / 48
    middle = [(share.sum(1) * x).sum(1) / share.sum((1, 2)), (share.sum(2) * y).sum(1) / share.sum((1, 2))]
    assert np.allclose(np.stack(middle, 1), places, atol=0.008)  # a pixel is 0.056 by 0.038
    at = [int((px + 0.4) / 3.6 * 64) for px, _ in OBSTACLES]
    assert (empty[:, 24, at] < 130).all()
    world = FourWays(2)
    world.reset([3, 4])
    assert np.array_equal(world.pixels(size), draw_views(world.position, size))


# ------------------------------------------------------------------------------------------------------------ data
def test_images_are_stored_once_and_returned_in_windows():
    data = DATA["four-ways"](n=3, pixels=16, obs_steps=3).load()
    placed = DATA["four-ways"](n=3, obs_steps=3).load()
    assert isinstance(data, WithFrames)
    assert data.frames is not None
    assert len(data.frames) == sum(len(e.actions) for e in DATA["four-ways"](n=3).episodes("train"))
    assert torch.equal(data.x, placed.x)
    assert dict(data.spec.cond) == {"frames": Frames((3, 3, 16, 16))}  # without the position
    assert spec_from_dict(json.loads(json.dumps(spec_to_dict(data.spec)))) == data.spec
    rows = torch.tensor([0, 5, len(data) - 1])
    batch = data.batch(rows, Draw((0,), 0, 3))
    data.spec.check(batch.cond, 3)
    for shown, obs in zip(batch.cond["frames"], placed.cond["obs"][rows], strict=True):
        assert np.array_equal(shown.numpy(), draw_views(obs.double().numpy(), (16, 16)))
    assert torch.equal(batch.cond["frames"][0, 0], batch.cond["frames"][0, 2])  # before the start
    refuses(lambda: DATA["four-ways"](pixels=4).load(), "pixels: given 4", "8 or more")
    refuses(lambda: DATA["four-ways"](pixels=16, plan="states").load(), "plan, goal", "only images")


@pytest.fixture
def buffer(tmp_path):
    def make(**changes) -> str:
        rng = np.random.default_rng(0)
        arrays = {
            "img": rng.integers(0, 256, (30, 12, 10, 3), np.uint8),
            "wrist": rng.integers(0, 256, (30, 1, 12, 10), np.uint8),
            "obs": rng.normal(size=(30, 2)), "action": rng.normal(size=(30, 2)), "episode_ends": np.array([14, 30]),
        } | changes  # fmt: skip
        np.savez(tmp_path / "demos.npz", **arrays)
        return str(tmp_path / "demos.npz")

    return make


@pytest.mark.parametrize("kind", ["npz", "zarr"])
def test_replay_buffers_may_hold_images_of_several_cameras(buffer, tmp_path, kind):
    root = buffer()
    arrays = dict(np.load(root))
    if kind == "zarr":
        zarr = pytest.importorskip("zarr")
        root = str(tmp_path / "demos.zarr")
        group = zarr.open_group(root, mode="w")
        for name, values in arrays.items():
            group[f"meta/{name}" if name == "episode_ends" else f"data/{name}"] = values
    data = Replay(root=root, frames=("img", "wrist"), held_out=0.5)
    for split in ("train", "test"):
        loaded = data.load(split)
        assert loaded.spec.cond["frames"] == Frames((2, 4, 12, 10), (3, 1))
        assert isinstance(loaded.spec.cond["obs"], Vector)
        cond = loaded.batch(torch.tensor([3]), Draw((0,), 0, 1)).cond
        at = int(np.flatnonzero(np.isclose(arrays["obs"][:, 0], float(cond["obs"][0, 1, 0])))[0])
        both = np.concatenate([arrays["img"].transpose(0, 3, 1, 2), arrays["wrist"]], 1)
        assert np.array_equal(cond["frames"][0].numpy(), both[[at - 1, at]])
    alone = Replay(root=root, observed=(), frames=("img",)).load()
    assert list(alone.spec.cond) == ["frames"]


def test_arrays_that_are_not_images_are_refused(buffer):
    with_ = lambda **settings: lambda: Replay(root=buffer(**settings.pop("change", {})), **settings).load()  # noqa: E731
    refuses(with_(frames=("obs",)), "obs is (30, 2) of float64", "uint8 [N, H, W, 3]")
    refuses(with_(frames=("top",)), "no array 'top'", "img")
    refuses(with_(observed=()), "given neither")
    small = np.zeros((30, 6, 6, 3), np.uint8)
    refuses(with_(frames=("img", "wrist"), change={"img": small}), "wrist holds images of 12x10, img of 6x6")
    refuses(with_(frames=("img",), change={"img": small[:20]}), "img has 20 steps of 30", "episode 1")


# --------------------------------------------------------------------------------------------------------- networks
@pytest.mark.parametrize("family", ["mlp", "unet", "dit"])
def test_every_family_reads_images(family):
    spec = Spec((2, 16), {"frames": Frames((2, 3, 20, 28))})
    torch.manual_seed(0)
    net = BACKBONES[family]().denoiser(spec)
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    x, t = torch.randn(1, 2, 16).expand(4, -1, -1), torch.rand(1).expand(4)
    frames = torch.randint(0, 256, (4, 2, 3, 20, 28), dtype=torch.uint8)
    frames[1] = frames[0]
    frames[1, 0, 1, 3, 3] += 100  # one pixel of the older one
    frames[2] = frames[0].flip(0)
    out = net(x, t, {"frames": frames})
    assert out.shape == (4, 2, 16)
    assert not torch.allclose(out[0], out[1], atol=1e-6)
    assert not torch.allclose(out[0], out[2], atol=1e-4)  # their order matters
    keep = torch.tensor([True, False, False, True])
    null = net(x, t, {})
    dropped = net(x, t, {"frames": frames, "keep": keep})
    assert torch.allclose(dropped[1:3], null[1:3], atol=1e-5)
    assert torch.allclose(dropped[[0, 3]], out[[0, 3]], atol=1e-5)


def test_an_encoder_recovers_the_position():
    """Regression of the position from an image, after a second or two: to less than a pixel."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    places = np.stack([rng.uniform(0, 2.8, 1024), rng.uniform(-0.7, 0.7, 1024)], 1)
    frames = torch.from_numpy(draw_views(places, (32, 32)))[:, None]
    target = torch.from_numpy(places).float() / torch.tensor([1.4, 0.7]) - torch.tensor([1.0, 0.0])
    net, keep = FramesEmbed(Frames((1, 3, 32, 32)), 32), torch.ones(1024, dtype=torch.bool)
    head = nn.Linear(32, 2)
    optimizer = torch.optim.Adam([*net.parameters(), *head.parameters()], lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, 200)
    for _ in range(200):
        rows = torch.randint(896, (128,))
        loss = (head(net(frames[rows], keep[:128])) - target[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        error = (head(net(frames[896:], keep[896:])) - target[896:]).square().mean(0).sqrt()
    assert float(error.max()) < 0.08  # in half widths; 0.04 was measured, 0.58 without images; a pixel is 0.08


def test_images_are_checked_before_they_are_encoded():
    kind = Frames((2, 3, 8, 8))
    refuses(lambda: kind.check("frames", torch.zeros(4, 2, 3, 8, 9, dtype=torch.uint8), 4), "(4, 2, 3, 8, 8)", "uint8")
    refuses(lambda: kind.check("frames", torch.zeros(4, 2, 3, 8, 8), 4), "float32")
    wide = Spec((2, 16), {"frames": Frames((1, 3, 96, 960))})
    refuses(lambda: MLP().denoiser(wide), "pictures of 96x960, too long", "say 96x96")


# ---------------------------------------------------------------------------------------------------------- policies
QUICK = ["--device=cpu", "--tensorboard=false", "--sample-every=0", "--objective=flow", "--backbone=mlp"]
SMALL = ["--backbone.width=32", "--backbone.depth=1", "--data=four-ways", "--data.n=6", "--steps=5", "--ema"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("pixels")
    assert cli(["train", *QUICK, *SMALL, "--data.pixels=16", "--data.obs-steps=2", f"--out={out}"]) == 0
    return (out / "latest").resolve()


class Looking(FourWays):
    """Records each image that it rendered, and its step."""

    def __init__(self, num):
        super().__init__(num)
        self.shown = []

    def pixels(self, size):
        self.shown.append(super().pixels(size))
        return self.shown[-1]


def test_a_rollout_passes_the_newest_images(run):
    policy = Policy.load(run, steps=1, act_steps=3)
    assert type(policy) is VisualPolicy
    assert policy.obs_shape == (2, 0)
    assert policy.frame_shape == (3, 16, 16)
    images = []
    act = policy.act

    def spy(obs, frames=None, rows=None):
        images.append((obs, frames, rows))
        return act(obs, frames, rows)

    policy.act = spy  # type: ignore[method-assign]
    env = Looking(3)
    done = run_episodes(policy, env, range(3))
    assert all(obs.shape == (len(rows), 2, 0) for obs, _, rows in images)
    for d, (_, frames, rows) in enumerate(images):  # one episode a row; only those that go on are asked
        for shown, row in zip(frames, rows, strict=True):
            steps = [max(0, 3 * d - 1), 3 * d]
            assert np.array_equal(shown, draw_views(done.paths[row][steps], (16, 16)))
    assert {len(rows) for _, _, rows in images[:3]} == {3}
    one, many = (run_episodes(Policy.load(run, steps=1), FourWays(n), range(4)) for n in (2, 4))
    assert all(np.allclose(a, b, atol=1e-4) for a, b in zip(one.paths, many.paths, strict=True))


def test_wrong_images_are_refused_in_one_line(run, capsys, tmp_path):
    policy = Policy.load(run, steps=1)
    obs, frames = np.zeros((2, 2, 0)), np.zeros((2, 2, 3, 16, 16), np.uint8)
    assert policy.act(obs, frames).shape == (2, 8, 2)
    refuses(lambda: policy.act(obs, frames[..., :12]), "(2, 2, 3, 16, 12)", "needs (2, 2, 3, 16, 16)", "trained on")
    refuses(lambda: policy.act(obs, frames / 255), "float64", "uint8")
    refuses(lambda: policy.act(obs), "sees pictures; give them")

    class Blind(FourWays):
        pixels = None  # type: ignore[assignment]

    refuses(lambda: run_episodes(policy, Blind(1), [0]), "draws none")

    def refused(*argv):
        assert cli(list(argv)) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        return err

    assert "not plans or pictures; leave them out" in refused("rollout", str(run), "--best-of=2")
    assert cli(["rollout", str(run), "--episodes=2", "--json", f"--out={tmp_path}"]) == 0
    assert json.loads(capsys.readouterr().out)["episodes"] == 2


def test_a_policy_learns_from_recorded_images(tmp_path, capsys):
    out = tmp_path / "demos.npz"
    assert cli(["demo", "four-ways", "--episodes=4", "--pixels=16", f"--out={out}"]) == 0
    assert "--data.frames img" in capsys.readouterr().out
    with np.load(out) as stored:
        assert np.array_equal(stored["img"], draw_views(stored["obs"], (16, 16)).transpose(0, 2, 3, 1))
        ends = stored["episode_ends"]
        assert np.flatnonzero(stored["reward"]).tolist() == (ends - 1).tolist()
        assert stored["mode"][ends - 1].tolist() == [0, 1, 2, 3]
    settings = {
        "root": str(out),
        "frames": ("img",),
        "conditions": ("skill", "returns"),
        "skill": "mode",
        "reward": "reward",
    }
    data = Replay(**settings).load()
    assert sorted(data.spec.cond) == ["frames", "obs", "returns", "skill"]


def test_gymnasium_renders_in_the_requested_size():
    pytest.importorskip("gymnasium")
    pytest.importorskip("pygame")
    from genkit.envs import make

    env = make("Pendulum-v1", 2)
    env.reset([0, 1])
    images = env.pixels((24, 32))  # type: ignore[attr-defined]
    assert images.shape == (2, 3, 24, 32)
    assert images.dtype == np.uint8
    assert images.std() > 0


# ------------------------------------------------------------------------------------------------------------ figures
@pytest.mark.slow
def test_four_ways_are_taken_from_images(tmp_path):
    args = ["--config", str(ROOT / "configs/four_ways_pixels.yaml"), f"--out={tmp_path}", "--tensorboard=false"]
    assert cli(["train", *args, "--device=cpu"]) == 0
    done = run_episodes(Policy.load(tmp_path / "latest", steps=16), FourWays(200), range(100_000, 100_200))
    assert done.info["success"].mean() >= 0.8
    assert (done.mode_entropy_bits or 0) >= 1.8
