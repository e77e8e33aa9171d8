"""A policy as one graph that needs no genkit: TorchScript, torch.export or ONNX, with the sampler's steps inside.

The graph maps standard normals and observations to the actions that are carried out, for one environment. The command
itself compares it with the policy and refuses to write one that differs.
"""

from __future__ import annotations

import json
import logging
import time
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from genkit.config import load_object
from genkit.config.numbers import Count
from genkit.data.codecs import Actions
from genkit.integrations.export import ExportFormat
from genkit.training.run import Run

POLICY = "genkit.rl.policies.policy:Policy"  # of a higher room, imported on demand
TOLERANCE = 1e-5  # largest difference to the policy, in units of the action's scale
EXAMPLES = 4  # observations that the graph is compared on


class PolicyGraph(nn.Module):
    """``forward(noise [1, A, Tp], [choice [1, 1],] obs [1, To, Do], [frames [1, To, C, H, W]]) -> actions [1, Ta, A]``.

    ``noise`` and ``choice`` are standard normals; ``choice`` draws the anchor of an anchored policy.
    """

    def __init__(self, policy: Any):
        super().__init__()
        self.nets, self.policy = nn.ModuleDict(policy.run.nets), policy
        self.names = ["noise", *(["choice"] if policy.run.objective.chosen_condition else [])]
        self.names += [name for name in ("obs", "frames") if name in policy.run.spec.cond]

    def forward(self, *inputs: Tensor) -> Tensor:
        given = dict(zip(self.names, inputs, strict=True))
        policy, past = self.policy, self.policy.obs_shape[0] - 1

        def noise(shape: Sequence[int]) -> Tensor:
            raise ValueError("to: this sampler draws noise at every step; take a deterministic one, such as ddim")

        cond = {k: given[k] for k in ("obs", "frames") if k in given}
        cond |= {k: v.to(given["noise"].device) for k, v in policy.conditions.items()}
        if "choice" in given:
            objective = policy.run.objective
            log_probs = objective.choice_log_probs(policy.run.nets, cond, given["noise"])
            cond[objective.chosen_condition] = choose(log_probs, given["choice"])
        x = policy.generate(given["noise"], cond, noise).float()
        obs = given.get("obs", given["noise"].new_zeros(1, past + 1, 0))
        actions = policy.run.codec.to_absolute(x, obs)
        return actions[:, :, past : past + policy.act_steps].transpose(1, 2)


def choose(log_probs: Tensor, normal: Tensor) -> Tensor:
    """The choice ``[B]`` that a standard ``normal`` ``[B, 1]`` makes among those of ``log_probs`` ``[B, K]``: the
    quantile at its own. Of operations that ONNX has, unlike ``AnchoredFlow.generator``, whose choice it is."""
    quantile = 0.5 + 0.5 * torch.erf(normal * 0.5**0.5)
    below = (log_probs.exp().cumsum(1) < quantile).to(torch.int64).sum(1)
    return below.clamp(max=log_probs.shape[1] - 1)


@dataclass(frozen=True)
class ToGraph(ExportFormat):
    """What the formats of a policy as one graph share."""

    steps: Count | None = None
    """Sampler steps in the graph; None: as for genkit rollout."""
    act_steps: Count | None = None
    """Actions that the graph returns; None: as in training."""

    single_file: ClassVar[str | None] = None

    @abstractmethod
    def write_graph(self, graph: PolicyGraph, inputs: tuple[Tensor, ...], file: Path) -> None:
        """Write the graph, traced on example inputs."""

    @abstractmethod
    def load_graph(self, file: Path, names: Sequence[str]) -> Callable[..., Tensor]:
        """The written graph as a function."""

    def write(self, run: Run, folder: Path) -> list[str]:
        codec = run.codec
        if not isinstance(codec, Actions):
            raise ValueError(f"to: {run.directory.name} is no policy of action chunks; allowed: --to run, diffusers")
        run = replace(run, nets={k: net.cpu() for k, net in run.nets.items()}, device=torch.device("cpu"))
        known = {"obs", "frames", run.objective.chosen_condition}
        if unknown := [name for name in run.spec.cond if name not in known]:
            raise ValueError(
                f"to: {run.directory.name} was trained with {unknown[0]}, and a graph has no input for it, so that it "
                "would act without; allowed: --to run"
            )
        policy = load_object(POLICY).load(run, steps=self.steps, act_steps=self.act_steps)
        graph = PolicyGraph(policy).eval().requires_grad_(False)
        assert self.single_file is not None
        file, examples = (
            folder / self.single_file,
            [example_inputs(policy, graph.names, seed) for seed in range(EXAMPLES)],
        )
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a graph of one batch size is meant
            expected = [graph(*inputs) for inputs in examples]
            self.write_graph(graph, examples[0], file)
            loaded = self.load_graph(file, graph.names)
            scale = max(1.0, *(abs(v) for v in codec.scale))
            error = max(float((loaded(*i) - e).abs().max()) / scale for i, e in zip(examples, expected, strict=True))
        if not error <= TOLERANCE:
            raise ValueError(f"to: the graph differs from the policy by {error:.1e}; allowed {TOLERANCE:g}")
        about = {
            "inputs": {n: list(v.shape) for n, v in zip(graph.names, examples[0], strict=True)},
            "output": list(expected[0].shape),
            "steps": policy.steps,
            "run": run.directory.name,
            "weights": run.weights,
            "largest_difference": error,
            "cpu_ms": cpu_milliseconds(loaded, examples[0]),
            "policy_cpu_ms": cpu_milliseconds(graph, examples[0]),
        }
        (folder / "policy.json").write_text(json.dumps(about, indent=1) + "\n")
        given = ", ".join(f"{name} {shape}" for name, shape in about["inputs"].items())
        return [
            f"inputs {given}; noise and choice are standard normals",
            f"output actions {about['output']}; differs from the policy by at most {error:.1e}",
            f"a chunk takes {about['cpu_ms']:.2f} ms of CPU time, {about['policy_cpu_ms']:.2f} in genkit "
            f"({policy.steps} sampler steps, one thread)",
        ]


