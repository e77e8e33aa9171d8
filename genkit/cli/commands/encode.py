"""`genkit encode RUN`: cache the latents of a data set."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from tyro.conf import Positional

from genkit.cli.output import console
from genkit.config import narrow, parse
from genkit.config.paths import PathText
from genkit.training.distributed import is_main_process
from genkit.training.latent_cache import EncodeSettings, encode


@dataclass(frozen=True)
class Encode(EncodeSettings):
    """Cache the latents of a data set."""

    run: Positional[PathText]
    """A run with a code (of vae, ae, vq or autoencoder), such as runs/latest; or diffusers:DIR."""
    out: PathText | None = None
    """The folder; None: latents in the run's folder."""


def main(argv: list[str]) -> int:
    """Run the command; the exit code."""
    command = parse(Encode, argv, prog="genkit encode", description="Cache the latents of a data set.")
    cache = encode(command.run, narrow(command, EncodeSettings), out=command.out)
    if not is_main_process():
        return 0
    counts = f"{cache.num_samples} samples of {cache.split}, {cache.num_written} files written"
    console.print(f"{counts}  {cache.path}", markup=False)
    backbone = "dit" if len(cache.shape) > 1 else "mlp"
    root = shlex.quote(str(cache.path))
    train = f"genkit train --objective=flow --backbone={backbone} --data=latents --data.root {root}"
    console.print(f"next     {train}", markup=False)
    return 0
