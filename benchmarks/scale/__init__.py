"""What the pages about scaling say of CPUs, measured: `genkit bench scale`."""

from benchmarks.scale.command import main

__all__ = ["main"]
