"""A trained policy as a server: one process, TCP, no pickle. ``docs/guide/policies.md`` documents the protocol."""

from __future__ import annotations

import logging
import socket
import socketserver
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Le

from genkit import config
from genkit.config.numbers import CheckpointStep, Count, Natural, Positive
from genkit.core import Vector
from genkit.core.device import DeviceName
from genkit.rl.policies.asynchronous import AsynchronousPolicy
from genkit.rl.policies.messages import BrokenConnection, Header, pack_message, read_message
from genkit.rl.policies.policy import Policy
from genkit.rl.policies.rollout import parse_conditions
from genkit.training.run import Run
from genkit.training.sampling import SamplerName

logger = logging.getLogger("genkit")
PROTOCOL = 1
Answer = tuple[Header, dict[str, np.ndarray]]


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Serve a policy to control loops."""

    host: str = "127.0.0.1"
    """Address to listen at. Everyone who reaches it can use the policy, so the default is this machine only."""
    port: Annotated[int, Ge(0), Le(65535)] = 5750
    """TCP port; 0: a free one, which is printed."""
    steps: Count | None = None
    """Sampler steps for each chunk of actions; None: as for genkit rollout."""
    sampler: SamplerName | None = None
    """Sampler. None: ddim, or flow_map for a flow map."""
    act_steps: Count | None = None
    """Actions after which the next chunk is begun; None: as in training."""
    execution: Literal["naive", "real-time"] = "naive"
    """How chunks follow each other: naive, the newest that is ready; real-time, each drawn as a continuation of the
    one under way (Black et al. 2025)."""
    delay: Natural = 1
    """With real-time: steps that the first chunks are expected to take; later the longest of the last ten."""
    guidance_limit: Positive = 1000.0
    """Largest weight of the guidance of real-time execution: the paper's beta."""
    conditions: tuple[str, ...] = ()
    """Conditions that the policy was trained with (--data.conditions): skill=2, returns=0.9, goal=1.5,0.4."""
    clients: Count = 4
    """Most clients at a time, each with an episode of its own."""
    keepalive: Count = 15
    """Seconds after which a client whose machine or network has vanished gives up its place. One that only sends
    nothing keeps it."""
    ema: str | None = None
    """Averaged weights to use, by decay; None: the slowest; "none": the raw weights."""
    step: CheckpointStep | None = None
    """Checkpoint to use, by its step or "best" (of train --keep-best); None: the newest."""
    device: DeviceName = "cpu"
    """Device of the networks."""


class PolicyServer(socketserver.ThreadingTCPServer):
    """A server that gives each client an :class:`AsynchronousPolicy`; their chunks are drawn one at a time.

    ``with PolicyServer(policy, settings) as server: server.serve_forever()``. :attr:`address` is where it listens.
    ``ValueError`` for settings that the policy cannot act with, or an address that cannot be had.
    """

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, policy: Policy, settings: ServeSettings):
        self.policy, self.settings = policy, settings
        self.executor = ThreadPoolExecutor(1, "genkit-policy")
        self.places = threading.BoundedSemaphore(settings.clients)
        self.actor()  # refuses what does not fit, before the first client
        try:
            super().__init__((settings.host, settings.port), Client)
        except OSError as e:
            raise ValueError(f"host, port: given {settings.host}:{settings.port}, which cannot be had: {e}") from None

    @property
    def address(self) -> tuple[str, int]:
        """(host, port)"""
        return self.server_address[0], self.server_address[1]  # type: ignore[return-value]

    def actor(self) -> AsynchronousPolicy:
        """A new client's policy, with an episode of its own."""
        s = self.settings
        return AsynchronousPolicy(replace(self.policy), s.execution, s.delay, s.guidance_limit, self.executor)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """An error that no request can be blamed for closes its connection alone; a client that went away is none."""
        logger.warning(f"{client_address}: a request failed, and its connection was closed", exc_info=True)


class Client(socketserver.StreamRequestHandler):
    """One connection: requests are answered in order, until the client closes it or a message's end is unknown."""

    server: PolicyServer  # type: ignore[assignment]
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        watch_connection(self.connection, self.server.settings.keepalive)

    def handle(self) -> None:
        """Answer the client's requests."""
        if not self.server.places.acquire(blocking=False):
            return self.refuse(f"clients: {self.server.settings.clients} are connected; allowed: --clients")
        try:
            actor = self.server.actor()
            while self.answer_one(actor):
                pass
        except OSError:  # the connection has ended, in one of the ways that the system has names for
            pass
        finally:
            self.server.places.release()

    def answer_one(self, actor: AsynchronousPolicy) -> bool:
        """Answer the next request; whether there may be another."""
        try:
            message = read_message(self.rfile.read)
            if message is None:
                return False
            self.wfile.write(pack_message(*answer(actor, *message)))
        except BrokenConnection as e:
            self.refuse(str(e))
            return False
        except ValueError as e:
            self.refuse(str(e))
        return True

    def refuse(self, reason: str) -> None:
        """Answer with an error, in one line."""
        self.wfile.write(pack_message({"type": "error", "message": " ".join(reason.split())}))


