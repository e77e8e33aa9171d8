"""A gradient step shared by micro-batches and ranks is the step of one batch."""

import copy
import importlib
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from genkit.backbones import MLP
from genkit.cli.commands.finetune import main as finetune
from genkit.core import Batch, Draw, Spec, Vector
from genkit.data.codecs import Identity
from genkit.diffusion.paths import Linear
from genkit.evaluation.metrics import Moments
from genkit.rl.finetune.chain import Chain
from genkit.rl.finetune.direct import Direct
from genkit.rl.finetune.dppo import DPPO
from genkit.rl.finetune.frechet_reward import FrechetReward
from genkit.rl.finetune.learner import Critic, Learner
from genkit.rl.finetune.methods import METHODS
from genkit.rl.finetune.mixed import Mixed
from genkit.rl.finetune.noise import FixedNoise
from genkit.rl.finetune.tasks import FunctionTask
from genkit.training.directory import find_run, read_log
from genkit.training.loop import copy_for_ema, initial_state
from genkit.training.settings import TrainSettings
from genkit.training.sharding import Sharding
from tests.support.learning import PLAIN, make_learner, steps_of
from tests.support.ranks import kill_when, on_two_ranks

SHARED = {"lr": 1e-2, "batch": 30, "bc_batch": 7, "warmup": 0}
CASES = {name: method(**SHARED) for name, method in METHODS.items()} | {
    "dppo with kl": DPPO(**SHARED, epochs=2, kl=0.1, bc_coef=0.5),
    "mixed through": Mixed(**SHARED, gradient="through"),
    "direct frechet": Direct(**SHARED, population=60),
}
REWARDS = {"direct frechet": FrechetReward(torch.nn.Flatten(), Moments.of(Draw((0,), 0, 90).normal(2).double() + 1))}


def demos(number, start, stop):
    draw = Draw((number,), start, stop)
    return Batch(draw.normal(2).double(), draw=draw)


@pytest.fixture
def _doubles():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_doubles")
@pytest.mark.parametrize("name", CASES)
def test_micro_batches_change_nothing(name):
    torch.manual_seed(0)
    net = MLP(width=16, depth=1).denoiser(Spec((2,)))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    results = []
    for micro_batch in (None, 1, 7):
        method, chain = CASES[name], Chain.on_grid(Linear(), 3, FixedNoise(0.3))
        learner = make_learner(copy.deepcopy(net), steps_of(method, chain), Spec((2,)), demos=demos)
        learner.micro_batch = micro_batch
        reward = REWARDS.get(name, lambda x, cond: -x.square().sum(1))
        task = FunctionTask(reward, "near", Identity(), 45, 1)
        torch.manual_seed(5)
        experience, logs = method.collect(learner, task, 0)
        logs = method.update(learner, task, experience, 0)
        results.append((learner.state.nets["net"].state_dict(), logs, learner.draws, torch.randn(())))
    for weights, logs, draws, state in results[1:]:
        assert logs == pytest.approx(results[0][1], rel=1e-6)  # rewards are fp32
        assert (draws, state) == results[0][2:]  # as many demonstrations and random numbers are drawn
        for key, value in results[0][0].items():
            torch.testing.assert_close(weights[key], value, rtol=1e-6, atol=1e-8)


@pytest.mark.usefixtures("_doubles")
def test_micro_batches_of_the_critic_change_nothing():
    spec, results = Spec((1,), {"obs": Vector((1, 2))}), []
    torch.manual_seed(0)
    critic, obs, returns = Critic(spec, width=8, depth=1), torch.randn(40, 1, 2), torch.randn(40)
    critic.scale.fill_(2.0)
    for micro_batch in (None, 3):
        own = copy.deepcopy(critic)
        learner = make_learner(MLP(8, 1).denoiser(spec), Chain.on_grid(Linear(), 1, FixedNoise()), spec, critic=own)
        learner.micro_batch = micro_batch
        error = learner.fit_critic(obs, returns, torch.Generator().manual_seed(0), 2, 16)
        results.append((error, own.state_dict()))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-9)
    for key, value in results[0][1].items():
        torch.testing.assert_close(results[1][1][key], value, rtol=1e-9, atol=1e-12)


