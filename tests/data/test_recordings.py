"""Published demonstrations: the same episodes through Minari, LeRobot v2 and v3, and as a replay buffer."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from genkit.cli.main import main as cli
from genkit.core import Batch, Draw
from genkit.data.demonstrations.lerobot import LeRobot
from genkit.data.demonstrations.minari import Minari
from genkit.data.demonstrations.replay import Replay
from genkit.data.demonstrations.windows import Episode, window_steps
from tests.support.refusals import refuses

LENGTHS = (12, 20, 9)  # ragged


def recorded(lengths=LENGTHS):
    """``[(obs [T + 1, 3], actions [T, 2], rewards [T])]``, float32 as these formats store them."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    return [(draw(n + 1, 3), draw(n, 2), draw(n)) for n in lengths]


@pytest.fixture
def truth(tmp_path):
    """The expected result, from a replay buffer."""
    episodes = recorded()
    np.savez(
        tmp_path / "truth.npz",
        obs=np.concatenate([o[:-1] for o, _, _ in episodes]),
        action=np.concatenate([a for _, a, _ in episodes]),
        episode_ends=np.cumsum(LENGTHS),
    )
    return lambda **settings: Replay(root=str(tmp_path / "truth.npz"), **settings)


def same(a, b):
    for split in ("train", "test"):
        one, two = a.load(split), b.load(split)
        assert torch.equal(one.x, two.x)
        assert torch.equal(one.cond["obs"], two.cond["obs"])
        assert one.codec == two.codec
        assert unnamed(one.spec) == unnamed(two.spec)


def unnamed(spec):
    """Without the names of the entries of an observation, which only recordings of dictionaries have."""
    return replace(spec, cond={**spec.cond, "obs": replace(spec.cond["obs"], entries=())})


