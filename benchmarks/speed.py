"""One training step of our U-Net against that of diffusers' ``UNet2DModel``, at equal parameters and FLOPs.

    python -m benchmarks.speed --threads 1 --steps 15 --out speed.json
    python -m benchmarks.speed --quality --data-root cifar10.zip      # also: seconds to the same loss

Both sides take the same images and do the same work: noise, eps-prediction loss on DDPM's linear schedule, backward,
clipping at 1, AdamW, an EMA. "diffusers" does it as their ``train_unconditional`` example does (fp32, attention heads
of 8, ``DDPMScheduler``, ``EMAModel``), without Accelerate's overhead. "genkit" does it as ``genkit train`` does (bf16
where the device is fast at it, heads of 64, fused AdamW, one ``lerp`` for the EMA). Rows (b) take every such choice
away and compare the same network in the same precision. All contenders live in one process and take turns, so a busy
machine slows all of them; each time is a median. With one thread on a CPU, time is CPU time of this process.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import statistics
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkit.backbones import UNet
from genkit.core import Spec
from genkit.training.loop import fast_bf16

PEAK = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
}  # bf16, dense
LEVELS = 1000
for_each_lerp_ = torch._foreach_lerp_  # pyright: ignore[reportPrivateImportUsage]


# ---------------------------------------------------------------------------------------------------- contenders
@dataclass
class Contender:
    """A network, the step that trains it, and how long each step took."""

    name: str
    net: nn.Module
    step: Callable[[Tensor, Tensor, Tensor], Tensor]  # (x0, noise, integer time) -> loss
    predict: Callable[[Tensor, Tensor, Tensor], Tensor]  # the same, without learning
    settings: dict[str, Any]
    seconds: list[float] = field(default_factory=list)

    @property
    def params(self) -> int:
        return sum(p.numel() for p in self.net.parameters())


def diffusers_unet(cfg: UNet, shape: tuple[int, ...], head: int, same_block: bool) -> nn.Module:
    """Their network of the same widths. ``same_block``: AdaGN like ours, in place of their default, an added shift."""
    from diffusers.models.unets.unet_2d import UNet2DModel

    attends = [shape[1] // 2**i in cfg.attention for i in range(len(cfg.mults))]
    kind = lambda a, way: f"{'Attn' if a else ''}{way}Block2D"  # noqa: E731
    return UNet2DModel(
        sample_size=shape[1],
        in_channels=shape[0],
        out_channels=shape[0],
        layers_per_block=cfg.num_blocks,
        block_out_channels=tuple(cfg.width * m for m in cfg.mults),
        down_block_types=tuple(kind(a, "Down") for a in attends),
        up_block_types=tuple(kind(a, "Up") for a in reversed(attends)),
        attention_head_dim=head,
        resnet_time_scale_shift="scale_shift" if same_block else "default",
    )


def diffusers_contender(name: str, net: nn.Module, device: torch.device, lr: float, bf16: bool = False) -> Contender:
    """Their example's loop, written out."""
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    from diffusers.training_utils import EMAModel

    net = net.to(device)
    scheduler = DDPMScheduler(num_train_timesteps=LEVELS, beta_schedule="linear")
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    ema = EMAModel(net.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    ema.to(device)

    def loss(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        noisy = scheduler.add_noise(x0, noise, t)  # type: ignore[arg-type]
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            output = net(noisy, t).sample
        return F.mse_loss(output.float(), noise.float())

    def step(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        value = loss(x0, noise, t)
        value.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(net.parameters())
        return value.detach()

    return Contender(name, net, step, torch.no_grad()(loss), {"bf16": bf16})


def genkit_contender(
    name: str, cfg: UNet, shape: tuple[int, ...], device: torch.device, lr: float, bf16: bool, compiled: bool = False,
    channels_last: bool = False,
) -> Contender:  # fmt: skip
    """Our loop: what ``genkit train`` does in a step."""
    net = cfg.denoiser(Spec(shape)).to(device)
    if channels_last:
        net = net.to(memory_format=torch.channels_last)
    call = torch.compile(net) if compiled else net
    params = list[Tensor](net.parameters())
    ema = [p.detach().clone() for p in params]
    optimizer = torch.optim.AdamW(params, lr=lr, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8, fused=True)
    signal = torch.cumprod(1 - torch.linspace(1e-4, 0.02, LEVELS, dtype=torch.float64), 0)
    alpha, sigma = ((s.sqrt().float().to(device).view(-1, 1, 1, 1)) for s in (signal, 1 - signal))
    count = 0

    def loss(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        x = alpha[t] * x0 + sigma[t] * noise
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            output = call(x, t / LEVELS)
        return F.mse_loss(output.float(), noise)

    def step(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        nonlocal count
        value = loss(x0, noise, t)
        value.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        count += 1
        with torch.no_grad():
            for_each_lerp_(ema, params, 1 - min(0.9999, 1 - (1 + count) ** -0.75))
        return value.detach()

    settings = {"bf16": bf16, "head": cfg.head_size, "compiled": compiled, "channels_last": channels_last}
    return Contender(name, net, step, torch.no_grad()(loss), settings)


# ------------------------------------------------------------------------------------------------------ measuring
def flops(c: Contender, batch: tuple[Tensor, Tensor, Tensor]) -> int:
    """Of one forward and backward pass of one image (multiplications and additions counted apart)."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        c.step(*(v[:1] for v in batch))
    return counter.get_total_flops()


def clock(device: torch.device, threads: int) -> tuple[str, Callable[[], float]]:
    if device.type == "cuda":
        return "wall, synchronised", lambda: (torch.cuda.synchronize(), time.perf_counter())[1]
    return ("CPU time", time.process_time) if threads == 1 else ("wall", time.perf_counter)


def draw(images: Tensor, size: int, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    index = torch.randint(len(images), (size,), generator=generator)
    x0 = images[index].float() / 127.5 - 1
    noise = torch.randn(x0.shape, generator=generator)
    t = torch.randint(LEVELS, (size,), generator=generator)
    return x0.to(device), noise.to(device), t.to(device)


def load_images(root: str | None, size: int) -> tuple[Tensor, str]:
    """uint8 ``[N, 3, size, size]``: a zip of pictures, or scikit-learn's digits enlarged."""
    if root is None:
        from sklearn.datasets import load_digits

        digits = torch.from_numpy(load_digits(return_X_y=True)[0].reshape(-1, 8, 8)).float()[:, None] / 16
        large = F.interpolate(digits, size=(size, size), mode="bilinear").expand(-1, 3, -1, -1)
        return (large * 255).round().byte(), "digits, enlarged"
    from PIL import Image

    with zipfile.ZipFile(root) as z:
        names = sorted(n for n in z.namelist() if n.lower().endswith((".png", ".jpg")))[:10_000]
        if not names:
            raise ValueError(f"--data-root: no .png or .jpg in {root}; give a zip of pictures")
        pictures = [Image.open(io.BytesIO(z.read(n))).convert("RGB").resize((size, size)) for n in names]
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2).contiguous(), root


def take_turns(contenders: list[Contender], steps: int, batch: tuple, now: Callable[[], float]) -> None:
    for i in range(-3, steps):
        for c in contenders if i % 2 else contenders[::-1]:
            start = now()
            c.step(*batch)
            if i >= 0:
                c.seconds.append(now() - start)


def time_to_quality(pair: tuple[Contender, Contender], images: Tensor, args: argparse.Namespace, now, device) -> dict:
    """Train theirs for ``--quality-steps``; how long until ours has the validation loss that theirs ends with?"""
    train, held_out = images[256:], images[:256]
    validation = draw(held_out, 256, torch.Generator().manual_seed(1), device)
    curves: list[list[tuple[int, float, float]]] = []
    for c in pair:
        generator, spent, curve = torch.Generator().manual_seed(0), 0.0, []
        c.net.train()
        for i in range(1, args.quality_steps + 1):
            batch = draw(train, args.batch, generator, device)
            start = now()
            c.step(*batch)
            spent += now() - start
            if i % max(1, args.quality_steps // 20) == 0:
                parts = [c.predict(*(v[j : j + 64] for v in validation)) for j in range(0, 256, 64)]
                curve.append((i, spent, torch.stack(parts).mean().item()))
        curves.append(curve)
    theirs, ours = curves
    goal = theirs[-1][2]
    first = next((j for j, point in enumerate(ours) if point[2] <= goal), None)
    answer: dict[str, Any] = {
        "theirs": pair[0].name,
        "ours": pair[1].name,
        "goal": goal,
        "theirs_seconds": theirs[-1][1],
    }
    answer |= {"curve_theirs": theirs, "curve_ours": ours, "ours_seconds": None, "ours_steps": None, "ratio": None}
    if first is not None:
        answer |= {
            "ours_seconds": ours[first][1],
            "ours_steps": ours[first][0],
            "ratio": theirs[-1][1] / ours[first][1],
        }
    return answer


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="genkit bench speed", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=15, help="timed steps of each contender")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=32, help="side of the images")
    parser.add_argument("--width", type=int, default=UNet.width)
    parser.add_argument("--mults", type=int, nargs="+", default=list(UNet.mults))
    parser.add_argument("--blocks", type=int, default=UNet.num_blocks)
    parser.add_argument("--attention", type=int, nargs="*", default=list(UNet.attention), help="sides that attend")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; with 1, CPU time is measured")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="also a compiled genkit")
    parser.add_argument("--channels-last", action="store_true", help="also genkit in channels_last")
    parser.add_argument("--quality", action="store_true", help="also: seconds to the same validation loss (minutes)")
    parser.add_argument("--quality-steps", type=int, default=120)
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--data-root", help="a zip of pictures; default: scikit-learn's digits, enlarged")
    parser.add_argument("--out", help="write everything to this JSON file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    from rich.console import Console
    from rich.table import Table

    args = arguments(sys.argv[1:] if argv is None else argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device, shape = torch.device(args.device), (3, args.size, args.size)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    cfg = UNet(width=args.width, mults=tuple(args.mults), num_blocks=args.blocks, attention=tuple(args.attention))
    heads8 = UNet(**{**asdict(cfg), "head_size": 8})
    bf16 = fast_bf16(device)
    kind, now = clock(device, args.threads)
    images, source = load_images(args.data_root, args.size)
    batch = draw(images, args.batch, torch.Generator().manual_seed(0), device)

    def theirs(name: str, head: int, same_block: bool, half: bool = False) -> Contender:
        return diffusers_contender(name, diffusers_unet(cfg, shape, head, same_block), device, args.lr, half)

    def ours(name: str, cfg: UNet, half: bool, **more: bool) -> Contender:
        return genkit_contender(name, cfg, shape, device, args.lr, half, **more)

    contenders = {
        "d": theirs("diffusers, as shipped", 8, False),
        "g": ours("genkit, as shipped", cfg, bf16),
        "d64": theirs("diffusers, AdaGN, heads of 64, fp32", 64, True),
        "g64": ours("genkit, heads of 64, fp32", cfg, False),
        "d8": theirs("diffusers, AdaGN, heads of 8, fp32", 8, True),
        "g8": ours("genkit, heads of 8, fp32", heads8, False),
    }
    pairs = [("(a) as shipped", "d", "g"), ("(b) same network, heads of 64, fp32", "d64", "g64")]
    pairs.append(("(b) same network, heads of 8, fp32", "d8", "g8"))
    if bf16:
        contenders["d64h"] = theirs("diffusers, AdaGN, heads of 64, bf16", 64, True, True)
        pairs.append(("(b) same network, heads of 64, bf16", "d64h", "g"))
    if args.compile:
        contenders["gc"] = ours("genkit, compiled", cfg, bf16, compiled=True)
        pairs.append(("as shipped, genkit compiled", "d", "gc"))
    if args.channels_last:
        contenders["gl"] = ours("genkit, channels_last", cfg, bf16, channels_last=True)
        pairs.append(("as shipped, genkit channels_last", "d", "gl"))

    work = {key: flops(c, batch) for key, c in contenders.items() if not c.settings.get("compiled")}
    work.setdefault("gc", work["g"])
    take_turns(list(contenders.values()), args.steps, batch, now)

    console = Console()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    peak = next((p for key, p in PEAK.items() if key in name), None) if device.type == "cuda" else None
    table = Table(
        title=f"training step, {args.size}x{args.size}x3, batch {args.batch}, {name}, {args.threads} thread(s)"
    )
    for column in (
        "network and loop",
        "parameters",
        "GFLOP/image",
        "ms (median)",
        "images/s",
        *(["MFU"] if peak else []),
    ):
        table.add_column(column, justify="left" if column[0] == "n" else "right")
    rows = {}
    for key, c in contenders.items():
        median = statistics.median(c.seconds)
        low, *_, high = statistics.quantiles(c.seconds, n=10)
        rows[key] = {"name": c.name, "params": c.params, "flops_per_image": work[key], "seconds": median, "p10": low}
        rows[key] |= {"p90": high, "images_per_second": args.batch / median, **c.settings}
        cells = [c.name, f"{c.params:,}", f"{work[key] / 1e9:.3f}", f"{1e3 * median:.1f}", f"{args.batch / median:.1f}"]
        if peak:
            rows[key]["mfu"] = work[key] * args.batch / median / peak
            cells.append(f"{rows[key]['mfu']:.1%}")
        table.add_row(*cells)
    console.print(table)

    table = Table(title=f"speed-up of genkit over diffusers ({kind}; medians of {args.steps} interleaved steps)")
    for column in ("row", "speed-up", "parameters", "FLOPs"):
        table.add_column(column, justify="left" if column == "row" else "right")
    ratios = {}
    for label, d, g in pairs:
        ratios[label] = {
            "speedup": rows[d]["seconds"] / rows[g]["seconds"],
            "params": rows[g]["params"] / rows[d]["params"],
            "flops": work[g] / work[d],
        }
        table.add_row(label, *(f"{v:.2f}x" if k == "speedup" else f"{v - 1:+.1%}" for k, v in ratios[label].items()))
    console.print(table)

    quality = []
    if args.quality:
        fresh = {
            "(c) as shipped": (theirs("diffusers, as shipped", 8, False), ours("genkit, as shipped", cfg, bf16)),
            "(c) same network, fp32": (
                theirs("diffusers, AdaGN, 64, fp32", 64, True),
                ours("genkit, fp32", cfg, False),
            ),
        }
        table = Table(title=f"(c) seconds ({kind}) to the same validation loss on {source}, lr {args.lr}")
        for column in ("row", "loss", "diffusers", "genkit", "speed-up"):
            table.add_column(column, justify="left" if column == "row" else "right")
        for label, pair in fresh.items():
            q = time_to_quality(pair, images, args, now, device) | {"row": label}
            quality.append(q)
            reached = (f"{q['ours_seconds']:.1f}", f"{q['ratio']:.2f}x") if q["ratio"] else ("not reached", "-")
            table.add_row(label, f"{q['goal']:.4f}", f"{q['theirs_seconds']:.1f}", *reached)
        console.print(table)

    if args.out:
        report = {"command": ["genkit", "bench", "speed", *(sys.argv[1:] if argv is None else argv)]}
        report |= {"settings": vars(args), "backbone": asdict(cfg), "clock": kind, "device": name, "data": source}
        report |= {"rows": rows, "ratios": ratios, "quality": quality, "versions": versions(), "peak_flops": peak}
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps(report, indent=1) + "\n")
        console.print(f"written: {args.out}")
    return 0


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def versions() -> dict[str, str]:
    import diffusers

    import genkit

    named = {"torch": torch.__version__, "diffusers": diffusers.__version__, "genkit": genkit.__version__}
    return {**named, "python": platform.python_version(), "platform": platform.platform()}


if __name__ == "__main__":
    sys.exit(main())
