"""Fine-tuning on the pretended device: no mismatch, and no more waits in a gradient step than are stated here."""

from dataclasses import replace

import pytest

from genkit.rl.finetune.ddpo import DDPO
from genkit.rl.finetune.dppo import DPPO
from genkit.rl.finetune.learner import Learner
from genkit.rl.finetune.mixed import Mixed
from genkit.rl.finetune.nft import NFT
from genkit.rl.finetune.rwr import RWR
from genkit.rl.finetune.settings import FinetuneSettings
from genkit.rl.finetune.setup import build_chain, build_learner, build_task
from genkit.rl.policies.episodes import run_episodes
from genkit.rl.policies.rollout import RolloutSettings, fit_q, load_policy, with_q
from genkit.training.run import load_run
from tests.support.pretended_device import CUDA, PretendedDevice

SMALL = {"batch": 64, "bc_batch": 16}
READ = 1  # a gradient step's means are read back once: DPPO decides by them whether to go on
FINITE = 1  # a function's rewards are checked, so that a message can name the sample


def brightness(x, cond):
    """The mean of each sample."""
    return x.float().flatten(1).mean(1)


CASES = {  # method, what rewards, waits of a gradient step
    "dppo": (DPPO(warmup=0, epochs=1, critic_epochs=1, **SMALL), "policy", READ),
    "rwr": (RWR(warmup=0, critic_epochs=1, **SMALL), "policy", READ),
    "mixed": (Mixed(warmup=0, critic_epochs=1, **SMALL), "policy", READ),
    "nft": (NFT(**SMALL, bc_coef=0.1), "moons", READ),
    "ddpo": (DDPO(**SMALL), "moons", READ),
    "mixed, through": (Mixed(gradient="through", **SMALL), "moons", READ + FINITE),
}


@pytest.mark.parametrize("name", CASES)
def test_an_iteration_mixes_no_devices(name, request, monkeypatch):
    method, run, allowed = CASES[name]
    reward = {"reward": "success", "num_envs": 8, "num_steps": 2, "steps": 2} if run == "policy" else {
        "reward": f"{__name__}:brightness", "samples": 16, "steps": 2}  # fmt: skip
    base = load_run(request.getfixturevalue(run), device="cpu")
    settings = FinetuneSettings(run=str(base.directory), method=method, **reward)
    waits, step = [], Learner.gradient_step

    def counted(self, *args, **kwargs):
        before = device.waits.copy()
        result = step(self, *args, **kwargs)
        waits.append(device.waits - before)
        return result

    monkeypatch.setattr(Learner, "gradient_step", counted)
    with PretendedDevice() as device:
        base = replace(base, nets={k: net.to(CUDA) for k, net in base.nets.items()}, device=CUDA)
        chain, (task, policy) = build_chain(settings, base), build_task(settings, base)
        learner = build_learner(settings, base, chain, policy is not None)
        task.begin(learner, 0)
        method.update(learner, task, task.collect(learner, 0), 0)
        assert all(p.device == CUDA for p in learner.state.nets["net"].parameters())
    assert waits
    assert max(sum(w.values()) for w in waits[1:] or waits) <= allowed, waits[-1]


def test_q_is_learned_and_heeded_on_the_device(policy, tmp_path):
    base = load_run(policy, device="cpu")
    settings = RolloutSettings(fit_q=6, best_of=2, q_guidance=1.0, steps=1)
    with PretendedDevice():
        nets = {k: net.to(CUDA) for k, net in base.nets.items()}
        actor = load_policy(replace(base, nets=nets, device=CUDA, directory=tmp_path), settings)
        env = actor.make_env(3, max_steps=16)
        fit_q(actor, env, settings)
        heeding = with_q(actor, settings)
        assert len(run_episodes(heeding, env, range(4)).returns) == 4
