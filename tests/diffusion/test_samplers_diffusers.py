"""Samplers and grids against diffusers' schedulers, state by state."""

import pytest
import torch

from genkit.core import Prediction
from genkit.diffusion.parametrization import Karras, NetDenoiser
from genkit.diffusion.paths import VE, VP, Linear
from genkit.diffusion.posterior import LearnedVariance
from genkit.diffusion.samplers import (
    ancestral,
    bind,
    ddim,
    dpmpp_2m,
    dpmpp_3m,
    dpmpp_sde,
    heun,
    karras,
    leading,
    linspace,
    nodes,
    trailing,
    unipc,
)
from tests.support.samplers import agree, normals


def epsilon(x, k):
    """A smooth stand-in for a network's output, at the integer time k."""
    return torch.tanh(x * 0.7 + k / 1000) * 0.9


class FromEpsilon:
    """The same stand-in as a denoiser; t = (k + 1) / 1000."""

    path = VP()

    def __call__(self, x, t, cond):
        eps = epsilon(x, t[0] * 1000 - 1)
        a, s = self.path.alpha(t)[:, None], self.path.sigma(t)[:, None]
        return Prediction((x - s * eps) / a, eps)


def theirs(scheduler, steps, x, **how):
    """Every state of a diffusers sampler, and the times that it visits, in our convention."""
    scheduler.set_timesteps(steps)
    states = []
    for k in scheduler.timesteps:
        x = scheduler.step(epsilon(x, k), k, x, **how).prev_sample
        states.append(x)
    times = torch.cat([(scheduler.timesteps.double() + 1) / 1000, torch.zeros(1)])
    return states, times


def ours(sampler, x, times, **how):
    states = []
    sampler(FromEpsilon(), x, times, callback=lambda i, x, p: states.append(x), **how)
    return states


@pytest.mark.parametrize("steps", [4, 10, 50])
def test_ddim_agrees_with_diffusers(steps):
    """ "leading" spacing, the only one whose previous step diffusers gets right (its issue 11347)."""
    from diffusers import DDIMScheduler

    s = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=0, timestep_spacing="leading")
    x = normals(6)
    states, times = theirs(s, steps, x)
    # their last step goes to k = 0, one step of the table short of the data; the others are ours
    agree(ours(ddim, x, times)[:-1], states[:-1])
    last = torch.cat([times[:-1], torch.tensor([1 / 1000])])
    if times[-2] > 1 / 1000:
        agree(ours(ddim, x, last)[-1:], states[-1:])


def test_ddim_eta_agrees_with_diffusers():
    from diffusers import DDIMScheduler

    s = DDIMScheduler(clip_sample=False, set_alpha_to_one=True, timestep_spacing="leading")
    s.set_timesteps(10)
    x, noise = normals(6), [normals(6, seed=k) for k in range(1, 11)]
    times = torch.cat([(s.timesteps.double() + 1) / 1000, torch.zeros(1)])
    given = iter(noise)
    mine = ours(ddim, x, times, eta=0.7, noise=lambda shape: next(given))
    for i, k in enumerate(s.timesteps[:-1]):  # at the last, theirs adds noise to the data
        x = s.step(epsilon(x, k), k, x, eta=0.7, variance_noise=noise[i]).prev_sample
        assert torch.allclose(mine[i], x, atol=1e-5)


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("steps", [5, 20])
def test_ancestral_agrees_with_diffusers(variance, steps):
    from diffusers import DDPMScheduler

    s = DDPMScheduler(variance_type=f"fixed_{variance}", clip_sample=False, timestep_spacing="leading")
    s.set_timesteps(steps)
    x = normals(6)
    times = torch.cat([(s.timesteps.double() + 1) / 1000, torch.zeros(1)])
    noise = [normals(6, seed=k) for k in range(1, steps + 1)]
    given, states, y = iter(noise), [], x

    import diffusers.schedulers.scheduling_ddpm as module

    original, drawn = module.randn_tensor, iter(noise)
    module.randn_tensor = lambda *a, **k: next(drawn)
    try:
        for k in s.timesteps:
            y = s.step(epsilon(y, k), k, y).prev_sample
            states.append(y)
    finally:
        module.randn_tensor = original
    mine = ours(ancestral, x, times, variance=variance, noise=lambda shape: next(given))
    agree(mine, states, 2e-5)


