"""`genkit demo ENV`: an expert's episodes as a replay buffer, an .npz that --data=replay reads."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from tyro.conf import Positional

from genkit.cli.output import console
from genkit.config import narrow, parse
from genkit.config.paths import PathText
from genkit.envs.recording import DemoSettings, record_demonstrations


@dataclass(frozen=True)
class Demo(DemoSettings):
    """Record an expert."""

    env: Positional[str]
    """The environment: four-ways, an id of gymnasium, such as HalfCheetah-v5, or module:id of your own."""
    out: PathText | None = None
    """The .npz; None: ENV.npz."""


def main(argv: list[str]) -> int:
    """Run the command; the exit code."""
    command = parse(Demo, argv, prog="genkit demo", description="Record an expert's episodes.")
    recording = record_demonstrations(narrow(command, DemoSettings), command.out)
    episodes = f"{len(recording.returns)} episodes of {recording.num_tried} tried, {recording.num_steps} steps"
    mean = sum(recording.returns) / len(recording.returns)
    spread = f"({min(recording.returns):.1f} to {max(recording.returns):.1f})"
    console.print(f"{recording.path}  {episodes}, return {mean:.1f} {spread}", markup=False)
    if recording.expert_path:
        reuse = f"--expert=saved --expert.path={recording.expert_path} uses it again"
        console.print(f"{recording.expert_path}  {recording.expert_origin}; {reuse}", markup=False)
    frames = " --data.frames img" if command.pixels else ""
    arguments = f" --data.env-args {shlex.join(command.env_args)}" if command.env_args else ""
    path = shlex.quote(str(recording.path))
    train = f"genkit train --data=replay --data.root {path} --data.env {command.env}{arguments}{frames}"
    console.print(f"next     {train}", markup=False)
    return 0
