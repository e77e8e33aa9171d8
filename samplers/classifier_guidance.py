"""Guide a model by a classifier, without and with more and more of its gradient, from the same noise.

    genkit train --objective=flow --data=digits
    genkit train --objective=classifier --data=digits
    python samplers/classifier_guidance.py runs/0000-... runs/0001-... --label 3 --scales 0 1 4 --out guided.png

One row of images a scale, or one scatter plot. The model need not know the class: with ``--unconditional`` it is told
none, and all that steers is the classifier (Dhariwal & Nichol 2021).
"""

import argparse
from pathlib import Path

import torch

from genkit.core import pictures
from genkit.diffusion.guidance import by_classifier, classifier_free, compose
from genkit.diffusion.samplers import Seeds, bind, uniform
from genkit.training.run import load_run, with_classes
from genkit.training.sampling import sample_conditions


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("run", help="a run directory")
    parser.add_argument("classifier", help="a run of --objective=classifier on the same path")
    parser.add_argument("--label", type=int, default=1)
    parser.add_argument("--scales", type=float, nargs="+", default=[0.0, 1.0, 2.0, 4.0])
    parser.add_argument("--unconditional", action="store_true", help="tell the model itself no class")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--n", type=int, default=10, help="samples of each scale")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("guided.png"))
    args = parser.parse_args()

    run, judge = load_run(args.run), load_run(args.classifier)
    classify = judge.classifier.classify(judge.nets)
    cond = sample_conditions(with_classes(run.spec, judge), args.n, args.label)
    cond = {k: v.to(run.device) for k, v in cond.items()}
    z = Seeds(range(args.seed, args.seed + args.n), run.device)(run.spec.shape)
    told, clean = classifier_free(0.0 if args.unconditional else 1.0), torch.full((args.n,), 1e-3, device=run.device)

    drawn = []
    for scale in args.scales:
        guidance = compose(told, by_classifier(classify, scale))
        x = bind("heun", uniform(args.steps), guidance)(run.denoiser)(z, cond)
        with torch.no_grad():
            sure = classify(x, clean, cond).exp().mean()
        print(f"scale {scale:<4g} the classifier gives class {args.label} a probability of {float(sure):.3f}")
        drawn.append(run.codec.decode(x).cpu())

    x, scales = torch.cat(drawn), torch.arange(len(args.scales)).repeat_interleave(args.n)
    image = pictures.make_grid(x, args.n) if x.ndim == 4 else pictures.draw_samples(x, {"label": scales})
    print(pictures.save_image(image, args.out))


if __name__ == "__main__":
    main()