@pytest.mark.parametrize("steps", [5, 10, 25])
def test_dpmpp_2m_agrees_with_diffusers(steps):
    """Order tests cannot see a wrong step ratio (its error telescopes), so every state is compared."""
    from diffusers import DPMSolverMultistepScheduler

    s = DPMSolverMultistepScheduler(
        solver_order=2, algorithm_type="dpmsolver++", final_sigmas_type="zero", lower_order_final=True,
        timestep_spacing="linspace", euler_at_final=True,
    )  # fmt: skip
    x = normals(6)
    states, times = theirs(s, steps, x)
    agree(ours(dpmpp_2m, x, times), states)


def test_flow_samplers_agree_with_diffusers():
    from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

    class Flow:
        path = Linear()

        def __call__(self, x, t, cond):
            v = epsilon(x, 1000 * t[0])
            return Prediction(x - t[:, None] * v, x + (1 - t[:, None]) * v)

    for scheduler, sampler in [
        (FlowMatchEulerDiscreteScheduler(), ddim),
        (FlowMatchHeunDiscreteScheduler(), heun),
    ]:
        scheduler.set_timesteps(10)
        x = y = normals(6)
        for k in scheduler.timesteps:
            y = scheduler.step(epsilon(y, k.double()), k, y).prev_sample
        mine = sampler(Flow(), x, scheduler.sigmas.double().unique().flip(0))
        assert torch.allclose(mine, y.double(), atol=1e-5), sampler.__name__


@pytest.mark.parametrize("steps", [3, 10, 14, 15, 25])
def test_dpmpp_3m_agrees_with_diffusers(steps):
    """With their second derivative, which lacks its factor 2! (so it is of second order: test_order_of_the_options)."""
    from diffusers import DPMSolverMultistepScheduler

    s = DPMSolverMultistepScheduler(
        solver_order=3, algorithm_type="dpmsolver++", final_sigmas_type="zero", timestep_spacing="linspace"
    )
    x = normals(6)
    states, times = theirs(s, steps, x)
    agree(ours(dpmpp_3m, x, times, curvature=0.5), states)
    if steps > 3:
        assert not torch.allclose(ours(dpmpp_3m, x, times)[-1], states[-1].double(), atol=1e-5)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_unipc_agrees_with_diffusers(steps, variant, order):
    from diffusers import UniPCMultistepScheduler

    s = UniPCMultistepScheduler(
        solver_order=order, solver_type=variant, final_sigmas_type="zero", timestep_spacing="linspace"
    )
    x = normals(6)
    states, times = theirs(s, steps, x)
    last = steps - (variant == "bh1")  # theirs is nan there: B = -h is infinite, times an empty sum
    agree(ours(unipc, x, times, order=order, variant=variant)[:last], states[:last])


@pytest.mark.parametrize("steps", [3, 10, 25])
def test_dpmpp_sde_agrees_with_diffusers(steps):
    from diffusers import DPMSolverMultistepScheduler

    s = DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++", final_sigmas_type="zero", timestep_spacing="linspace", euler_at_final=True
    )
    s.set_timesteps(steps)
    x = y = normals(6)
    times = torch.cat([(s.timesteps.double() + 1) / 1000, torch.zeros(1)])
    drawn = [normals(6, seed=k) for k in range(1, steps + 1)]
    states, noises = [], iter(drawn)
    for k, z in zip(s.timesteps, drawn, strict=True):
        y = s.step(epsilon(y, k), k, y, variance_noise=z).prev_sample
        states.append(y)
    agree(ours(dpmpp_sde, x, times, noise=lambda shape: next(noises)), states)


@pytest.mark.parametrize("steps", [2, 10])
def test_heun_agrees_with_diffusers(steps):
    """In Karras et al.'s clock, y = x / alpha against sigma / alpha. Two of their calls are one step, but the last."""
    from diffusers import HeunDiscreteScheduler

    s = HeunDiscreteScheduler(timestep_spacing="trailing", beta_start=1e-4, beta_end=0.02)
    s.set_timesteps(steps)
    x, path, states = normals(6), VP(), []
    times = torch.cat([(s.timesteps[:1].double() + 1) / 1000, (s.timesteps[1::2].double() + 1) / 1000, torch.zeros(1)])
    grid = nodes(path, times)
    y = x / grid[0].alpha
    for i, k in enumerate(s.timesteps):
        alpha = float(path.alpha((k.double()[None] + 1) / 1000))
        y = s.step(epsilon(y * alpha, k.double()), k, y).prev_sample
        if i % 2 == 1 or i == len(s.timesteps) - 1:
            states.append(y)
    assert len(states) == steps
    agree([x / n.alpha for x, n in zip(ours(heun, x, times, clock="sigma"), grid[1:], strict=True)], states)


