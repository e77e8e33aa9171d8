"""Post-hoc EMA: profiles in closed form, and averages that are reconstructed from snapshots of real runs."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from genkit import config
from genkit.cli.main import main
from genkit.core import Batch, Draw, Spec
from genkit.data.codecs import Identity
from genkit.evaluation.sweeps import SweepSettings, list_combinations
from genkit.training.averages import Average, ema_decay
from genkit.training.checkpoint import list_checkpoints
from genkit.training.directory import step_of
from genkit.training.distributed import create_sharding
from genkit.training.loop import fit, initial_state
from genkit.training.post_hoc_ema import list_snapshots, read_average, reconstruct, save_snapshot, snapshot_spacing
from genkit.training.power_ema import (
    combine_profiles,
    exponent_of,
    inner_products,
    power_decay,
    relative_width,
    slowest_key,
    width_of,
)
from genkit.training.run import load_run, open_reference
from genkit.training.settings import TrainSettings
from genkit.training.train import train
from tests.support.ranks import on_two_ranks

WIDTHS = [0.05, 0.075, 0.1, 0.15]


# ------------------------------------------------------------------------------------------------------ profiles
@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_width_and_exponent_are_inverse(width):
    """sigma_rel is the standard deviation of the density (g + 1) t^g on [0, 1], integrated numerically."""
    g = exponent_of(width)
    assert relative_width(g) == pytest.approx(width, rel=1e-9)
    t = np.linspace(0, 1, 400_001)
    density = (g + 1) * t**g
    mean = np.trapezoid(density * t, t)
    assert np.sqrt(np.trapezoid(density * (t - mean) ** 2, t)) == pytest.approx(width, rel=1e-4)


def test_exponents_of_the_paper():
    """Karras et al. 2024, section 3.2: the exponents of sigma_rel 0.05 and 0.10 are 16.97 and 6.94."""
    assert (exponent_of(0.05), exponent_of(0.1)) == pytest.approx((16.97, 6.94), abs=0.005)


def test_decay_makes_the_profile():
    """Averaging the unit vectors e_1 .. e_K gives the weights of the steps: (k^(g+1) - (k-1)^(g+1)) / K^(g+1)."""
    steps, average = 50, np.zeros(50)
    for step in range(steps):
        d = power_decay(0.1, step)
        average = d * average + (1 - d) * np.eye(steps)[step]
    edges = (np.arange(steps + 1) / steps) ** (exponent_of(0.1) + 1)
    np.testing.assert_allclose(average, np.diff(edges), rtol=1e-9)
    assert ema_decay("power-0.1", 7) == power_decay(0.1, 7)


def test_inner_products_are_integrals():
    t = np.linspace(0, 60, 600_001)

    def profile(width, end):
        g = exponent_of(width)
        return np.where(t <= end, (g + 1) * t**g / end ** (g + 1), 0)

    for (a, k), (b, m) in [((0.05, 60), (0.1, 60)), ((0.05, 30), (0.1, 60)), ((0.2, 60), (0.07, 45))]:
        expected = np.trapezoid(profile(a, k) * profile(b, m), t)
        found = inner_products(np.array(k), np.array(exponent_of(a)), np.array(m), np.array(exponent_of(b)))
        assert found == pytest.approx(expected, rel=1e-3)


def test_the_residual_is_the_distance_of_the_profiles():
    """On few snapshots, where it is large; with those of a whole training it is small."""
    t = np.linspace(0, 100, 200_001)

    def profile(width, end):
        g = exponent_of(width)
        return np.where(t <= end, (g + 1) * (t / end) ** g / end, 0)

    stored = [(k, w) for k in (40, 70, 100) for w in (0.05, 0.1)]
    weights, residual = combine_profiles(stored, 100, 0.2)
    difference = profile(0.2, 100) - sum(c * profile(w, k) for c, (k, w) in zip(weights, stored, strict=True))
    norm = np.trapezoid(profile(0.2, 100) ** 2, t)
    assert residual == pytest.approx(np.sqrt(np.trapezoid(difference**2, t) / norm), rel=1e-2)
    many = [(k, w) for k in range(2, 101, 2) for w in (0.05, 0.1)]
    assert combine_profiles(many, 100, 0.2)[1] < residual / 20


def test_reconstruction_of_a_drifting_walk():
    """Error <= 2e-5 of the distance between average and weights, for sigma_rel from 0.05 to 0.15: 64 snapshots of two
    averages, or 32 of three."""
    rng, size, steps = np.random.default_rng(0), 200, 2048
    w, averages, stored = np.zeros(size), {s: np.zeros(size) for s in (*WIDTHS, 0.2)}, []
    for step in range(steps):
        w = 0.999 * w + 0.05 * rng.normal(size=size) + 0.01 * np.sin(np.arange(size))
        for s, average in averages.items():
            d = power_decay(s, step)
            averages[s] = d * average + (1 - d) * w
        if (step + 1) % 32 == 0:
            stored += [(step + 1, s, averages[s].copy()) for s in (0.05, 0.1, 0.2)]
    two, three = [c for c in stored if c[1] < 0.2], [c for c in stored if c[0] % 64 == 0]
    for kept in (two, three):
        for s in WIDTHS:
            weights, _ = combine_profiles([(k, a) for k, a, _ in kept], steps, s)
            found = weights @ np.stack([v for _, _, v in kept])
            assert np.linalg.norm(found - averages[s]) <= 2e-5 * np.linalg.norm(averages[s] - w), s


@pytest.mark.parametrize(("step", "spacing"), [(10, 10), (40, 10), (50, 20), (80, 20), (100, 40), (330, 80)])
def test_spacing_doubles(step, spacing):
    assert snapshot_spacing(step, 10, 4) == spacing
    assert step // spacing <= 4


def test_names():
    assert width_of("power-0.1") == 0.1
    assert width_of("0.999") is None
    assert slowest_key([0.9, "power-0.2", 0.99]) == 0.99
    assert slowest_key(["power-0.05", "power-0.1"]) == "power-0.1"
    assert slowest_key([]) is None
    for wrong in ("power-", "power-0.5", "power-wide", "power-0"):
        with pytest.raises(ValueError, match=r"allowed power-WIDTH with 0 < WIDTH <= 0.28, such as power-0.1"):
            width_of(wrong)


# ---------------------------------------------------------------------------------------------------------- runs
def settings(tmp_path, **changes):
    small = {"name": "mlp", "width": 8, "depth": 1}
    return dict(objective="flow", data="moons", backbone=small, steps=128, batch=16, tensorboard=False, workers=0,
                sample_every=0, out=str(tmp_path), device="cpu", power_ema=[0.05, 0.1], power_ema_every=2,
                warmup=32, **changes)  # fmt: skip


def tensors(nets):
    return torch.cat([p.detach().flatten() for net in nets.values() for p in net.parameters()])


def keep_more(tmp_path, steps, *more):
    """A run with ``steps / 2`` snapshots, that also kept averages which tests reconstruct."""
    kept = {"power_ema": [0.05, 0.1, 0.075, 0.15, *more], "steps": steps, "schedule": "constant"}
    return train(**{**settings(tmp_path), **kept})


def reconstruction_error(run, width, stored=(0.05, 0.1)):
    """Distance from the average that was kept to the one from ``stored`` snapshots, in that to the weights."""
    raw = tensors(load_run(run.directory, ema="none").nets)
    expected = tensors(load_run(run.directory, ema=f"power-{width}").nets)
    few = replace(run.config, power_ema=stored)
    file = reconstruct(run.directory, list_checkpoints(run.directory)[-1], few, width)
    assert file == run.directory / f"averages/reconstructed/step-{run.step:07d}/ema-power-{width}.safetensors"
    found = torch.cat([v.flatten() for v in map(load_file(file).__getitem__, names(run.nets))])
    file.unlink()
    return float((found - expected).norm() / (expected - raw).norm())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return keep_more(tmp_path_factory.mktemp("runs"), 48)


def test_reconstructed_weights_are_those_that_were_averaged(run):
    """With few snapshots not exactly."""
    assert reconstruction_error(run, 0.075) < 5e-3


@pytest.mark.slow
def test_reconstruction_is_exact_with_the_default_number_of_snapshots(tmp_path):
    run = keep_more(tmp_path, 256)
    assert len(list_snapshots(run.directory)) == 128
    for width in (0.075, 0.15):
        assert reconstruction_error(run, width) < 2e-5


@pytest.mark.slow
def test_three_averages_need_fewer_snapshots_than_two(tmp_path):
    """From 32 snapshots 1.1e-5 and 7e-6, and from those of two averages 3e-4 and 1.1e-3."""
    run = train(**{**settings(tmp_path), "power_ema": [0.05, 0.1, 0.2, 0.075, 0.15], "steps": 256,
                   "schedule": "constant", "power_ema_every": 8})  # fmt: skip
    assert len(list_snapshots(run.directory)) == 32
    for width in (0.075, 0.15):
        error = reconstruction_error(run, width, (0.05, 0.1, 0.2))
        assert error < 2e-5 < reconstruction_error(run, width, (0.05, 0.1)) / 10


def names(nets):
    return [f"{net}.{key}" for net, module in nets.items() for key, _ in module.named_parameters()]


def test_a_sweep_and_autoguidance_take_any_width(run, capsys):
    directory = run.directory
    combinations = list_combinations(
        directory, SweepSettings(ema=("power-0.07", "power-0.12", "0.999"), steps=(2,)), torch.device("cpu")
    )
    assert len({samples.weights_sha256 for samples in combinations}) == 3
    weak = open_reference(load_run(directory, ema="power-0.07"), "ema:power-0.2")
    assert weak.weights.endswith("ema-power-0.2.safetensors")
    assert main(["eval", str(directory), "--ema", "power-0.12", "--n", "32", "--metrics", "w2", "--json"]) == 0
    assert '"ema": "power-0.12"' in capsys.readouterr().out
    main(["info", str(directory)])
    assert "power-0.15, power-WIDTH of any width" in " ".join(capsys.readouterr().out.split())


def test_snapshots_are_thinned_and_resumed_exactly(tmp_path):
    """A run that is stopped and resumed has the same snapshots, to the last bit, as one that never stopped."""
    short = {"power_ema_every": 3, "power_ema_keep": 4, "save_every": 10, "steps": 40}
    stopped = train(**{**settings(tmp_path / "b"), **short, "steps": 25, "schedule": "constant"})
    whole = train(**{**settings(tmp_path / "a"), **short, "schedule": "constant"})
    load_run(stopped.directory, ema="power-0.2", step=20)
    train(resume=stopped.directory, step=20, steps=22)
    assert [step_of(p) for p in list_snapshots(stopped.directory)] == [6, 12, 18]  # that of 24 is ahead
    resumed = train(resume=stopped.directory, steps=40)
    assert not (stopped.directory / "averages" / "reconstructed").exists()
    assert [step_of(p) for p in list_snapshots(resumed.directory)] == [12, 24, 36]
    for ours, theirs in zip(list_snapshots(resumed.directory), list_snapshots(whole.directory), strict=True):
        for name in ("ema-power-0.05.safetensors", "ema-power-0.1.safetensors"):
            a, b = load_file(ours / name), load_file(theirs / name)
            assert all(torch.equal(a[k], b[k]) for k in a | b)


def test_few_snapshots_are_said(tmp_path, caplog):
    trained = train(**{**settings(tmp_path), "steps": 40, "power_ema_every": 20})
    with caplog.at_level("WARNING"):
        load_run(trained.directory, ema="power-0.28")
    assert "as there are only 2 snapshots; keep more with --power-ema-every" in caplog.text


def test_damage_and_wrong_names_are_refused(tmp_path):
    trained = train(**{**settings(tmp_path), "steps": 8})
    with pytest.raises(ValueError, match=r"this run has: 0.999, power-0.05, power-0.1, none, power-WIDTH of any width"):
        load_run(trained.directory, ema="0.9")
    with pytest.raises(ValueError, match=r"given power-0.9; allowed power-WIDTH"):
        load_run(trained.directory, ema="power-0.9")
    victim = list_snapshots(trained.directory)[0] / "ema-power-0.05.safetensors"
    victim.write_bytes(victim.read_bytes()[:-4] + b"abcd")
    with pytest.raises(ValueError, match=r"step-0000002/ema-power-0.05.safetensors: is missing or damaged"):
        load_run(trained.directory, ema="power-0.07")
    plain = train(**{**settings(tmp_path), "steps": 2, "power_ema": []})
    with pytest.raises(ValueError, match=r"given power-0.1; this run has: 0.999, none"):
        load_run(plain.directory, ema="power-0.1")


def test_without_decays_the_widest_is_used(tmp_path):
    trained = train(**{**settings(tmp_path), "steps": 4, "ema": []})
    assert trained.weights.endswith("ema-power-0.1.safetensors")
    assert load_run(trained.directory).weights == trained.weights
    assert list_checkpoints(trained.directory)
    assert replace(TrainSettings(), power_ema=(0.05,)).power_ema_keep == 128


def test_the_update_is_the_average():
    """An average with a power function's name, against the weighted sum."""
    net, average = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    seen = []
    for step in range(6):
        torch.nn.init.normal_(net.weight)
        seen.append(net.weight.detach().clone())
        Average("power-0.1", {"net": average}, {"net": net}).update(step)
    edges = (torch.arange(7) / 6) ** (exponent_of(0.1) + 1)
    expected = sum(w * s for w, s in zip(edges.diff(), seen, strict=True))
    torch.testing.assert_close(average.weight, expected)