@torch.no_grad()
def cpu_milliseconds(graph: Callable[..., Tensor], inputs: tuple[Tensor, ...], repeats: int = 20) -> float:
    """CPU time of a call, with one thread: the least mean of five times ``repeats`` calls, after one such time to warm
    up, since other processes that share the caches only ever add to it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def measure() -> float:
        start = time.process_time()
        for _ in range(repeats):
            graph(*inputs)
        return 1e3 * (time.process_time() - start) / repeats

    try:
        measure()
        return min(measure() for _ in range(5))
    finally:
        torch.set_num_threads(threads)


def example_inputs(policy: Any, names: Sequence[str], seed: int) -> tuple[Tensor, ...]:
    """Inputs of the graph, drawn by ``seed``."""
    draw = torch.Generator().manual_seed(seed)
    spec = policy.run.spec
    shapes = {
        "noise": spec.shape,
        "choice": (1,),
        **{k: spec.cond[k].shape for k in ("obs", "frames") if k in spec.cond},
    }
    return tuple(
        torch.randint(0, 256, (1, *shapes[n]), generator=draw, dtype=torch.uint8)
        if n == "frames"
        else torch.randn(1, *shapes[n], generator=draw)
        for n in names
    )


@dataclass(frozen=True)
class ToTorchScript(ToGraph):
    """A policy as TorchScript, for ``torch.jit.load`` in Python or C++."""

    single_file: ClassVar[str | None] = "policy.pt"

    def write_graph(self, graph: PolicyGraph, inputs: tuple[Tensor, ...], file: Path) -> None:
        traced = torch.jit.trace(graph, inputs, check_trace=False)
        torch.jit.save(torch.jit.freeze(traced), file)

    def load_graph(self, file: Path, names: Sequence[str]) -> Callable[..., Tensor]:
        return torch.jit.load(file)


@dataclass(frozen=True)
class ToTorchExport(ToGraph):
    """A policy as an exported program of torch, for ``torch.export.load`` and what compiles such programs.

    ``torch.export`` itself refuses a sampler, which reads its times as numbers; torch converts the traced graph.
    """

    single_file: ClassVar[str | None] = "policy.pt2"

    def write_graph(self, graph: PolicyGraph, inputs: tuple[Tensor, ...], file: Path) -> None:
        try:
            from torch._export.converter import TS2EPConverter  # lazy: slow to import, and not part of torch's API
        except ImportError:
            raise ValueError(f"to: torch {torch.__version__} converts no traced graphs; take torchscript") from None
        traced = torch.jit.trace(graph, inputs, check_trace=False)
        with quiet("torch._export"):
            torch.export.save(TS2EPConverter(cast(Any, traced), inputs).convert(), file)

    def load_graph(self, file: Path, names: Sequence[str]) -> Callable[..., Tensor]:
        return torch.export.load(file).module()


@contextmanager
def quiet(name: str) -> Iterator[None]:
    """Nothing but errors from the logger ``name`` in a block: that sizes are fixed is meant."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@dataclass(frozen=True)
class ToONNX(ToGraph):
    """A policy as ONNX, for ONNX Runtime and others (extra ``onnx``)."""

    single_file: ClassVar[str | None] = "policy.onnx"

    def write_graph(self, graph: PolicyGraph, inputs: tuple[Tensor, ...], file: Path) -> None:
        require_onnx()
        # by tracing: a sampler reads its times as numbers, which torch.export does not allow
        torch.onnx.export(graph, inputs, str(file), input_names=graph.names, output_names=["actions"], dynamo=False)

    def load_graph(self, file: Path, names: Sequence[str]) -> Callable[..., Tensor]:
        import onnxruntime  # lazy: an extra

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # more only wait for each other
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

        def run(*inputs: Tensor) -> Tensor:
            given = {n: v.numpy() for n, v in zip(names, inputs, strict=True)}
            return torch.from_numpy(session.run(None, given)[0])

        return run


def require_onnx() -> None:
    """``ValueError`` unless the packages of the extra are installed."""
    try:
        import onnx  # noqa: F401  # lazy: an extra
        import onnxruntime  # noqa: F401  # lazy: an extra
    except ImportError as e:
        raise ValueError(f"to: onnx needs {e.name}; pip install 'genkit-torch[onnx]', or take torchscript") from None