# --------------------------------------------------------------------------------------------------------- LeRobot
def lerobot(folder: Path, version="v3.0", episodes=None, with_lengths=True, **changes) -> Path:
    """A dataset in LeRobot's layout. ``changes`` go to info.json."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    episodes = recorded() if episodes is None else episodes
    tables = []
    for i, (obs, actions, rewards) in enumerate(episodes):
        n = len(actions)
        columns = {
            "observation.state": pa.array(list(obs[:n]), pa.list_(pa.float32(), 3)),
            "action": pa.array(list(actions), pa.list_(pa.float32())),
            "next.reward": pa.array(rewards),
            "timestamp": pa.array(np.arange(n, dtype=np.float32) / 10),
            "frame_index": pa.array(np.arange(n)),
            "episode_index": pa.array(np.full(n, i)),
            "task_index": pa.array(np.zeros(n, np.int64)),
        }
        tables.append(pa.table(columns))
    (folder / "meta").mkdir(parents=True, exist_ok=True)
    chunk = folder / "data" / "chunk-000"
    chunk.mkdir(parents=True, exist_ok=True)
    rows = [{"episode_index": i, "length": len(a)} for i, (_, a, _) in enumerate(episodes)]
    if version.startswith("v2"):
        for i, table in enumerate(tables):
            parquet.write_table(table, chunk / f"episode_{i:06d}.parquet")
        if with_lengths:
            (folder / "meta/episodes.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    else:  # several episodes in a file, and not in the order of their names
        parquet.write_table(pa.concat_tables(tables[2:]), chunk / "file-000.parquet")
        parquet.write_table(pa.concat_tables(tables[:2]), chunk / "file-001.parquet")
        if with_lengths:
            (folder / "meta/episodes/chunk-000").mkdir(parents=True, exist_ok=True)
            parquet.write_table(pa.Table.from_pylist(rows), folder / "meta/episodes/chunk-000/file-000.parquet")
    info = {
        "codebase_version": version, "total_episodes": len(episodes), "total_frames": sum(r["length"] for r in rows),
        "fps": 10, "features": {
            "observation.state": {"dtype": "float32", "shape": [3]}, "action": {"dtype": "float32", "shape": [2]},
            "next.reward": {"dtype": "float32", "shape": [1]}, "observation.image": {"dtype": "video"},
            "episode_index": {"dtype": "int64", "shape": [1]}, "frame_index": {"dtype": "int64", "shape": [1]},
        },
    }  # fmt: skip
    (folder / "meta/info.json").write_text(json.dumps({**info, **changes}))
    return folder


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_lerobot_gives_the_same_windows_as_a_replay_buffer(tmp_path, truth, version):
    data = LeRobot(root=str(lerobot(tmp_path / "set", version)), held_out=0.34)
    same(data, truth(held_out=0.34))
    parts = ("observation.state[1:3]", "next.reward")
    some = LeRobot(root=data.root, observed=parts, relative_to=parts[0]).load()
    assert some.cond["obs"].shape[2] == 3
    steps, _ = window_steps([Episode(r[:, None], a) for _, a, r in recorded()], 2, 16, 8)
    rewards = np.concatenate([r for _, _, r in recorded()])[steps[:, :2]]
    assert torch.equal(some.cond["obs"][..., 2], torch.from_numpy(rewards))
    x = some.codec.encode(Batch(some.x)).x
    assert torch.allclose(some.codec.to_absolute(x, some.cond["obs"]), truth().load().x, atol=1e-5)  # type: ignore[attr-defined]


def test_damaged_lerobot_datasets_are_refused_with_the_episodes_number(tmp_path):
    def load(root):
        return lambda: LeRobot(root=str(root)).load()

    episodes = recorded()
    episodes[1][1][4] = np.nan
    refuses(load(lerobot(tmp_path / "nan", episodes=episodes)), "episode 1", "not finite", "step 4")
    for version, with_lengths in (("v2.1", True), ("v2.1", False), ("v3.0", True)):
        short = [*recorded()[:2], tuple(v[:5] for v in recorded()[2])]
        root = lerobot(tmp_path / f"{version}{with_lengths}", version, with_lengths=with_lengths)
        before = {p: p.read_bytes() for p in root.glob("meta/**/*") if p.is_file()}
        lerobot(root, version, short, with_lengths=with_lengths)
        for path, content in before.items():
            path.write_bytes(content)
        words = ("episode 2", "5 steps of 9") if with_lengths else ("3 episodes and 37 steps", "info.json says")
        refuses(load(root), *words)
    empty = lerobot(tmp_path / "empty", "v2.1", total_episodes=4)
    refuses(load(empty), "episode 3 is empty or its file is missing")
    cut = lerobot(tmp_path / "cut", "v2.1")
    file = cut / "data/chunk-000/episode_000001.parquet"
    file.write_bytes(file.read_bytes()[:300])
    refuses(load(cut), "episode_000001.parquet: cannot be read", "truncated?")
    ragged = recorded()
    ragged[1] = (ragged[1][0], [*ragged[1][1][:7], np.zeros(3, np.float32), *ragged[1][1][8:]], ragged[1][2])  # type: ignore[list-item]
    refuses(load(lerobot(tmp_path / "ragged", episodes=ragged)), "action", "another length", "episode 1, step 7")
    gap = recorded()
    gap[0] = (gap[0][0], [*gap[0][1][:2], None, *gap[0][1][3:]], gap[0][2])  # type: ignore[list-item]
    refuses(load(lerobot(tmp_path / "gap", episodes=gap)), "action has a gap", "episode 0, step 2")


def test_missing_steps_within_an_episode_are_refused(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")

    root = lerobot(tmp_path / "set", "v2.1", with_lengths=False, total_frames=40)
    file = root / "data/chunk-000/episode_000001.parquet"
    table = parquet.read_table(file)
    parquet.write_table(table.filter([i != 6 for i in range(len(table))]), file)
    refuses(lambda: LeRobot(root=str(root)).load(), "episode 1 has no step 6")


def test_folders_that_are_no_lerobot_dataset_are_refused(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    good = lerobot(tmp_path / "set")
    wants = lambda *names: lambda: LeRobot(root=str(good), observed=names).load()  # noqa: E731
    refuses(wants("observation.velocity"), "no array 'observation.velocity'", "observation.state, action")
    refuses(wants("observation.image"), "observation.image is a video, not numbers", "observation.state")
    old = lerobot(tmp_path / "old", codebase_version="v1.6")
    refuses(lambda: LeRobot(root=str(old)).load(), "format v1.6", "reads v2 and v3")
    (tmp_path / "bare").mkdir()
    refuses(lambda: LeRobot(root=str(tmp_path / "bare")).load(), "info.json", "missing or damaged")
    refuses(lambda: LeRobot(root=str(tmp_path / "absent")).load(), "no such folder", "--data.root")
    refuses(lambda: LeRobot(root="somebody/nothing").load(), "is not a folder", "cannot be reached for", "--data.root")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    refuses(wants("action"), "needs pyarrow", "pip install 'genkit-torch[data]'")


# ---------------------------------------------------------------------------------------------------------- Minari
def minari_set(name: str, episodes, kind="hdf5", nested=False, looks=None, **more):
    """A dataset that Minari itself writes; its folder."""
    minari = pytest.importorskip("minari")
    pytest.importorskip("h5py")
    from gymnasium import spaces
    from minari.data_collector import EpisodeBuffer
    from minari.storage.datasets_root_dir import get_dataset_path

    box = lambda n: spaces.Box(-np.inf, np.inf, (n,), np.float32)  # noqa: E731
    space = spaces.Dict({"place": box(1), "rest": spaces.Dict({"speed": box(2)})}) if nested else box(3)
    if looks:
        space = spaces.Dict({"state": box(3), "camera": spaces.Box(0, 255, (8, 9, 3), np.uint8)})
    buffers = []
    for i, (obs, actions, rewards) in enumerate(episodes):
        n = len(rewards)
        observations = {"place": obs[:, :1], "rest": {"speed": obs[:, 1:]}} if nested else obs
        observations = {"state": obs, "camera": looks[i]} if looks else observations
        ends = np.arange(n) == n - 1
        episode = {"observations": observations, "actions": actions, "rewards": rewards}
        episode |= {"terminations": ends, "truncations": ends & False, "infos": {}}
        buffers.append(EpisodeBuffer(id=i, seed=i, options=None, **episode))
    episode = minari.create_dataset_from_buffers(
        name, buffers, observation_space=space, action_space=more.get("action_space", box(2)), data_format=kind,
        algorithm_name="none", code_permalink="none", author="nobody", author_email="none", description="none",
        **({"jpeg_encoding": False} if looks else {}),
    )  # fmt: skip
    assert episode.total_episodes == len(episodes)
    return get_dataset_path(name)


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """The folder of Minari's datasets."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "minari"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["hdf5", "arrow"])
def test_minari_gives_the_same_windows_as_a_replay_buffer(shelf, truth, kind):
    folder = minari_set("test/push-v0", recorded(), kind)
    same(Minari(root=str(folder), held_out=0.34), truth(held_out=0.34))
    same(Minari(root=str(folder / "data"), held_out=0.34), truth(held_out=0.34))
    same(Minari(root="test/push-v0", held_out=0.34), truth(held_out=0.34))


