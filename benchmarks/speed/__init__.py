"""One training step of genkit's U-Net and of diffusers' ``UNet2DModel``, at equal parameters and FLOPs.

    genkit bench speed --threads 1 --steps 15 --out speed.json
    genkit bench speed --quality --data-root cifar10.zip      # also: seconds to the same loss

Both sides take the same images and do the same work: noise, eps-prediction loss on DDPM's linear schedule, backward,
clipping at 1, AdamW, an EMA. "diffusers" does it as their ``train_unconditional`` example does (fp32, attention heads
of 8, ``DDPMScheduler``, ``EMAModel``), without Accelerate's overhead. "genkit" does it as ``genkit train`` does (bf16
if the device is fast at it, heads of 64, fused AdamW, one ``lerp`` for the EMA). Rows (b) remove all these differences
and compare the same network in the same precision. All contenders are in one process and take turns, so a busy machine
slows all of them; each time is a median. With one thread on a CPU, time is CPU time of this process.
"""

from benchmarks.speed.command import main

__all__ = ["main"]
