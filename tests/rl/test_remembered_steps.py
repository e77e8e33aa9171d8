"""How a policy acts is stored with its run: sampler steps, their grid and the actions of a chunk."""

import json

import numpy as np
import pytest
import torch

from genkit.cli.commands.finetune import main as finetune
from genkit.cli.commands.train import main as train
from genkit.cli.main import main as genkit
from genkit.integrations.export import export
from genkit.integrations.hub import PATTERNS
from genkit.rl.policies.policy import Policy
from genkit.training.directory import find_run


@pytest.fixture(scope="module")
def tuned(policy, tmp_path_factory):
    out = tmp_path_factory.mktemp("tuned")
    finetune([str(policy), "--steps", "2", "--grid", "logsnr", "--act-steps", "1", "--iterations", "1",
              "--num-envs", "4", "--num-steps", "2", "--eval-episodes", "0", "--no-tensorboard", "--device=cpu",
              "--out", str(out)])  # fmt: skip
    return find_run(out / "latest")


def act(policy):
    policy.reset([5])
    return policy.act(np.zeros(policy.obs_shape, np.float32)[None])


def test_a_fine_tuned_policy_acts_as_it_was_trained(tuned, policy, caplog):
    usual = Policy.load(tuned)
    assert (usual.steps, usual.act_steps) == (2, 1)
    assert np.array_equal(act(usual), act(Policy.load(tuned, steps=2, grid="logsnr", act_steps=1)))
    assert not np.array_equal(act(usual), act(Policy.load(tuned, grid="uniform")))
    assert not caplog.text
    assert Policy.load(tuned, steps=3).steps == 3
    assert "given 3, but" in caplog.text
    assert "was fine-tuned with 2" in caplog.text
    assert (Policy.load(policy).steps, Policy.load(policy).act_steps) == (4, Policy.load(policy, steps=4).act_steps)


def test_rollouts_and_further_fine_tuning_take_it_over(tuned, tmp_path, capsys):
    assert genkit(["rollout", str(tuned), "--episodes", "2", "--max-steps", "4", "--json", "--no-picture"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == 2
    finetune([str(tuned), "--iterations", "1", "--num-envs", "4", "--num-steps", "2", "--eval-episodes", "0",
              "--no-tensorboard", "--device", "cpu", "--out", str(tmp_path)])  # fmt: skip
    again = Policy.load(tmp_path / "latest")
    assert (again.steps, again.act_steps) == (2, 1)
    assert json.loads((find_run(tmp_path / "latest") / "policy.json").read_text())["grid"] == "logsnr"


RECORDS = {
    "base.json",
    "env.json",
    "finetune.yaml",
    "log.jsonl",
    "before.json",
    "after.json",
    "best.json",
    "notes.json",
    "q.safetensors",
}  # not exported: what was done, and Q of other weights' names


def test_an_exported_run_acts_as_the_run(tuned, tmp_path):
    export(tuned, tmp_path / "out", to="run")
    mine, other = Policy.load(tuned), Policy.load(tmp_path / "out")
    assert (other.steps, other.act_steps) == (2, 1)
    assert np.array_equal(act(mine), act(other))
    left = {p.name for p in tuned.iterdir() if p.is_file()} - {p.name for p in (tmp_path / "out").iterdir()}
    assert {name for name in left if not name.startswith(".")} <= RECORDS, "exported, or a record?"
    (tuned / "inverse.safetensors").write_bytes(b"learned")
    export(tuned, tmp_path / "again", to="run")
    (tuned / "inverse.safetensors").unlink()
    assert (tmp_path / "again" / "inverse.safetensors").read_bytes() == b"learned"
    assert {"pipeline.json", "policy.json", "inverse.safetensors"} <= set(PATTERNS), "downloaded from the hub"


def test_an_anchored_flow_takes_one_step(tmp_path):
    train(["--objective=anchored", "--data=four-ways", "--data.n=20", "--data.anchors=4", "--backbone.width=16",
           "--backbone.depth=1", "--steps=2", "--sample-every=0", "--no-tensorboard", "--device=cpu", "--workers=0",
           "--out", str(tmp_path)])  # fmt: skip
    assert Policy.load(tmp_path / "latest").steps == 1


def test_a_damaged_record_is_refused(tuned):
    file = tuned / "policy.json"
    content = file.read_text()
    file.write_text(content[:9])
    with pytest.raises(ValueError, match="is damaged"):
        Policy.load(tuned)
    file.write_text(content)


def test_an_exported_model_acts_as_the_adapter_that_was_merged_into_it(policy, tmp_path):
    pytest.importorskip("peft")
    finetune([str(policy), "--lora.rank", "2", "--steps", "2", "--act-steps", "1", "--iterations", "1",
              "--num-envs", "4", "--num-steps", "2", "--eval-episodes", "0", "--no-tensorboard", "--device=cpu",
              "--out", str(tmp_path / "adapters")])  # fmt: skip
    adapter = find_run(tmp_path / "adapters" / "latest")
    export(policy, tmp_path / "out", to="run", lora=str(adapter))
    assert (Policy.load(tmp_path / "out").steps, Policy.load(tmp_path / "out").act_steps) == (2, 1)
    export(policy, tmp_path / "policy.pt", to="torchscript", lora=str(adapter))
    graph = torch.jit.load(tmp_path / "policy.pt")
    spec = Policy.load(policy).run.spec
    noise, obs = torch.zeros(1, *spec.shape), torch.zeros(1, *spec.cond["obs"].shape)
    assert graph(noise, obs).shape[1] == 1
    export(policy, tmp_path / "base", to="run")
    assert Policy.load(tmp_path / "base").steps == 4
