"""Guide a model by a classifier, with several weights of its gradient, from the same noise.

    genkit train --objective=flow --data=digits
    genkit train --objective=classifier --data=digits
    python samplers/classifier_guidance.py runs/0000-... runs/0001-... --label 3 --scales 0 1 4 --out guided.png

One row of images for each scale, or one scatter plot. The model need not know the class: with ``--unconditional`` only
the classifier guides it (Dhariwal & Nichol 2021).
"""

from pathlib import Path

import torch

import genkit
from genkit import bind, classifier_free, uniform
from genkit.cli.scripts import ScriptParser, run_script
from genkit.core import pictures
from genkit.diffusion.guidance import by_classifier, compose
from genkit.diffusion.samplers import Seeds
from genkit.training.run import with_classes
from genkit.training.sampling import sample_conditions


def main() -> None:
    parser = ScriptParser(__doc__)
    parser.add_argument("run", help="a run directory")
    parser.add_argument("classifier", help="a run of --objective=classifier on the same path")
    parser.add_argument("--label", default="1", help="the class, by name or number")
    parser.add_argument("--scales", type=float, nargs="+", default=[0.0, 1.0, 2.0, 4.0])
    parser.add_argument("--unconditional", action="store_true", help="do not give the class to the model itself")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--n", type=int, default=10, help="samples of each scale")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("guided.png"))
    args = parser.parse_args()

    run, classifier = genkit.load(args.run), genkit.load(args.classifier)
    classify = classifier.classifier.classify(classifier.nets)
    cond = sample_conditions(with_classes(run.spec, classifier), args.n, args.label)
    cond = {name: value.to(run.device) for name, value in cond.items()}
    z = Seeds(range(args.seed, args.seed + args.n), run.device)(run.spec.shape)
    almost_clean = torch.full((args.n,), 1e-3, device=run.device)

    results = []
    for scale in args.scales:
        guidance = compose(classifier_free(0.0 if args.unconditional else 1.0), by_classifier(classify, scale))
        x = bind("heun", uniform(args.steps), guidance)(run.denoiser)(z, cond)
        with torch.no_grad():
            probability = classify(x, almost_clean, cond).exp().mean()
        print(f"scale {scale:<4g} the classifier gives class {args.label} a probability of {float(probability):.3f}")
        results.append(run.codec.decode(x).cpu())

    x, scales = torch.cat(results), torch.arange(len(args.scales)).repeat_interleave(args.n)
    names = [f"scale {scale:g}" for scale in args.scales]
    grid = pictures.make_grid(x, args.n, captions=names) if x.ndim == 4 else None
    image = grid or pictures.draw_samples(x, {"label": scales}, names)
    print(pictures.save_image(image, args.out))


if __name__ == "__main__":
    run_script(main)
