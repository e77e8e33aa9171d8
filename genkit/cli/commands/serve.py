"""`genkit serve RUN`: a trained policy as a server for control loops."""

from __future__ import annotations

from dataclasses import dataclass

from tyro.conf import Positional

from genkit.cli.output import console
from genkit.config import narrow, parse
from genkit.config.paths import PathText
from genkit.rl.policies.server import ServeSettings, open_server


@dataclass(frozen=True)
class Serve(ServeSettings):
    """Serve a policy to control loops."""

    run: Positional[PathText]
    """The run's folder, such as runs/latest."""


def main(argv: list[str]) -> int:
    """Run the command until it is interrupted; the exit code."""
    command = parse(Serve, argv, prog="genkit serve", description="Serve a policy to control loops.")
    with open_server(command.run, narrow(command, ServeSettings)) as server:
        host, port = server.address
        console.print(f"{server.policy.run.directory.name} listens at {host}:{port}", markup=False)
        server.serve_forever()
    return 0
