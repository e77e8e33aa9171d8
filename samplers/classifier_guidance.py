"""Guide a model by a classifier, with more and more of its gradient, from the same noise.

    genkit train --objective=flow --data=digits
    genkit train --objective=classifier --data=digits
    python samplers/classifier_guidance.py runs/0000-... runs/0001-... --label 3 --scales 0 1 4 --out guided.png

One row of images for each scale, or one scatter plot. The model need not know the class: with ``--unconditional`` it
sees none, and only the classifier guides it (Dhariwal & Nichol 2021).
"""

import torch
from common import options, start

from genkit.core import pictures
from genkit.diffusion.guidance import by_classifier, classifier_free, compose
from genkit.diffusion.samplers import Seeds, bind, uniform
from genkit.training.run import load_run, with_classes
from genkit.training.sampling import sample_conditions


def main() -> None:
    parser = options(__doc__, "guided.png", steps=20)
    parser.add_argument("classifier", help="a run of --objective=classifier on the same path")
    parser.add_argument("--label", type=int, default=1)
    parser.add_argument("--scales", type=float, nargs="+", default=[0.0, 1.0, 2.0, 4.0])
    parser.add_argument("--unconditional", action="store_true", help="do not give the model the class")
    args = parser.parse_args()

    run, classifier_run = load_run(args.run), load_run(args.classifier)
    classify = classifier_run.classifier.classify(classifier_run.nets)
    cond = sample_conditions(with_classes(run.spec, classifier_run), args.n, args.label)
    cond = {k: v.to(run.device) for k, v in cond.items()}
    z = Seeds(range(args.seed, args.seed + args.n), run.device)(run.spec.shape)
    conditional = classifier_free(0.0 if args.unconditional else 1.0)
    t_clean = torch.full((args.n,), 1e-3, device=run.device)

    samples = []
    for scale in args.scales:
        guidance = compose(conditional, by_classifier(classify, scale))
        x = bind("heun", uniform(args.steps), guidance)(run.denoiser)(z, cond)
        with torch.no_grad():
            probability = float(classify(x, t_clean, cond).exp().mean())
        print(f"scale {scale:<4g} the classifier gives class {args.label} a probability of {probability:.3f}")
        samples.append(run.codec.decode(x).cpu())

    x, scales = torch.cat(samples), torch.arange(len(args.scales)).repeat_interleave(args.n)
    image = pictures.mosaic(x, args.n) if x.ndim == 4 else pictures.picture(x, {"label": scales})
    print(pictures.save(image, args.out))


if __name__ == "__main__":
    start(main)
