"""From data to noise and back."""

import pytest
import torch

from genkit.diffusion.paths import VE, VP, Linear
from genkit.diffusion.samplers import CountingDenoiser, heun, invert, nodes, ode_samplers, rk4, uniform
from tests.support import samplers as contract
from tests.support.exact import F64, ExactDenoiser
from tests.support.samplers import MIXTURE, Quick, normals


@pytest.mark.parametrize("path", [Linear(), VP(), VE()], ids=["Linear", "VP", "VE"])
@pytest.mark.parametrize("name", ode_samplers())
def test_inversion_then_sampling_returns_the_input(name, path):
    contract.check_inversion(name, path)


def test_inversion_is_the_inverse_of_the_flow():
    """And not only of itself: noise -> data by a fine grid, data -> noise by inversion."""
    z = normals(64)
    for path in (Linear(), VP(), VE()):
        denoise, times = Quick(MIXTURE, path), uniform(64)(path)
        x0 = rk4(denoise, nodes(path, times)[0].sigma * z, times)
        for name, tolerance in {"heun": 2e-3, "rk4": 2e-3, "dopri5": 2e-3, "unipc": 5e-3}.items():
            x = invert(denoise, x0, times, sampler=name)
            assert float((x / nodes(path, times)[0].sigma - z).norm(dim=1).mean()) < tolerance, (name, path)


def test_inversion_of_a_part_of_the_path_and_of_labels():
    denoise, label = ExactDenoiser(MIXTURE, Linear()), {"label": torch.tensor([0, 1, 2])}
    x = normals(3)
    half = torch.linspace(0.7, 0.2, 65, dtype=F64)
    up = invert(denoise, x, half, label)
    assert torch.allclose(heun(denoise, up, half, label), x, atol=1e-4)
    assert not torch.allclose(invert(denoise, x, half), up, atol=1e-2)
    only = Quick(MIXTURE.component(1), Linear())
    assert torch.allclose(invert(only, x[1:2], half), up[1:2], atol=1e-10)


def test_inversion_costs_what_it_says():
    denoise = CountingDenoiser(Quick(MIXTURE, Linear()))
    invert(denoise, normals(2), uniform(8)(Linear()), sampler="heun", refine=3)
    assert denoise.calls == 3 + 2 * 7
    alone = invert(denoise, normals(2), torch.tensor([0.25, 0.0]), refine=0)
    assert torch.allclose(alone, 0.75 * normals(2))
    with pytest.raises(ValueError, match="allowed for inversion: ddim"):
        invert(denoise, normals(2), uniform(8)(Linear()), sampler="ancestral")
    with pytest.raises(ValueError, match="refine: given -1"):
        invert(denoise, normals(2), uniform(8)(Linear()), refine=-1)
