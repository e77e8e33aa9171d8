"""Environments of one's own: ``module:Env-v0`` with keyword arguments, a time limit, and observations by name."""

import json

import numpy as np
import pytest

pytest.importorskip("gymnasium")

from genkit.cli.main import main as genkit
from genkit.core import Spec, Vector, spec_from_dict, spec_to_dict
from genkit.data.demonstrations.replay import Replay
from genkit.envs import ENVS, make, parse_arguments
from genkit.envs.gym import create
from tests.support.refusals import refuses

REACH, SHELF = "tests.support.worlds:Reach-v0", "tests.support.worlds:Shelf-v0"


def test_the_module_of_an_environment_is_imported():
    env = make(REACH, 2, goal=3.0)
    assert (env.obs_dim, env.action_dim, env.max_steps) == (2, 1, 12)
    assert env.reset([0, 1])[:, 1].tolist() == [3, 3]
    refuses(lambda: make("no_such_robot:Reach-v0", 1), "there is no module no_such_robot")
    refuses(lambda: make("tests.no_such_part:Reach-v0", 1), "there is no module tests.no_such_part")
    refuses(lambda: make("tests.support.worlds:Reech-v0", 1), "Reech-v0")
    refuses(lambda: make(REACH, 1, gaol=3.0), "env_args", "gaol=3.0")
    refuses(lambda: make("four-ways", 1, gaol=3.0), "env_args: four-ways takes none", "gaol")


def test_arguments_are_yaml():
    assert parse_arguments(["a=1", "b=dense", "c=[1, 2]", "d=x=y", "e=true"]) == {
        "a": 1, "b": "dense", "c": [1, 2], "d": "x=y", "e": True,
    }  # fmt: skip
    for text in ("a", "=1", "a b=1", "a=[", "a-b=1"):
        refuses(lambda text=text: parse_arguments([text]), "env_args")
    refuses(lambda: parse_arguments(["a=1", "a=2"]), "each name once")


@pytest.mark.parametrize("name", [*ENVS, "Pendulum-v1", REACH])
@pytest.mark.parametrize("limit", [5, 400])
def test_every_environment_takes_a_time_limit_shorter_or_longer_than_its_own(name, limit):
    if name == "pusht":
        pytest.importorskip("gym_pusht")
    env = make(name, 1, max_steps=limit)
    env.reset([0])
    lengths = [i for i in range(limit) if env.step(np.zeros((1, env.action_dim)))[3].any()]
    assert lengths == [limit - 1]


def test_entries_of_observations_are_ordered_by_the_recording():
    assert make(SHELF, 1).reset([0])[0, :2].tolist() == [1, 7]  # by name, as Minari stores them
    assert make(SHELF, 1, entries=("agoal", "zpos")).reset([0])[0, :2].tolist() == [1, 7]
    assert make(SHELF, 1, entries=("zpos", "agoal")).reset([0])[0, 1:].tolist() == [1, 7]
    assert make(SHELF, 1, entries=("agoal",)).reset([0]).tolist() == [[1, 7]]
    refuses(lambda: make(SHELF, 1, entries=("agoal", "speed")), "no 'speed'", "zpos")


def test_names_of_another_recording_are_mentioned(caplog):
    make(SHELF, 1, entries=("observation.state", "observation.goal"))
    assert "given agoal, zpos, in this order" in caplog.text


def test_the_order_of_the_entries_travels_with_the_run(tmp_path):
    file = tmp_path / "demos.npz"
    rng = np.random.default_rng(0)
    arrays = {"zpos": rng.normal(size=(20, 1)), "agoal": rng.normal(size=(20, 2)), "action": rng.normal(size=(20, 1))}
    np.savez(file, episode_ends=np.array([8, 20]), **arrays)
    spec = Replay(root=str(file), observed=("zpos", "agoal")).load("train").spec
    assert spec_from_dict(spec_to_dict(spec)) == spec
    assert spec.cond["obs"].entries == ("zpos", "agoal")
    one = Replay(root=str(file), observed=("agoal",)).load("train").spec
    assert one.cond["obs"].entries == ()
    assert "entries" not in spec_to_dict(Spec((1, 2), {"obs": Vector((1, 1))}))["cond"]["obs"]


def test_from_demonstrations_to_reward_on_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert create(REACH).spec.id == "Reach-v0"
    search = ["--expert=ars", "--expert.target", "-20", "--expert.rounds", "20"]
    arguments = ["--env-args", "goal=0.5", "reward_type=dense"]
    assert genkit(["demo", REACH, "--episodes", "4", "--keep-failures", *search, *arguments]) == 0
    out = capsys.readouterr().out
    assert (tmp_path / "Reach-v0.npz").is_file()
    line = out.splitlines()[-1].removeprefix("next     genkit ").split()  # the printed step runs as printed
    tiny = "--steps 3 --batch 16 --backbone.width 8 --backbone.depth 1 --sample-every 0 --no-tensorboard --device cpu"
    assert genkit([*line, *tiny.split(), "--workers", "0"]) == 0
    capsys.readouterr()
    assert genkit(["rollout", "runs/latest", "--episodes", "2", "--max-steps", "6", "--json", "--no-picture"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["episodes"], result["length"]) == (2, 6)
    improve = "--num-envs 2 --num-steps 2 --iterations 1 --eval-episodes 2 --no-tensorboard --device cpu"
    assert genkit(["finetune", "runs/latest", *improve.split(), "--env-args", "reward_type=sparse"]) == 0
