"""Flow matching on two moons, with genkit's parts and a training loop of your own.

    python examples/02_flow_in_40_lines.py [--steps 2000] [--out moons.png]

`genkit train --data=moons` does the same with EMA, checkpoints, resume and a log.
"""

from pathlib import Path

import torch

from genkit import MLP, Batch, Flow, bind, classifier_free, uniform
from genkit.cli.scripts import ScriptParser
from genkit.core import pictures
from genkit.data.toy import Moons

parser = ScriptParser(__doc__)
parser.add_argument("--steps", type=int, default=2000)
parser.add_argument("--out", type=Path, default=Path("moons.png"))
args = parser.parse_args()

torch.manual_seed(0)
data = Moons().load("train")
flow = Flow()
nets = flow.networks(MLP(width=128), data.spec)
optimizer = torch.optim.AdamW(nets["net"].parameters(), lr=1e-3, fused=True)
for step in range(args.steps):
    rows = torch.randint(len(data), (256,))
    batch = Batch(data.x[rows], {k: v[rows] for k, v in data.cond.items()})
    loss = flow.loss("denoise", nets, batch).per_sample.mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 500 == 0:
        print(f"step {step:5d}  loss {loss:.4f}")

generate = flow.generator(nets, bind("heun", uniform(20), classifier_free(1.5)))
label = torch.arange(1000) % 2
x = generate(torch.randn(1000, 2), {"label": label})
print(pictures.save_image(pictures.draw_samples(x, {"label": label}), args.out))
