"""Several objectives on the same network, data and budget, measured with the same evaluator, on one page.

    genkit bench quality [--objectives ddpm,edm,flow,flow-ot] [--data digits] [--steps 2000] [--nfe 5,10,20,50]

Each row is trained by ``genkit train`` in its own process and measured at each number of network evaluations as
``genkit eval`` does; held-out data measured in the same way are the floor. Nothing is done twice: a killed training
continues from its last checkpoint, and a card that exists is read. ``--out`` holds everything: ``report.html``,
``report.md``, ``results.json``, the runs, and a grid of samples of each.
"""

from benchmarks.quality.command import main

__all__ = ["main"]