@pytest.mark.filterwarnings("ignore")
def test_entries_of_dictionaries_are_observed_in_the_requested_order(shelf, truth):
    root = str(minari_set("test/nested-v0", recorded(), nested=True))
    same(Minari(root=root, held_out=0.34), truth(held_out=0.34))  # all, in their order
    turned = Minari(root=root, observed=("rest.speed", "place"), relative_to="rest.speed").load()
    assert turned.spec.cond["obs"].entries == ("rest.speed", "place")
    assert Minari(root=root, observed=("rest.speed",)).load().spec.cond["obs"].entries == ("rest.speed",)
    complete = truth().load()
    assert torch.equal(turned.cond["obs"], complete.cond["obs"][..., [1, 2, 0]])
    x = turned.codec.encode(Batch(turned.x)).x
    assert torch.allclose(turned.codec.to_absolute(x, turned.cond["obs"]), complete.x, atol=1e-5)  # type: ignore[attr-defined]
    refuses(lambda: Minari(root=root, observed=("speed",)).load(), "no array 'speed'", "place, rest.speed")
    refuses(lambda: Minari(root=root, relative_to="speed").load(), "relative_to: given 'speed'", "place, rest.speed")


@pytest.mark.filterwarnings("ignore")
def test_images_of_minari_are_observed_as_images(shelf, truth):
    rng = np.random.default_rng(1)
    looks = [rng.integers(0, 256, (len(o), 8, 9, 3), np.uint8) for o, _, _ in recorded()]
    root = str(minari_set("test/camera-v0", recorded(), looks=looks))
    same(Minari(root=root, held_out=0.34), truth(held_out=0.34))  # only the state
    assert Minari(root=root).load().spec.cond["obs"].entries == ("state",)  # which the environment is to give
    data = Minari(root=root, frames=("camera",)).load()
    cond = data.batch(torch.tensor([0]), Draw((0,), 0, 1)).cond
    assert np.array_equal(cond["frames"][0, 1].numpy(), looks[0][0].transpose(2, 0, 1))
    assert torch.equal(cond["obs"], truth().load().cond["obs"][:1])


