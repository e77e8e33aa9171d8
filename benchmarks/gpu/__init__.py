"""Everything that has to be seen on a GPU, in one command of at most ten minutes.

    genkit bench gpu --out gpu.json                          # on a CUDA device; also writes gpu.md
    genkit bench gpu --device cpu --tiny --out gpu.json      # all parts in miniature, to test the command itself

Each part has its own budget of seconds. On a CUDA device each runs in a process of its own, as an error of a kernel
spoils its process. A part that fails or runs out of time is recorded with its error and the rows that it has, and the
others go on. What a CPU cannot tell is said: "needs CUDA".

Networks have random weights and latents are random numbers, so speeds, memory and differences mean something here, and
losses and metrics nothing, except those of the digits.
"""

from benchmarks.gpu.command import main

__all__ = ["main"]