class Stand(torch.nn.Module):
    """A network of EDM's: what it sees is c_in x and log(sigma) / 4."""

    def forward(self, x, label, cond):
        return torch.tanh(x * 0.9 + label[:, None] * 0.3)


def edm(scheduler, steps, x, drawn=()):
    import diffusers.schedulers.scheduling_edm_dpmsolver_multistep as module

    scheduler.set_timesteps(steps)
    original, states, noises, y = module.randn_tensor, [], iter(drawn), x * scheduler.sigmas[0]
    module.randn_tensor = lambda *a, **k: next(noises)
    try:
        for k in scheduler.timesteps:
            out = Stand()(scheduler.scale_model_input(y, k), k.expand(len(y)), {})
            y = scheduler.step(out, k, y).prev_sample
            states.append(y)
    finally:
        module.randn_tensor = original
    return states


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "dpmpp_3m", "dpmpp_sde"])
def test_edm_schedulers_of_diffusers(name):
    """Path, preconditioning, grid and sampler together: VE, Karras, karras. The churn of EDMEulerScheduler is left out:
    it asks the network before the noise is added, where algorithm 2 asks after (test_churn_is_algorithm_2)."""
    from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler

    if name == "ddim":
        scheduler, options = EDMEulerScheduler(), {}
    else:
        kind = "sde-dpmsolver++" if name == "dpmpp_sde" else "dpmsolver++"
        order, options = (3, {"curvature": 0.5}) if name == "dpmpp_3m" else (2, {})
        scheduler = EDMDPMSolverMultistepScheduler(solver_order=order, algorithm_type=kind)
    x, steps, states = normals(6), 18, []
    drawn = [normals(6, seed=k) for k in range(1, steps + 1)]
    noises = iter(drawn)
    denoise = NetDenoiser(Stand(), VE(), Karras())
    generate = bind(name, karras(steps), callback=lambda i, x, p: states.append(x), **options)(denoise)
    generate(x, {}, lambda shape: next(noises))
    expected = edm(scheduler, steps, x, drawn)
    for mine, y in zip(states, expected, strict=True):
        assert torch.allclose(mine, y.double(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 7, 30, 250, 1000])
def test_discrete_grids_are_those_of_diffusers(spacing, steps):
    from diffusers import DDIMScheduler

    s = DDIMScheduler(timestep_spacing=spacing)
    s.set_timesteps(steps)
    grid = {"leading": leading, "trailing": trailing, "linspace": linspace}[spacing]
    times = grid(steps)(VP())
    assert float(times[-1]) == 0
    k = (times[:-1] * 1000).round().long() - 1
    if spacing == "linspace" and steps == 1:
        assert k.tolist() == [999]  # theirs is 0: a step from where there is no noise
    else:
        assert k.tolist() == s.timesteps.tolist()
    with pytest.raises(ValueError, match="allowed 1 … 1000"):
        grid(1001)
    assert (grid(4, timesteps=8)(VP()) * 8).tolist() == {
        "leading": [7, 5, 3, 1, 0], "trailing": [8, 6, 4, 2, 0], "linspace": [8, 6, 3, 1, 0]
    }[spacing]  # fmt: skip


class FromBoth:
    """The stand-in of diffusers' tests as a model that learned its variance: w is another smooth function."""

    path = VP()

    def __call__(self, x, t, cond):
        return LearnedVariance.of(FromEpsilon()(x, t, cond), torch.sin(3 * x + t[0]))


@pytest.mark.parametrize("steps", [5, 20])
def test_learned_variance_agrees_with_diffusers(steps, monkeypatch):
    """Every state, strided chains included; their last step adds no noise, as ours."""
    import diffusers.schedulers.scheduling_ddpm as module

    s = module.DDPMScheduler(variance_type="learned_range", clip_sample=False, timestep_spacing="leading")
    s.set_timesteps(steps)
    x, noise = normals(6), [normals(6, seed=k) for k in range(1, steps + 1)]
    times = torch.cat([(s.timesteps.double() + 1) / 1000, torch.zeros(1)])
    drawn, states, y = iter(noise), [], x
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: next(drawn))
    for k in s.timesteps:
        out = torch.cat([epsilon(y, k), torch.sin(3 * y + (k + 1) / 1000)], 1)
        y = s.step(out, k, y).prev_sample
        states.append(y)
    for how in ({"variance": "learned"}, {}):
        mine, drawn_here = [], iter(noise)
        ancestral(FromBoth(), x, times, callback=lambda i, x, p, mine=mine: mine.append(x),
                  noise=lambda shape, drawn_here=drawn_here: next(drawn_here), **how)  # fmt: skip
        agree(mine, states, 1e-5)