@pytest.mark.filterwarnings("ignore")
def test_damaged_minari_datasets_are_refused_with_the_episodes_number(shelf, monkeypatch):
    h5py = pytest.importorskip("h5py")
    episodes = recorded()
    episodes[2][1][3] = np.inf
    bad = minari_set("test/infinite-v0", episodes)
    refuses(lambda: Minari(root=str(bad)).load(), "episode 2 has an action that is not finite", "step 3")

    complete = minari_set("test/whole-v0", recorded())
    file = complete / "data/main_data.hdf5"
    kept = file.read_bytes()
    with h5py.File(file, "a") as f:
        del f["episode_1"]
    refuses(lambda: Minari(root=str(complete)).load(), "episode 1 cannot be read")
    file.write_bytes(kept)
    with h5py.File(file, "a") as f:
        f["episode_1/actions"].resize((15, 2))
    refuses(lambda: Minari(root=str(complete)).load(), "episode 1", "20 rewards and 15 of action")
    with h5py.File(file, "a") as f:
        for name, n in (("actions", 0), ("rewards", 0), ("observations", 1)):
            f[f"episode_1/{name}"].resize((n, *f[f"episode_1/{name}"].shape[1:]))
    refuses(lambda: Minari(root=str(complete)).load(), "episode 1 is empty")
    file.write_bytes(kept[: len(kept) // 2])
    refuses(lambda: Minari(root=str(complete)).load(), "cannot be read", "truncated")
    file.write_bytes(kept)
    about = json.loads((complete / "data/metadata.json").read_text())
    (complete / "data/metadata.json").write_text(json.dumps({**about, "total_steps": 50}))
    refuses(lambda: Minari(root=str(complete)).load(), "holds 41 steps of 50")
    # without a stored space Minari would make the environment, of whatever class the dataset names
    code = {"id": "x-v0", "entry_point": "antigravity:geohash", "additional_wrappers": []}
    with_lengths = {**{k: v for k, v in about.items() if k != "observation_space"}, "env_spec": json.dumps(code)}
    (complete / "data/metadata.json").write_text(json.dumps(with_lengths))
    refuses(lambda: Minari(root=str(complete)).load(), "metadata.json has no observation_space")
    assert "antigravity" not in sys.modules


@pytest.mark.filterwarnings("ignore")
def test_datasets_that_minari_does_not_have_are_refused(shelf, tmp_path, monkeypatch):
    minari = pytest.importorskip("minari")
    from gymnasium import spaces

    steps = [(o, np.zeros(len(a), np.int64), r) for o, a, r in recorded()]
    turns = minari_set("test/turns-v0", steps, action_space=spaces.Discrete(3))
    refuses(lambda: Minari(root=str(turns)).load(), "Discrete(3)", "needs boxes")
    (tmp_path / "bare").mkdir()
    refuses(lambda: Minari(root=str(tmp_path / "bare")).load(), "is not a dataset that Minari")

    def offline(name):
        raise OSError("no network")

    monkeypatch.setattr(minari, "download_dataset", offline)
    refuses(lambda: Minari(root="D4RL/door/human-v2").load(), "cannot be downloaded (no network)", "--data.root")
    monkeypatch.setitem(sys.modules, "minari", None)
    refuses(lambda: Minari(root=str(turns)).load(), "needs Minari", "pip install 'genkit-torch[data]'")


# -------------------------------------------------------------------------------------------------------- the CLI
def test_a_policy_is_trained_on_a_lerobot_dataset(tmp_path, capsys):
    root = lerobot(tmp_path / "set")
    args = ["--device=cpu", "--tensorboard=false", "--sample-every=0", "--backbone.width=16", "--steps=3"]
    assert cli(["train", "--data=lerobot", f"--data.root={root}", *args, f"--out={tmp_path}/runs"]) == 0
    assert "samples of 2x16" in capsys.readouterr().out
    assert cli(["train", "--data=lerobot", f"--data.root={tmp_path}/none", *args]) == 2
    assert capsys.readouterr().err.count("\n") == 1
