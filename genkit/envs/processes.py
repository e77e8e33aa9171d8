"""Environments in processes of their own, which step at the same time: :class:`ProcessEnv`."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import numpy as np

from genkit.envs import Env, Outcome, check_actions, step_chunk

OPTIONAL = ("frame", "pixels", "draw")  # methods that an environment may have
PACKAGE = Path(__file__).parents[1]  # a ValueError that it raises is a user's mistake
LINGER = 5.0  # seconds that a process has to end by itself


class ProcessEnv:
    """``num`` copies of an environment, shared among ``workers`` processes. Results are those of one process.

    ``build(n)`` makes n copies; it is sent to the processes, so it is a function of a module or a ``partial`` of one. A
    script that makes one needs ``if __name__ == "__main__":``, as for all of Python's processes. The processes end with
    this object or with the process that made it, however that ends. ``ValueError`` for more processes than copies, when
    a process has ended, and whenever one of the copies raises a ``ValueError`` of genkit; any other error in it is a
    ``RuntimeError`` with its traceback. A call that is interrupted, or that a process does not answer, ends them all:
    later calls could not tell its answers from their own, and are refused.
    """

    def __init__(self, build: Callable[[int], Env], num: int, workers: int):
        if not 1 <= workers <= num:
            raise ValueError(f"workers: given {workers} for {num} environments; allowed 0 … {num}")
        self.num = num
        self.shares = [slice(num * i // workers, num * (i + 1) // workers) for i in range(workers)]
        context = multiprocessing.get_context("spawn")  # a fork of a process with threads may never return
        self.connections: list[Connection] = []
        self.processes: list[BaseProcess] = []
        self.broken = False
        Finalize(self, end_processes, (self.connections, self.processes), exitpriority=10)
        for share in self.shares:
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(there, build, share.stop - share.start), daemon=True)
            process.start()
            there.close()  # so that it is closed when the process ends
            self.connections.append(here)
            self.processes.append(process)
        answers = [self.unpack(i, *self.receive(i)) for i in range(workers)]
        about = answers[0]
        self.obs_dim, self.action_dim, self.max_steps = about["obs_dim"], about["action_dim"], about["max_steps"]
        self.modes: int = about["modes"]
        self.methods: list[str] = about["methods"]
        self.obs = np.zeros((num, self.obs_dim))

    # -------------------------------------------------------------------------------------------------- as an Env
    def reset(self, seeds: Sequence[int], rows: Sequence[int] | None = None) -> np.ndarray:
        """Begin episodes, as :meth:`genkit.envs.Env.reset`."""
        rows = range(self.num) if rows is None else rows
        if len(seeds) != len(rows):
            raise ValueError(f"seeds: given {len(seeds)} for {len(rows)} rows; needs one each")
        requests = {}
        for i, share in enumerate(self.shares):
            own = [(int(seed), row - share.start) for seed, row in zip(seeds, rows, strict=True)
                   if share.start <= row < share.stop]  # fmt: skip
            if own:
                requests[i] = ("reset", *map(list, zip(*own, strict=True)))
        for i, obs in self.ask(requests).items():
            self.obs[self.shares[i]] = obs
        return self.obs.copy()

    def step(self, actions: np.ndarray) -> Outcome:
        """Step all rows, as :meth:`genkit.envs.Env.step`."""
        return self.step_chunk(np.asarray(actions)[:, None])[0]

    def step_chunk(self, actions: np.ndarray) -> list[Outcome]:
        """Take K steps of all rows, ``actions`` ``[N, K, A]``. The processes wait for each other only at the end."""
        steps = [check_actions(a, self.num, self.action_dim, "the environment") for a in np.moveaxis(actions, 1, 0)]
        chunk = np.stack(steps, 1)
        answers = self.ask({i: ("step_chunk", chunk[share]) for i, share in enumerate(self.shares)})
        outcomes = [join_outcomes(parts) for parts in zip(*answers.values(), strict=True)]
        self.obs = outcomes[-1][0].copy()
        return outcomes

    def __getattr__(self, name: str) -> Any:
        """The optional methods, those that the environment has."""
        if name in OPTIONAL and name in self.__dict__.get("methods", ()):
            return getattr(self, f"{name}_of_workers")
        raise AttributeError(name)

    def frame_of_workers(self, row: int) -> Any:
        """One row now, as a PIL image."""
        i = next(i for i, share in enumerate(self.shares) if share.start <= row < share.stop)
        return self.ask({i: ("frame", row - self.shares[i].start)})[i]

    def pixels_of_workers(self, size: tuple[int, int]) -> np.ndarray:
        """Small images of all rows now, uint8 ``[N, 3, *size]``."""
        return np.concatenate(list(self.ask({i: ("pixels", size) for i in range(len(self.shares))}).values()))

    def draw_of_workers(self, paths: Sequence[np.ndarray], colours: Any = None, title: str = "") -> Any:
        """A figure of paths, as a PIL image."""
        return self.ask({0: ("draw", paths, colours, title)})[0]

    # --------------------------------------------------------------------------------------------- the processes
    def ask(self, requests: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        """The answers to ``{worker: (method, *arguments)}``, which are worked on at the same time."""
        if self.broken:
            raise ValueError("workers: a call before this one was interrupted or failed, which ended the processes of "
                             "these environments; make them anew")  # fmt: skip
        self.broken = True  # until all answers are here: one that stays behind would be taken for the next call's
        try:
            for i, request in requests.items():
                with self.watching(i):
                    self.connections[i].send(request)
            answers = [self.receive(i) for i in requests]
        except BaseException:
            for process in self.processes:
                process.kill()
            end_processes(self.connections, self.processes)
            raise
        self.broken = False
        return {i: self.unpack(i, *answer) for i, answer in zip(requests, answers, strict=True)}

    def receive(self, i: int) -> tuple[str, Any]:
        """What a worker answers, as :func:`answer` returns it."""
        with self.watching(i):
            return self.connections[i].recv()

    def unpack(self, i: int, kind: str, value: Any) -> Any:
        """The result of a worker's answer. Raises its error, if it is one."""
        if kind == "refusal":
            raise ValueError(value)
        if kind == "error":
            raise RuntimeError(f"in the process of environments {self.name_share(i)}:\n{value}")
        return value

    def name_share(self, i: int) -> str:
        """``0 … 24``, the environments of a worker."""
        return f"{self.shares[i].start} … {self.shares[i].stop - 1}"

    @contextlib.contextmanager
    def watching(self, i: int) -> Iterator[None]:
        """``ValueError`` if a worker has ended."""
        try:
            yield
        except (EOFError, OSError):
            process = self.processes[i]
            process.join(LINGER)
            code = process.exitcode
            how = f"was ended by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
            more = " (is memory short?)" if code == -signal.SIGKILL else ""
            raise ValueError(
                f"workers: the process of environments {self.name_share(i)} {how}{more}; with --workers 0 "
                "they run in this process, which then shows why"
            ) from None


