"""genkit: diffusion, flow matching, VAE, GAN and policies on shared backbones.

    import genkit

    run = genkit.train(objective="flow", data="digits", steps=500)
    run.sample(16, label=7, guidance=2).grid().save("sevens.png")
    card = genkit.evaluate(run, metrics="fid,prdc", n=500)

Every command of the command line is one call here. It takes a dataclass of settings, or settings by name, returns an
object, reports progress by a callback (by default a bar in a terminal or a notebook), and prints nothing; messages go
to the logger ``genkit``. ``__init__.pyi`` lists the public names; each is imported when it is first used, so ``import
genkit`` costs no torch.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