def watch_connection(connection: socket.socket, seconds: int) -> None:
    """Let the system end a TCP connection whose other side has given no sign of life for so many seconds.

    It asks the other side's system, not its program, so that a client may pause as long as it likes. Without this, the
    place of a machine that lost its power or its network would never be free again.
    """
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    probes = 3
    interval = max(1, seconds // (2 * probes))
    idle = max(1, seconds - probes * interval)
    options = {"TCP_KEEPIDLE": idle, "TCP_KEEPALIVE": idle, "TCP_KEEPINTVL": interval, "TCP_KEEPCNT": probes,
               "TCP_USER_TIMEOUT": 1000 * seconds}  # fmt: skip
    for name, value in options.items():
        if hasattr(socket, name):  # systems have different ones
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


# ------------------------------------------------------------------------------------------------------------ requests
def answer(actor: AsynchronousPolicy, header: Header, tensors: dict[str, np.ndarray]) -> Answer:
    """The answer to one request. ``ValueError`` says what is wrong with it."""
    kind = header.get("type")
    if not isinstance(kind, str) or kind not in REQUESTS:
        raise ValueError(f"type: given {kind!r}; allowed: {', '.join(REQUESTS)}")
    return REQUESTS[kind](actor, header, tensors)


def hello(actor: AsynchronousPolicy, header: Header, tensors: dict[str, np.ndarray]) -> Answer:
    """What the policy is, and what it needs."""
    require_names(tensors, ())
    policy, kind = actor.policy, actor.policy.run.spec.cond.get("obs")
    about = {
        "type": "policy",
        "protocol": PROTOCOL,
        "run": policy.run.directory.name,
        "weights": policy.run.weights,
        "obs_dim": policy.obs_shape[1],
        "obs_entries": list(kind.entries) if isinstance(kind, Vector) else [],
        "frames": policy.frame_shape and list(policy.frame_shape),
        "action_dim": policy.action_dim,
        "chunk": policy.future_steps,
        "act_steps": policy.act_steps,
        "steps": policy.steps,
        "execution": actor.execution,
    }
    return about, {}


def reset(actor: AsynchronousPolicy, header: Header, tensors: dict[str, np.ndarray]) -> Answer:
    """Begin an episode."""
    require_names(tensors, ())
    seed = header.get("seed", 0)
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise ValueError(f"seed: given {seed!r}; allowed: whole numbers from 0")
    actor.reset(seed)
    return {"type": "ready"}, {}


def step(actor: AsynchronousPolicy, header: Header, tensors: dict[str, np.ndarray]) -> Answer:
    """The action of this step."""
    needed = {"obs": "float32"} if actor.policy.obs_shape[1] else {}
    needed |= {"frames": "uint8"} if actor.policy.frame_shape else {}
    require_names(tensors, tuple(needed))
    for name, dtype in needed.items():
        if tensors[name].dtype.name != dtype:
            raise ValueError(f"{name}: given {tensors[name].dtype}; needs {dtype}")
    number, waited = actor.time, actor.waited
    action = actor.step(tensors.get("obs", np.zeros(0, np.float32)), tensors.get("frames"))
    about = {"type": "action", "step": number, "waited": number > 0 and actor.waited > waited,
             "delay": actor.delays[-1] if actor.delays else None}  # fmt: skip
    return about, {"action": np.asarray(action, np.float32)}


def require_names(tensors: Mapping[str, np.ndarray], needed: tuple[str, ...]) -> None:
    """``ValueError`` unless a request has these tensors and no others."""
    if set(tensors) != set(needed):
        given = ", ".join(tensors) or "none"
        raise ValueError(f"tensors: given {given}; needs {', '.join(needed) or 'none'}")


Request = Callable[[AsynchronousPolicy, Header, dict[str, np.ndarray]], Answer]
REQUESTS: dict[str, Request] = {"hello": hello, "reset": reset, "step": step}


def open_server(run: str | Path | Run, settings: ServeSettings | None = None, **changes: Any) -> PolicyServer:
    """A server of the policy of ``run``, which listens; ``changes`` are settings by name.

    ``ValueError`` if the run is not of a policy, or the address cannot be had.
    """
    s = config.override(settings or ServeSettings(), **changes)
    for name in ("delay", "guidance_limit"):
        given = getattr(s, name)
        if s.execution == "naive" and given != getattr(ServeSettings(), name):
            raise ValueError(f"{name}: given {given}, which has no effect without --execution real-time; leave it out")
    policy = Policy.load(run, steps=s.steps, sampler=s.sampler, act_steps=s.act_steps, ema=s.ema, step=s.step,
                         device=s.device, conditions=parse_conditions(s.conditions))  # fmt: skip
    return PolicyServer(policy, s)
