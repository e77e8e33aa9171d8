"""Whole text-to-image pipelines on the pretended device: the picture of the CPU, and no
wait of the host within a step of the sampler."""

from dataclasses import replace

import pytest
import torch

from genkit.data import text
from genkit.diffusion.samplers import Seeds
from genkit.training.run import load_run
from genkit.training.sampling import Sampling
from tests.support.pipelines import PROMPTS, STEPS
from tests.support.pretended_device import CUDA, PretendedDevice


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_a_pipeline_mixes_no_devices_and_lets_the_host_wait_nowhere(run_of, name):
    """Text states from the encoders, guided steps of the network, and the autoencoder's decoder."""
    run = load_run(run_of(name), device="cpu")
    sampling, z = Sampling(steps=STEPS, guidance=5.0), Seeds(range(2))(run.spec.shape)
    with torch.no_grad():
        cond = text.encode_prompts(run.spec, PROMPTS)
        expected = run.codec.decode(run.generator(sampling)(z, cond))
        with PretendedDevice() as device:
            run.codec.stage.to(CUDA)
            moved = replace(run, nets={k: net.to(CUDA) for k, net in run.nets.items()}, device=CUDA)
            z, on_device = z.to(CUDA), {k: v.to(CUDA) for k, v in cond.items()}
            for _ in range(2):  # caches are filled by the first
                device.waits.clear()
                x = moved.codec.decode(moved.generator(sampling)(z, on_device))
                waits = device.waits.copy()
            assert x.device == CUDA
            found = x.cpu()
    assert not waits
    assert float((found.float() - expected.float()).abs().max()) <= 1  # of 255 levels