def end_processes(connections: Sequence[Connection], processes: Sequence[BaseProcess]) -> None:
    """Let the processes end, which they do when nobody is left to ask them; kill those that do not."""
    for connection in connections:
        connection.close()
    for process in processes:
        process.join(LINGER)
        if process.is_alive():
            process.kill()
            process.join()


def join_outcomes(parts: Sequence[Outcome]) -> Outcome:
    """The outcome of all rows in one step, from those of each worker."""
    *arrays, infos = zip(*parts, strict=True)
    obs, reward, terminated, truncated = map(np.concatenate, arrays)
    info = join_infos([(part, len(rows)) for part, rows in zip(infos, arrays[0], strict=True)])
    return obs, reward, terminated, truncated, info


def join_infos(parts: Iterable[tuple[Mapping[str, np.ndarray], int]]) -> dict[str, np.ndarray]:
    """The infos of all rows, from those of each worker and the number of its rows; 0 where none was reported yet."""
    parts = list(parts)
    kinds = {name: value.dtype for info, _ in parts for name, value in info.items()}
    return {
        name: np.concatenate([info.get(name, np.zeros(num, kind)) for info, num in parts])
        for name, kind in kinds.items()
    }


def serve(connection: Connection, build: Callable[[int], Env], num: int) -> None:
    """What a worker does: make its environments, and answer until nobody is left to ask."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to all processes of a group; the one that asks decides
        signal.signal(number, signal.SIG_IGN)
    env: Any = None

    def describe() -> dict[str, Any]:
        nonlocal env
        env = build(num)
        about = {name: getattr(env, name) for name in ("obs_dim", "action_dim", "max_steps")}
        return about | {"modes": getattr(env, "modes", 0), "methods": [m for m in OPTIONAL if hasattr(env, m)]}

    def take_chunk(actions: np.ndarray) -> list[Outcome]:
        return list(step_chunk(env, actions))

    with contextlib.suppress(EOFError, OSError):
        connection.send(answer(describe))
        while True:
            name, *arguments = connection.recv()
            function = take_chunk if name == "step_chunk" else getattr(env, name)
            connection.send(answer(function, *arguments))


def answer(function: Callable[..., Any], *arguments: Any) -> tuple[str, Any]:
    """``("result", result)`` of a call, ``("refusal", message)`` of genkit, or ``("error", traceback)``."""
    try:
        return "result", function(*arguments)
    except Exception as e:
        raised_in = Path(traceback.extract_tb(e.__traceback__)[-1].filename)
        if isinstance(e, ValueError) and raised_in.is_relative_to(PACKAGE):
            return "refusal", str(e)
        return "error", traceback.format_exc()