class Ranks:
    """Two ranks that run one after the other would see each other's gradients; here each sees only its own share."""

    def __init__(self, rank):
        self.num_processes, self.process_index = 2, rank


def test_ranks_share_all_rows_and_none_twice():
    learner = make_learner(MLP(8, 1).denoiser(Spec((1,))), Chain.on_grid(Linear(), 1, FixedNoise()), objective=PLAIN)
    rows = torch.arange(10, 17)
    parts = []
    for rank in range(2):
        learner.accelerator = Ranks(rank)
        parts += learner.shares(rows)
    assert torch.cat([share.rows for share in parts]).tolist() == rows.tolist()
    assert sum(share.weight for share in parts) == pytest.approx(1)
    learner.accelerator = Ranks(0)
    (idle,) = learner.shares(rows[:1])  # rank 1 has the only row; rank 0 repeats it, without weight
    assert (idle.rows.tolist(), idle.weight) == ([10], 0.0)


RANK_ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def rank_command(num, *argv):
    """``genkit finetune`` on ``num`` ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num}"]
    return [*command, "-m", "genkit", "finetune", *argv]


def ranks(num, *argv):
    """Run ``genkit finetune`` on ``num`` ranks."""
    done = subprocess.run(rank_command(num, *argv), env=RANK_ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def learned(name, sharding=None, accelerator=None):
    """All weights after an iteration of a method, by name, in float64."""
    torch.set_default_dtype(torch.float64)
    method, chain = CASES[name], Chain.on_grid(Linear(), 3, FixedNoise(0.3))
    torch.manual_seed(0)
    nets = {"net": MLP(width=16, depth=1).denoiser(Spec((2,)))}
    for p in nets["net"].parameters():
        torch.nn.init.normal_(p, std=0.3)
    settings = replace(TrainSettings(), ema=(0.5,), weight_decay=0.0)
    frozen = {k: copy_for_ema(v).requires_grad_(False).eval() for k, v in nets.items()}
    if sharding:
        sharding.stay_whole = True
        sharding.split_network(frozen["net"])
    state = initial_state(PLAIN, nets, settings, sharding)
    learner = Learner(PLAIN, state, steps_of(method, chain), Spec((2,)), demos, 0, frozen=frozen,
                      accelerator=accelerator, micro_batch=4)  # fmt: skip
    reward = REWARDS.get(name, lambda x, cond: -x.square().sum(1))
    task = FunctionTask(reward, "near", Identity(), 46, 1)
    for iteration in range(2):
        torch.manual_seed(5)
        experience, _ = method.collect(learner, task, iteration)
        method.update(learner, task, experience, iteration)
    whole = learner.gather_state()
    return {f"{kind}.{k}": v.detach() for kind, nets in (("net", whole.nets), *whole.emas.items())
            for k, v in nets["net"].state_dict().items()}  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("_doubles")
def test_two_ranks_that_share_the_weights_are_one_for_every_method():
    for module in ("genkit.training.sharding", "torch._dynamo"):  # what each rank would import for itself
        importlib.import_module(module)

    def job(accelerator):
        return {name: learned(name, Sharding.create("fsdp", None, accelerator), accelerator) for name in CASES}

    for answer in on_two_ranks(job):
        for name in CASES:
            for key, value in learned(name).items():
                # rewards are fp32
                torch.testing.assert_close(answer[name][key], value, atol=1e-6, rtol=0, msg=f"{name} {key}")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "how"), [("policy", "ddp"), ("digits", "ddp"), ("policy", "fsdp")])
def test_two_ranks_are_one_rank_to_rounding(kind, how, request, tmp_path):
    """Not to the last bit: each rank's networks see half of the rows, and matrix products round by their shape."""
    run = request.getfixturevalue(kind)
    argv = [str(run), "--iterations=2", "--save-every=1", "--device=cpu", "--no-tensorboard", "--method.lr=1e-3"]
    if kind == "policy":
        argv += ["--num-envs=8", "--num-steps=4", "--eval-episodes=4", "--method.batch=30", "--method.warmup=0"]
        argv += ["--exploration-noise=learned", "--checkpoint-eval-episodes=2"]
    else:
        argv += ["--reward=genkit.rl.finetune.image_rewards:brightness", "--samples=24", "--method=rwr"]
        argv += ["--eval-samples=20", "--method.batch=10", "--steps=3"]
    finetune([*argv, f"--out={tmp_path / 'one'}"])
    ranks(2, *argv, f"--parallel={how}", f"--out={tmp_path / 'two'}")
    one, two = (find_run(tmp_path / name / "latest") for name in ("one", "two"))
    for file in ("nets.safetensors", "ema-0.99.safetensors", "finetune.safetensors"):
        a, b = (load_file(run / "checkpoints" / "step-0000002" / file) for run in (one, two))
        assert a.keys() == b.keys()
        for key, value in a.items():
            torch.testing.assert_close(b[key], value, rtol=1e-3, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    for a, b in zip(read_log(one), read_log(two), strict=True):
        same = {k: v for k, v in a.items() if "seconds" not in k and "ms_per" not in k}
        assert {k: b[k] for k in same} == pytest.approx(same, rel=1e-2, abs=1e-4)


BRIGHT = ["--save-every=1", "--device=cpu", "--no-tensorboard", "--method.lr=1e-3", "--samples=24", "--method=rwr",
          "--reward=genkit.rl.finetune.image_rewards:brightness", "--eval-samples=0", "--method.batch=10",
          "--steps=3"]  # fmt: skip


def require_same_end(one, two, step):
    """The weights after ``step`` iterations, but for rounding."""
    for file in ("nets.safetensors", "ema-0.99.safetensors", "finetune.safetensors"):
        a, b = (load_file(run / "checkpoints" / f"step-{step:07d}" / file) for run in (one, two))
        assert a.keys() == b.keys()
        for key, value in a.items():
            torch.testing.assert_close(b[key], value, rtol=1e-3, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.slow
def test_one_process_goes_on_from_two_ranks_that_share_the_weights(digits, tmp_path):
    finetune([str(digits), *BRIGHT, "--iterations=2", f"--out={tmp_path / 'one'}"])
    ranks(2, str(digits), *BRIGHT, "--iterations=1", "--parallel=fsdp", f"--out={tmp_path / 'two'}")
    begun = find_run(tmp_path / "two" / "latest")
    finetune([f"--resume={begun}", "--iterations=2", "--parallel=ddp"])
    require_same_end(find_run(tmp_path / "one" / "latest"), begun, 2)


@pytest.mark.slow
def test_four_ranks_go_on_from_two_that_were_killed(digits, tmp_path):
    command = rank_command(2, str(digits), *BRIGHT, "--iterations=6", "--parallel=fsdp", f"--out={tmp_path / 'two'}")
    process = subprocess.Popen(command, env=RANK_ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    kill_when(process, lambda: list((tmp_path / "two").glob("0*/checkpoints/step-000000[1-5]")))
    (run,) = (tmp_path / "two").glob("0*")
    assert not (run / "checkpoints" / "step-0000006").exists()
    ranks(4, f"--resume={run}", "--parallel=hsdp", "--shard-size=2")
    finetune([str(digits), *BRIGHT, "--iterations=6", f"--out={tmp_path / 'one'}"])
    require_same_end(find_run(tmp_path / "one" / "latest"), run, 6)