def test_sharded_runs_store_whole_averages(tmp_path):
    """Two ranks that share the weights write the snapshots of one process, up to rounding."""
    given = settings(tmp_path, parallel="fsdp")
    given = config.from_dict(TrainSettings, {**given, "steps": 3, "precision": "fp32"})

    def job(accelerator):
        objective, spec = given.objective, Spec((2,))
        torch.manual_seed(0)
        nets = objective.networks(given.backbone, spec)
        sharding = create_sharding(given, accelerator) if accelerator.num_processes > 1 else None
        state = initial_state(objective, nets, given, sharding)
        run = tmp_path / f"on-{accelerator.num_processes}"
        main = accelerator.is_main_process
        if main:
            (run / "checkpoints").mkdir(parents=True)

        def stream(step, draw, first, last):
            x = Draw((3, step, draw), first, last).normal(2)
            return Batch(x, {}, draw=Draw((4, step, draw), first, last), step=step)

        def snapshot(state):
            whole = state.gather(all_averages=True)
            if main:
                save_snapshot(run, whole, given)

        fit(objective, state, stream, Identity(), given, accelerator, snapshot=snapshot)

    job(Accelerator(cpu=True))
    on_two_ranks(job)
    one, two = (list_snapshots(tmp_path / name) for name in ("on-1", "on-2"))
    assert [p.name for p in one] == [p.name for p in two] == ["step-0000002", "step-0000003"]
    for ours, theirs in zip(one, two, strict=True):
        for width in (0.05, 0.1):
            a, b = read_average(ours, f"power-{width}"), read_average(theirs, f"power-{width}")
            assert a.keys() == b.keys()
            for key, value in a.items():
                torch.testing.assert_close(b[key], value, rtol=1e-4, atol=1e-6, msg=key)
