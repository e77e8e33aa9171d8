"""What the documentation shows of docs/results/*.json: one function for each table (TABLES) and each number (VALUES).

Spreads are sample standard deviations over seeds; brackets are 95 % confidence intervals as the results file has them.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"


# ------------------------------------------------------------------------------------------------ reading, formatting
@cache
def load(name: str) -> Any:
    """The results file ``name`` without its suffix."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(header: Sequence[str], rows: Iterable[Sequence[str]], align: str = "---:") -> str:
    """A Markdown table; the first column is text, the others are numbers, to the right unless told otherwise."""
    lines = [header, ["---", *[align] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float, digits: int) -> str:
    """``value`` with so many decimals; what rounds to zero has no sign."""
    text = f"{value:,.{digits}f}"
    return text.lstrip("-") if float(text.replace(",", "")) == 0 else text


def spread(values: Sequence[float], digits: int) -> str:
    """``mean ± standard deviation`` over seeds."""
    return f"{number(mean(values), digits)} ± {number(stdev(values), digits)}"


def interval(estimate: Mapping[str, Any], digits: int) -> str:
    """``value [low, high]``, or the value alone if the file has no interval."""
    value = number(estimate["value"], digits)
    if estimate["low"] is None:
        return value
    return f"{value} [{number(estimate['low'], digits)}, {number(estimate['high'], digits)}]"


def change(pair: Sequence[float], digits: int) -> str:
    """``before → after``."""
    return f"{number(pair[0], digits)} → {number(pair[1], digits)}"


# ------------------------------------------------------------------------------------------------------------- images
def digits() -> str:
    """The default run: three flows, a DDPM, a GAN, and real training digits."""
    flows = [load(f"digits-flow-seed{seed}") for seed in range(3)]
    names = ("frechet", "precision", "recall")
    rows = [["flow, Heun, 20 steps; three seeds", spread([run["accuracy"] for run in flows], 3)]]
    rows[0] += [spread([run["samples"][name] for run in flows], 3) for name in names]
    for label, file in (("ddpm, DDIM, 50 steps; one seed", "digits-ddpm-seed0"), ("gan; one seed", "gan-digits")):
        run = load(file)
        rows.append([label, number(run["accuracy"], 3), *[number(run["samples"][name], 3) for name in names]])
    real = flows[0]["real_train"]
    rows.append(["real training digits", "", *[number(real[name], 3) for name in names]])
    return table(["", "class accuracy", "Fréchet distance", "precision", "recall"], rows)


QUALITY = {  # the name in the file -> what the page calls it
    "ddpm": "ddpm",
    "edm": "edm",
    "flow": "flow",
    "flow-ot": "flow, OT coupling",
    "flow-map": "flow map",
    "drift": "drifting",
    "vae": "vae",
    "gan": "gan (relativistic)",
    "latent": "latent (a first stage, then a flow)",
    "real": "359 held-out real digits",
}


def quality() -> str:
    """``genkit bench quality``: one row an objective, Fréchet distance by number of evaluations."""
    found, rows = load("quality-digits")["rows"], []
    for name, label in QUALITY.items():
        own = {row["nfe"]: row["values"] for row in found if row["name"] == name}
        best = own.get(20) or next(iter(own.values()))
        distances = [interval(own[nfe]["fd (classifier)"], 2) if nfe in own else "" for nfe in (1, 5, 10, 20, 50)]
        if name == "real":
            distances[0] = interval(best["fd (classifier)"], 2)
        # intervals at one budget only: six in a row would not fit a page
        distances[1:4] = [text.partition(" ")[0] for text in distances[1:4]]
        rows.append(
            [label, *distances, number(best["accuracy"]["value"], 3), number(best["recall (classifier)"]["value"], 3)]
        )
    return table(["", "1 evaluation", "5", "10", "20", "50", "class accuracy", "recall"], rows)


def fid() -> str:
    """Inception FID and KID of the cards that were kept."""
    cards = {
        "fashion-flow": "Fashion-MNIST, flow in pixels (1.8M parameters), Heun, 10 steps",
        "fashion-fast": "Fashion-MNIST, the same network by Muon (17 CPU minutes), Heun, 10 steps",
        "fashion-fast-6400": "Fashion-MNIST, the same with 6,400 steps (41 CPU minutes), Heun, 10 steps",
        "fashion-latent-flow": "Fashion-MNIST, flow in latents, Heun, 10 steps",
        "fashion-first-stage": "Fashion-MNIST, reconstructions of the test set by the first stage",
        "fashion-test-against-train": "Fashion-MNIST, the test set itself",
        "cifar10-fast": "CIFAR-10, flow by Muon (59 CPU minutes), DPM-Solver++(2M), 10 steps, against test pictures",
        "cifar10-test-against-train": "CIFAR-10, the test set itself (`legacy_tensorflow`)",
    }
    rows = []
    for name, label in cards.items():
        card = load(name)
        metrics, settings = card["metrics"], card["settings"]
        counts = [number(settings["n"], 0), number(settings["reference"]["n"], 0)]
        rows.append(
            [f"[{label}]({name}.json)", *counts, interval(metrics["fid"], 2), number(metrics["kid"]["value"], 4)]
        )
    return table(["samples", "n", "against", "FID", "KID"], rows)


def lora() -> str:
    rows = []
    for name, seeds in load("lora-digits")["results"].items():
        run = seeds["0"]
        cells = [f"{run['trained_parameters']:,}" if name != "the base" else "", interval(run["accuracy"], 3)]
        cells += [
            interval(run["fd (classifier)"], 2),
            number(run["recall (classifier)"]["value"], 2),
            str(run.get("cpu_seconds", "")),
        ]
        rows.append([name, *cells])
    header = ["", "trained parameters", "class accuracy", "Fréchet distance", "recall", "training, CPU s"]
    return table(header, rows)


def gan_modes() -> str:
    rows = []
    for name, seeds in load("gan-8gaussians")["results"].items():
        runs = list(seeds.values())
        near = ", ".join(f"{100 * run['near']:.0f} %" for run in runs)
        rows.append([name, ", ".join(str(run["modes"]) for run in runs), near])
    return table(["GAN loss (one number per seed)", "modes of 8", "samples near a mode"], rows)


# --------------------------------------------------------------------------------------------------------------- toys
TOYS = {  # the cell in the file -> header, published W2 and path energy (I-CFM, OT-CFM)
    "N->8gaussians": ("N → 8 Gaussians", ("0.373 ± 0.103", "0.303 ± 0.043"), ("0.202", "0.031")),
    "moons->8gaussians": ("moons → 8 Gaussians", ("1.557 ± 0.407", "0.601 ± 0.027"), ("2.680", "0.015")),
    "N->moons": ("N → moons", ("0.178 ± 0.014", "0.130 ± 0.016"), ("0.891", "0.083")),
    "N->scurve": ("N → S-curve", ("0.242 ± 0.141", "0.144 ± 0.028"), ("0.856", "0.027")),
}


METHODS = ("I-CFM", "OT-CFM")  # of `genkit bench toy`, in the order of TOYS


def toy() -> str:
    """W2 to the target, beside the figures of Tong et al. 2023, table 2."""
    cells = load("toy")["cells"]
    rows = []
    for name, (label, published, _) in TOYS.items():
        measured = [spread(cells[f"{method} {name}"]["w2"], 3) for method in METHODS]
        rows.append([label, measured[0], published[0], measured[1], published[1], number(cells[name]["floor"][0], 3)])
    return table(["W2", "independent", "published", "OT coupling", "published", "data against data"], rows)


def toy_energy() -> str:
    """Normalised path energy, beside the figures of Tong et al. 2023, table 2; 0 for optimal transport."""
    cells = load("toy")["cells"]
    rows = []
    for name, (label, _, published) in TOYS.items():
        measured = [number(mean(cells[f"{method} {name}"]["npe"]), 3) for method in METHODS]
        rows.append([label, measured[0], published[0], measured[1], published[1]])
    return table(["normalised path energy", "independent", "published", "OT coupling", "published"], rows)


def prediction() -> str:
    cells, sizes = load("prediction")["cells"], (2, 8, 16, 512)
    rows = []
    for name in ("x0", "velocity", "eps"):
        runs = [cells[f"{name} {size}"]["w2"] for size in sizes]
        rows.append([name, *[spread(run, 1 if mean(run) > 10 else 3) for run in runs]])
    return table(["the network predicts", *[f"D = {size}" for size in sizes]], rows)


def dit_blocks() -> str:
    """Held-out losses of variants of a DiT, and their mean difference from the default, seed by seed."""
    cells = load("dit-blocks")["cells"]
    base, rows = cells["default"]["loss"], []
    for name, cell in cells.items():
        changes = [a - b for a, b in zip(cell["loss"], base, strict=True)]
        change = "" if name == "default" else spread(changes, 3)
        rows.append([name, spread(cell["loss"], 3), change, str(cell["steps"]), number(mean(cell["cpu_seconds"]), 1)])
    return table(["variant", "held-out loss", "against the default", "steps", "CPU seconds"], rows)


def recordings() -> str:
    """Images per CPU second of each format, from the slowest seed to the fastest."""
    names = {"av1": "video, AV1", "h264": "video, H.264", "npz": ".npz", "zarr": "zarr, compressed"}
    rows = []
    for name, cell in load("recordings")["cells"].items():
        rates = [f"{number(min(v), 0)} to {number(max(v), 0)}" for v in (cell["first"], cell["later"])]
        rows.append([names[name], *rates, number(max(cell["bytes"]) / 1e6, 0)])
    return table(["format", "first pass, images/s", "later passes", "memory of the first, MB"], rows)


def reflow() -> str:
    plane, pictures = load("reflow")["cells"]["plane"]["rows"], load("reflow-digits")["cells"]["digits"]["rows"]
    labels = {"1-RF": "first flow", "2-RF": "after one reflow", "3-RF": "after two", "3-RF distilled": "distilled"}
    rows = []
    for name, label in labels.items():
        cells = []
        for runs, places in ((plane[name], 3), (pictures[name], 2)):
            cells += [spread(runs[kind], places) if kind in runs else "" for kind in ("one", "many")]
        rows.append([label, *cells])
    real = [number(mean(plane["real"]["one"]), 3), "", number(mean(pictures["real"]["one"]), 2), ""]
    rows.append(["real data", *real])
    header = ["", "plane, W2: one step", "25 Heun steps", "digits, Fréchet distance: one step", "25 Heun steps"]
    return table(header, rows)


FEW = ("1", "2", "4", "8")
WAYS = {
    "improved": "flow map, improved",
    "mean": "flow map, mean",
    "lagrangian": "flow map, lagrangian",
    "shortcut": "flow map, shortcut",
    "alpha": "flow map, alpha",
    "consistency": "flow map, consistency",
    "drift": "drifting",
    "gan": "GAN",
    "distilled": "reflow and distillation",
    "reflow": "reflow, Euler's method",
    "flow": "flow, Euler's method",
    "progressive": "progressive distillation",
    "dmd": "distribution matching (DMD2)",
    "dmd-gan": "DMD2 with a discriminator",
    "one-pass": "guidance as an input, one pass",
    "two-passes": "classifier-free guidance, two passes",
}


def few_step_rows(part: str, value: str, digits: int, counts: Sequence[str] = FEW) -> list[list[str]]:
    """A row for each way that was measured, by number of steps, with the CPU seconds of a seed."""
    cells, rows = load("few-step")["cells"], []
    for way, label in WAYS.items():
        if (cell := cells.get(f"{part}/{way}")) is None:
            continue
        if lost := cell.get("diverged"):
            label += f" ({len(lost)} of {len(lost) + len(cell['steps'])} seeds diverged)"
        runs = [cell["values"].get(value, {}).get(k, ()) for k in counts]
        seconds = number(sum(cell["cpu_seconds"]) / len(runs[0]), 0) if runs[0] else ""
        shown = (spread(run, digits) if len(run) > 1 else number(run[0], digits) if run else "" for run in runs)
        rows.append([label, *shown, seconds])
    return rows


RACERS = ("genkit-recipe", "genkit", "diffusers", "lucidrains", "torchcfm")  # in the order of the tables


def race(name: str) -> str:
    from benchmarks.race_loops import TITLES  # lazy: imports torch

    cells, rows = load(name)["cells"], []
    for name in RACERS:
        found = [cell["marks"] for key, cell in cells.items() if key.split("/")[1] == name]
        if not found:
            continue
        marks = list(zip(*found, strict=True))
        values = [[entry["value"] for entry in mark] for mark in marks]
        steps = number(mean([entry["steps"] for entry in marks[-1]]), 0)
        rows.append(
            [TITLES[name], *(spread(v, 1) if len(v) > 1 else number(v[0], 1) for v in values), steps, str(len(found))]
        )
    first = next(iter(cells.values()))["marks"]
    return table(["Fréchet distance", *(f"{entry['mark']:g} CPU s" for entry in first), "steps", "seeds"], rows)


def race_shares(name: str) -> str:
    from benchmarks.race import rows_of_shares  # lazy: imports torch

    cells = load(name)["cells"]
    head, rows = rows_of_shares(cells, next(iter(cells)).split("/")[0], RACERS)
    return table(["share of the seconds of", *head], rows)


def optimizers() -> str:
    """``genkit bench optimizers``: steps, the chosen rate, and the held-out loss against the first one's."""
    from benchmarks.optimizers import Contender, best_rate, reported  # lazy: imports torch

    tasks = {"moons": 3, "four-ways": 4, "digits": 3}  # with decimals
    rows: dict[str, list[str]] = {}
    for column, (task, digits) in enumerate(tasks.items()):
        data = load(f"optimizers-{task}")
        cells, choice = data["cells"], data["settings"]["choice_seed"]
        names = list(dict.fromkeys(key.split("/")[1] for key in cells))
        first = reported(cells, task, names[0], choice)
        for name in names:
            losses = reported(cells, task, name, choice)
            lr = Contender.parse(name).options(task, best_rate(cells, task, name, choice))["lr"]
            change = spread([b - a for a, b in zip(first, losses, strict=True)], digits)
            shown = spread(losses, digits) if name == names[0] else change if change.startswith("-") else f"+{change}"
            row = rows.setdefault(name, [f"`{name}`", *[""] * 2 * len(tasks)])
            row[1 + 2 * column : 3 + 2 * column] = [f"{cells[f'{task}/{name}/cost']['steps']} by {lr:g}", shown]
    heads = [head for task in tasks for head in (f"{task}: steps by rate", "loss")]
    return table(["", *heads], rows.values())


def few_step_plane() -> str:
    real = load("few-step")["cells"]["plane/real"]["values"]["W2"]["1"]
    rows = few_step_rows("plane", "W2", 3)
    rows.append(["real data", spread(real, 3), "", "", "", ""])
    return table(["W2", "1 step", "2", "4", "8", "training, CPU s a seed"], rows)


def few_step_images(part: str, digits: int, counts: Sequence[str] = FEW) -> str:
    rows = few_step_rows(part, "Fréchet", digits, counts)
    accuracy = {row[0]: row[1] for row in few_step_rows(part, "accuracy", 3, counts)}
    rows = [[*row[:-1], accuracy[row[0]], row[-1]] for row in rows]
    real = load("few-step")["cells"][f"{part}/real"]["values"]["Fréchet"]["1"]
    rows.append(["real data", number(mean(real), digits), *[""] * (len(counts) + 1)])
    if resampled := load("few-step")["cells"].get(f"{part}/resampled"):
        drawn = spread(resampled["values"]["Fréchet"]["1"], digits)
        rows.append(["1,000 of them, drawn with replacement", drawn, *[""] * (len(counts) + 1)])
    return table(["Fréchet distance", "1 step", *counts[1:], "accuracy, 1 step", "training, CPU s"], rows)


def few_step_many() -> str:
    """The digits by 10,000 samples: one step without a teacher, and what :func:`reflow` has by the same ruler."""
    cells, ladder = load("few-step-10000")["cells"], load("reflow-digits-10000")["cells"]["digits"]
    rows = []
    for way, label in WAYS.items():
        if cell := cells.get(f"digits/{way}"):
            values = [spread(cell["values"][name]["1"], digits) for name, digits in (("Fréchet", 2), ("accuracy", 3))]
            rows.append([label + ", one step", *values, number(mean(cell["cpu_seconds"]), 0)])
    measured = ladder["rows"]
    cost = number(ladder["seconds"] / len(measured["1-RF"]["one"]), 0)
    rows.append(["two reflows and distillation, one step", spread(measured["3-RF distilled"]["one"], 2), "", cost])
    rows.append(["flow, 25 Heun steps", spread(measured["1-RF"]["many"], 2), "", ""])
    rows.append(["real data", number(mean(cells["digits/real"]["values"]["Fréchet"]["1"]), 2), "", ""])
    drawn = spread(cells["digits/resampled"]["values"]["Fréchet"]["1"], 2)
    rows.append(["10,000 of them, drawn with replacement", drawn, "", ""])
    return table(["Fréchet distance of 10,000 samples", "", "accuracy", "training, CPU s"], rows)


def few_step_guided(part: str) -> str:
    """A flow map's guidance as an input and by classifier-free guidance, by number of steps; intervals as below."""
    from benchmarks.results import student_interval

    cells, rows = load("few-step")["cells"], []
    two, one = (cells[f"{part}/{way}"]["values"] for way in ("two-passes", "one-pass"))
    for k in FEW:
        row = [k]
        for metric, digits in (("accuracy", 3), ("Fréchet", 2)):
            a, b = two[metric][k], one[metric][k]
            middle, half = student_interval([y - x for x, y in zip(a, b, strict=True)])
            row += [spread(a, digits), spread(b, digits), f"{number(middle, digits)} ± {number(half, digits)}"]
        rows.append(row)
    header = ["steps", "accuracy, two passes", "one pass", "difference", "Fréchet, two passes", "one pass",
              "difference"]  # fmt: skip
    return table(header, rows)


def few_step_policy() -> str:
    """Each seed in one step, and the flow that it was distilled from."""
    rows = [
        [str(seed["seed"]), *[cell for name in ("one step", "flow") for cell in policy_cells(seed[name])]]
        for seed in load("few-step-policy")["seeds"]
    ]
    return table(["seed", "success, one step", "bits", "success of the flow, 16 steps", "bits"], rows)


def policy_cells(run: Mapping[str, Any]) -> list[str]:
    """Success with its interval, and the mode entropy."""
    return [interval(run["success"], 3), number(run["mode_entropy_bits"]["value"], 2)]


def guidance() -> str:
    """Guidance in one pass and in two; the difference is that of the same seed, with Student's interval."""
    from benchmarks.guidance import ARMS, cells_of, difference

    measured, rows = load("guidance")["cells"], []
    for name, label in {"digits": "digits", "fashion": "Fashion-MNIST"}.items():
        cells = cells_of(measured, name)
        for scale in ("1", "2", "4"):
            row = [f"{label}, {len(cells)} seeds", scale]
            for metric, digits in (("accuracy", 3), ("fid", 2)):
                if scale == "1":
                    row += [spread([c["values"]["1"]["unguided"][metric] for c in cells], digits), "", ""]
                    continue
                row += [spread([c["values"][scale][arm][metric] for c in cells], digits) for arm in ARMS]
                middle, half = difference(cells, scale, metric)
                row.append(f"{number(middle, digits)} ± {number(half, digits)}")
            missed = "" if scale == "1" else spread([c["missed"][scale] for c in cells], 2)
            rows.append([*row, missed])
    header = ["", "scale", "accuracy, two passes", "one pass", "difference", "Fréchet, two passes", "one pass",
              "difference", "missed"]  # fmt: skip
    return table(header, rows)


# ----------------------------------------------------------------------------------------------------------- policies
def mean_of(runs: Sequence[Mapping[str, Any]], key: str, digits: int = 3) -> str:
    return spread([run[key]["value"] for run in runs], digits)


def pusht() -> str:
    found = load("pusht")["rows"]
    rows = []
    for policy in ("anchored", "flow", "ddpm", "regression"):
        runs = [row for row in found if row["policy"] == policy]
        cells = [mean_of(runs, key) for key in ("coverage", "best_reward", "success")]
        seconds = [run["train_cpu_seconds"] for run in runs]
        rows.append([policy, str(runs[0]["sampler_steps"]), *cells, f"{min(seconds)} to {max(seconds)}"])
    header = ["policy", "sampler steps", "largest coverage", "best reward", "success", "training, CPU s"]
    return table(header, rows)


def pusht_mirror() -> str:
    """Seed 0 with and without mirror images of the demonstrations."""
    with_mirror = {row["policy"]: row for row in load("pusht-100000")["rows"] if row["seed"] == 0}
    rows = []
    for row in load("pusht-no-mirror")["rows"]:
        pairs = [(row[key]["value"], with_mirror[row["policy"]][key]["value"]) for key in ("coverage", "success")]
        rows.append([row["policy"], *[change(pair, 3) for pair in pairs]])
    return table(["policy", "coverage, without → with", "success, without → with"], rows)


def pusht_finetune() -> str:
    rows = []
    for run in load("pusht-finetune")["seeds"]:
        pairs = [("before", 3), ("after", 3), ("coverage_before", 3), ("coverage_after", 3)]
        rows.append([str(run["seed"]), *[interval(run[key], places) for key, places in pairs], str(run["cpu_seconds"])])
    header = ["seed", "success before", "after", "coverage before", "after", "CPU s"]
    return table(header, rows)


def finetune_four_ways() -> str:
    """The second pair of each list is over starts that were not used for choosing anything."""
    rows = [
        [str(run["seed"]), change(run["success"][1], 3), change(run["bits"][1], 2), str(run["cpu_seconds"])]
        for run in load("finetune-four-ways")["seeds"]
    ]
    return table(["seed", "success on unseen starts", "mode entropy, bits (at most 2)", "CPU s"], rows)


def finetune_anchored(name: str = "finetune-anchored") -> str:
    """Success before and after with intervals over the starts; the ways that are left, or the coverage."""
    rows = []
    for run in load(name)["rows"]:
        bits = interval(run["mode_entropy_bits_after"], 2) if "mode_entropy_bits_after" in run else ""
        cells = [interval(run[f"success_{when}"], 3) for when in ("before", "after")]
        rows.append([run["task"], str(run["seed"]), *cells, bits, str(run["cpu_seconds"])])
    return table(["", "seed", "success before", "after", "mode entropy after, bits", "CPU s"], rows)


def runs_by_name(file: str) -> dict[str, list[dict[str, Any]]]:
    """The rows of a results file, one for each seed, by their name."""
    named: dict[str, list[dict[str, Any]]] = {}
    for row in load(file)["rows"]:
        named.setdefault(row["name"], []).append(row)
    return named


def mixed() -> str:
    rows = []
    for name, runs in runs_by_name("mixed-four-ways").items():
        cells = [spread([run[key][1] for run in runs], places) for key, places in
                 (("success", 2), ("bits", 2), ("held_out_loss", 4))]  # fmt: skip
        rows.append([name.replace("lambda", "λ ="), *cells])
    return table(["", "success", "mode entropy, bits (at most 2)", "loss on held-out demonstrations"], rows)


def execution(name: str = "execution") -> str:
    """``examples/11_execution.py``."""
    found = load(name)["rows"]
    rows = []
    for act_steps, how in dict.fromkeys((row["act_steps"], row["execution"]) for row in found):
        runs = [row for row in found if (row["act_steps"], row["execution"]) == (act_steps, how)]
        cells = [spread([run[key] for run in runs], places) for key, places in
                 (("bits", 2), ("jump_border", 4), ("jump_within", 4))]  # fmt: skip
        rows.append([how, str(act_steps), spread([run["success"]["value"] for run in runs], 3), *cells])
    return table(
        ["", "actions of each chunk", "success", "mode entropy, bits (at most 2)", "jump at borders", "within"], rows
    )


def sentences() -> str:
    """``examples/14_sentences.py``."""
    rows = [
        [f"{row['wordings']} {'of training' if row['split'] == 'train' else 'never seen'}", str(row["seed"]),
         interval(row["success"], 3), interval(row["as_asked"], 3), str(row["train_cpu_seconds"])]
        for row in load("sentences")["rows"]
    ]  # fmt: skip
    return table(["wordings", "seed", "success", "by the way asked for", "training, CPU s"], rows)


def offline_q() -> str:
    """``examples/15_offline_q.py``."""
    rows = [
        [row["choice"], str(row["seed"]), interval(row["rewarded_way"], 3), interval(row["success"], 3)]
        for row in load("offline-q")["rows"]
    ]
    return table(["", "seed", "success by the rewarded way", "success by any"], rows)


def pusht_delay() -> str:
    """``genkit rollout --delay 4`` of an anchored policy of PushT."""
    rows = [
        [row["execution"], *(interval(row[key], 3) for key in ("best_reward", "coverage", "success"))]
        for row in load("pusht-delay")["rows"]
    ]
    return table(["", "best reward", "largest coverage", "success"], rows)


def rollouts() -> str:
    """``genkit bench rollouts``: medians of three rounds."""
    data = load("rollouts")["rows"]
    medians = [statistics.median(row["steps_per_second"]) for row in data]
    first = {row["env"]: median for row, median in zip(data, medians, strict=True) if not row["workers"]}
    rows = [
        [row["env"], f"{row['workers']} of their own" if row["workers"] else "that of the policy", f"{median:,.0f}",
         f"{median / first[row['env']]:.2f}"]
        for row, median in zip(data, medians, strict=True)
    ]  # fmt: skip
    return table(["", "processes", "steps a second", "times the first"], rows)


def policy_export() -> str:
    """The ``policy.json`` of ``genkit export``."""
    rows = [
        [row["task"], f"`{row['format']}`", f"{row['cpu_ms']:.2f}", f"{row['policy_cpu_ms']:.2f}",
         f"{row['largest_difference']:.0e}"]
        for row in load("policy-export")["rows"]
    ]  # fmt: skip
    return table(["policy", "format", "a chunk, ms", "in genkit, ms", "largest difference"], rows)


def pusht_pixels() -> str:
    """``configs/pusht_pixels.yaml``, with and without its random crops."""
    rows = [
        [row["images"], str(row["seed"]), *(interval(row[key], 3) for key in ("best_reward", "coverage", "success")),
         f"{row['train_cpu_seconds'] / 60:.1f}"]
        for row in load("pusht-pixels")["rows"]
    ]  # fmt: skip
    return table(["images", "seed", "best reward", "largest coverage", "success", "training, CPU minutes"], rows)


def rwr() -> str:
    rows = [
        [row["name"], change(row["success"], 3), change(row["bits"], 2), change(row["held_out_loss"], 4)]
        for row in load("rwr-four-ways")["rows"]
    ]
    return table(["", "success", "mode entropy, bits (at most 2)", "loss on held-out demonstrations"], rows)


def reward_methods() -> str:
    rows = []
    for name, runs in runs_by_name("reward-methods").items():
        after = [spread([run[key][1] for run in runs], places) for key, places in (("success", 3), ("bits", 2))]
        rows.append([f"`{name}`", *after, *(spread([run[key] for run in runs], 0) for key in ("kl", "cpu_seconds"))])
    return table(["", "success", "mode entropy, bits (at most 2)", "KL, nats a trajectory", "CPU s"], rows)


def q_function() -> str:
    labels = {"plain": "the policy", "best8": "best of 8", "q0.2": "Q guidance 0.2", "q0.2best8": "both"}
    found = load("q-four-ways")["seeds"]
    rows = []
    for key, label in labels.items():
        columns = list(zip(*[run[key] for run in found], strict=True))
        texts = [
            ", ".join(number(v, places) for v in column) for column, places in zip(columns, (3, 2, 1), strict=True)
        ]
        rows.append([label, *texts])
    return table(["one number per seed", "success", "mode entropy, bits (at most 2)", "CPU s for 400 episodes"], rows)


def mujoco() -> str:
    """A row for each seed, and their spread: the expert, the policy before and after, and CPU seconds."""
    rows = []
    for name, env in (("halfcheetah", "HalfCheetah-v5"), ("hopper", "Hopper-v5")):
        runs = load(name)["seeds"]
        for run in runs:
            returns = [number(run["expert"]["mean"], 0), *[interval(run[key], 0) for key in ("before", "after")]]
            spent = [run["expert"]["cpu_seconds"], run["train_cpu_seconds"], run["finetune_cpu_seconds"]]
            rows.append([env, str(run["seed"]), *returns, " + ".join(map(str, spent))])
        experts = spread([run["expert"]["mean"] for run in runs], 0)
        rows.append([env, "all", experts, mean_of(runs, "before", 0), mean_of(runs, "after", 0), ""])
    header = ["", "seed", "return of the expert", "of the policy", "after", "CPU s: search, imitation, reward"]
    return table(header, rows)


def ddpo() -> str:
    rows = []
    for run in load("ddpo-digits")["seeds"]:
        cells = [
            change(run["reward"], 2),
            number(run["rise_in_deviations"], 1),
            number(run["kl_reference_last_walks"], 1),
        ]
        cells += [change(run["precision"], 2), change(run["frechet_nearest_class"], 1), number(run["cpu_seconds"], 0)]
        rows.append([str(run["seed"]), *cells])
    header = ["seed", 'log p("8")', "in standard deviations", "KL, nats", "precision", "Fréchet to the nearest class"]
    return table([*header, "CPU s"], rows)


# -------------------------------------------------------------------------------------------------- exactness and speed
def order() -> str:
    """Equal on all six paths; the linear path's numbers are shown."""
    results = load("order")
    rows = []
    for name, orders in results["order"].items():
        errors = results["error"][name]["linear"]
        rows.append([f"`{name}`", number(orders["linear"], 2), *[f"{error:.1e}" for error in errors]])
    return table(["sampler", "measured order", *[f"error, {steps} steps" for steps in results["steps"]]], rows)


SPEED = {  # the ratio in the file -> what the page calls it
    "(a) as shipped": "as shipped",
    "(b) same network, heads of 64, fp32": "same network, fp32, heads of 64",
    "(b) same network, heads of 8, fp32": "same network, fp32, heads of 8",
    "(b) same network, heads of 64, bf16": "same network, bf16, heads of 64",
}


def percent(ratio: float) -> str:
    text = f"{100 * (ratio - 1):+.1f} %"
    return text.replace("-0.0", "0.0")


def speed() -> str:
    rows = []
    for file, size, wanted in (("bench-speed-2.2M", "2.2M", list(SPEED)[:1]), ("bench-speed", "2.7M", list(SPEED))):
        for key in wanted:
            ratio = load(file)["ratios"][key]
            numbers = [f"{ratio['speedup']:.2f}x", percent(ratio["params"]), percent(ratio["flops"])]
            rows.append([f"[{SPEED[key]}, {size} parameters]({file}.json)", *numbers])
    return table(["", "speed-up", "parameters", "FLOPs"], rows)


def time_to_quality() -> str:
    rows = []
    for run in load("bench-speed")["quality"]:
        cells = [number(run["theirs_seconds"], 0), number(run["ours_seconds"], 0), f"{run['ratio']:.2f}x"]
        rows.append([run["row"].partition(") ")[2], *cells])
    return table(["", "diffusers, CPU s", "genkit, CPU s", "ratio"], rows)


def overhead() -> str:
    rows = [
        [name, number(run["genkit_us"], 1), number(run["diffusers_us"], 1), f"{run['ratio']:.1f}x"]
        for name, run in load("overhead")["overhead"].items()
    ]
    return table(["sampler", "genkit, µs per step", "diffusers, µs per step", "ratio"], rows)


def plan_networks() -> str:
    rows = [
        [name, f"{c['params'] / 1e6:.0f}M", f"{c['flops'] / 1e9:,.0f}", f"{c['activation_bytes'] / 1e6:,.0f}"]
        for name, c in load("plan")["networks"].items()
    ]
    return table(["network", "parameters", "GFLOP of a sample", "MB of activations in fp32"], rows)


def plan_steps() -> str:
    def fits(row: dict) -> str:
        return f"{row['total_memory'] / 1e9:.0f}" + ("" if row["total_memory"] < 80e9 else " (too much)")

    head = ["network", "GPUs", "batch", "`--parallel`", "GB a GPU", "of it activations", "GB sent in the node",
            "GB across nodes", "ms a step", "hours for 400,000 steps"]  # fmt: skip
    rows = []
    for r in load("plan")["rows"]:
        low, high = r["seconds"]
        hours = [s * 400_000 / 3600 for s in (low, high)]
        rows.append([
            r["network"], str(r["gpus"]), f"{r['batch']:,}", r["parallel"], fits(r),
            f"{r['memory']['activations'] / 1e9:.0f}", f"{r['in_node_bytes'] / 1e9:.1f}",
            f"{r['across_bytes'] / 1e9:.2f}", f"{1e3 * low:.0f} to {1e3 * high:.0f}",
            f"{hours[0]:.0f} to {hours[1]:.0f}",
        ])  # fmt: skip
    return table(head, rows)


def scale_data() -> str:
    """``genkit bench scale``: the parts folder, decode, memory and ranks."""
    parts = load("scale")
    (folder,), (small, large) = parts["folder"], parts["memory"]
    growth = f"latents of {small['latents_MB'] / 1e3:.1f} and {large['latents_MB'] / 1e3:.1f} GB"
    rows = [
        ["first batch of a folder of 200,000 files, CPU s", f"{folder['first_batch_s']:.2f}", "at most 3"],
        *([f"JPEGs of 500x375 a second and core, to {r['size']}x{r['size']}", f"{r['images_per_s']:.0f}", ""]
          for r in parts["decode"]),
        [f"memory of each of two ranks, without what they share: {growth}, MB",
         f"{small['own_MB']:.0f} and {large['own_MB']:.0f}", "the same"],
        *([f"`genkit {r['what']}` on two ranks, {'identical' if r['identical'] else 'NOT identical'}",
           f"{r['ratio']:.2f} times as fast", "1.7 times"] for r in parts["ranks"]),
    ]  # fmt: skip
    return table(["what", "measured", "aim"], rows)


def scale_steps() -> str:
    """``genkit bench scale --only steps``."""
    found = {(r["data"], r["objective"]): r for r in load("scale")["steps"]}
    names = [objective for data, objective in found if data == "plane"]
    rows = [
        [f"`{name}`", *(f"{found[where, name][key]:.2f}" for where in ("plane", "pictures")
                        for key in ("passes_ms", "overhead_ms"))]
        for name in names
    ]  # fmt: skip
    return table(["objective", "plane: passes, ms", "the rest", "pictures: passes, ms", "the rest"], rows)


def gpu_steps() -> str:
    """``genkit bench gpu``, the part step: DiT-B/2."""
    rows = [
        [row["kind"], str(row["batch"]), f"{row['step_ms']:.0f}", f"{row['samples_per_s']:,.0f}",
         f"{100 * row['mfu']:.0f} %", f"{row['peak_GB']:.1f}"]
        for row in load("gpu")["parts"]["step"]["rows"][1:]
    ]  # fmt: skip
    return table(["a step of training", "batch", "ms", "samples a second", "MFU", "peak memory, GB"], rows)


def gpu_precisions() -> str:
    """``genkit bench gpu``, the part precision: DiT-XL/2."""
    rows = [
        [f"`{row['precision']}`{', compiled' if row['compiled'] else ''}", f"{row['step_ms']:.0f}",
         f"{row['images_per_s_of_250_steps']:.2f}", f"{row['mean_difference']:.4f}", f"{row['largest_difference']:.4f}"]
        for row in load("gpu")["parts"]["precision"]["rows"]
    ]  # fmt: skip
    return table(["", "ms a step of 64 samples", "samples a second, 250 steps", "mean absolute shift", "largest"], rows)


def gpu_rest() -> str:
    """``genkit bench gpu``, the other parts."""
    parts = load("gpu")["parts"]
    cells = [cell for row in parts["table"]["rows"] for key, cell in row.items() if key != "objective"]
    resume = next(row["value"] for row in parts["digits"]["rows"] if "resume" in row["what"])
    guidance = {row["guidance"]: row["times"] for row in parts["guidance"]["rows"]}
    layouts = {(r["channels_last"], r["cudnn_benchmark"]): r["step_ms"] for r in parts["layouts"]["rows"][:4]}
    busy = next(row["share"] for row in parts["launches"]["rows"] if row["what"] == "device busy")
    waits = ", ".join(f"{row['what']} {row['waits']}" for row in parts["waits"]["rows"])
    save = ", ".join(f"{row['what']} {row['s']:.1f} s" for row in parts["save"]["rows"])
    rows = [
        ["every objective with MLP, U-Net and DiT: two steps and samples", f"{cells.count('ok')} of {len(cells)} run"],
        ["weights after a resume half-way, largest difference", f"{resume:g}"],
        ["waits of the host, by `torch.cuda.set_sync_debug_mode`", waits],
        ["share of a step in which the device is busy (DiT-B/2, batch 256)", f"{100 * busy:.0f} %"],
        ["classifier-free guidance: cost in one pass of twice the batch, in two passes, on half of the levels",
         f"{guidance['together']:.2f}, {guidance['apart']:.2f}, {guidance['on half of the levels']:.2f} times"],
        ["a U-Net of 128 channels at 32x32, batch 128: NCHW, channels_last, ms",
         f"{layouts[False, False]:.0f}, {layouts[True, False]:.0f}"],
        ["the same with `cudnn.benchmark`", f"{layouts[False, True]:.0f}, {layouts[True, True]:.0f}"],
        [f"a checkpoint of DiT-XL/2 with AdamW and an average, {parts['save']['rows'][0]['GB']:.1f} GB", save],
    ]  # fmt: skip
    return table(["what", "measured"], rows)


def structure() -> str:
    """``tools/measure.py``: rooms, contracts, hops, lengths."""
    return table(["measure", "value"], [[name, str(value)] for name, value in load("structure")["measures"].items()])


def training_chain() -> str:
    """The functions from the command line to the loss."""
    return ", ".join(f"`{name}`" for name in load("structure")["chains"]["train to the loss"])


# ----------------------------------------------------------------------------------------------------------- README
def summary() -> str:
    """The rows of README.md."""
    flows = [load(f"digits-flow-seed{seed}") for seed in range(3)]
    accuracy = spread([run["accuracy"] for run in flows], 3)
    distance = spread([run["samples"]["frechet"] for run in flows], 2)
    real = number(flows[0]["real_train"]["frechet"], 2)
    fashion, cifar10 = (load(name)["metrics"]["fid"] for name in ("fashion-flow", "cifar10-test-against-train"))
    toys = spread(load("toy")["cells"]["OT-CFM N->moons"]["w2"], 3)
    push = [row for row in load("pusht")["rows"] if row["policy"] == "anchored"]
    before, after = ([run[key]["value"] for run in load("hopper")["seeds"]] for key in ("before", "after"))
    heun = number(load("order")["order"]["heun"]["linear"], 2)
    ratio = load("bench-speed")["ratios"]["(a) as shipped"]["speedup"]
    step = next(row for row in load("gpu")["parts"]["step"]["rows"] if row["kind"] == "compiled")
    step_text = f"{step['samples_per_s']:,.0f} images a second, {100 * step['mfu']:.0f} % of peak"
    digits_text = f"accuracy {accuracy}, Fréchet distance {distance} (real {real})"
    rewarded = [r["success_after"]["value"] for r in load("finetune-anchored")["rows"] if r["task"] == "PushT"]
    push_text = f"success {mean_of(push, 'success', 2)}, by reward {spread(rewarded, 2)}"
    rows = [
        ("images", "digits, default run, 129 s on a CPU", digits_text),
        ("images", "Fashion-MNIST, flow, 44 CPU minutes", f"FID {interval(fashion, 1)} of 5,000 samples"),
        ("images", "CIFAR-10, test set against training set", f"FID {interval(cifar10, 2)} (literature: about 3.15)"),
        ("toys", "N → moons, OT coupling", f"W2 {toys} (published {TOYS['N->moons'][1][1]})"),
        ("policies", "PushT, anchored policy, one step", push_text),
        ("policies", "Hopper-v5, fine-tuned by reward", f"return {spread(after, 0)} from {spread(before, 0)}"),
        ("speed", "measured order of Heun's method", f"{heun} on six paths"),
        ("speed", "training step against diffusers, one CPU core", f"{ratio:.2f}x, as shipped"),
        ("../scaling", "training DiT-B/2 on 32x32 latents, one H100, compiled", step_text),
    ]  # fmt: skip
    return table(
        ["", "measured"],
        [[f"[{what}]({os.path.normpath(f'docs/results/{page}.md')})", value] for page, what, value in rows],
        "---",
    )


# -------------------------------------------------------------------------------------------------------- reliability
def kills() -> str:
    """What the kill campaign counted."""
    run = load("kill")
    rows = [
        ["kills (SIGKILL)", run["kills"]],
        ["stops (SIGTERM)", sum(n for place, n in run["places"].items() if place.startswith("SIGTERM"))],
        ["simulated power cuts", sum(run["power_cuts"].values())],
        ["chains", run["chains"]],
        ["chains whose tensors are all bit-identical", run["weights_equal"]],
        ["chains whose log is the same", run["logs_equal"]],
        ["lost runs", run["lost_runs"]],
    ]
    return table(["", "number"], [[name, str(n)] for name, n in rows])


def kill_places() -> str:
    """Where the signals struck."""
    return table(["the process was", "times"], [[name, str(n)] for name, n in load("kill")["places"].items()])


def kill_workloads() -> str:
    """Kills by workload."""
    return table(["workload", "kills"], [[name, str(n)] for name, n in load("kill")["workloads"].items()])


def fuzz() -> str:
    """How generated configurations and commands ended."""
    run = load("fuzz")
    rows = [
        [what, outcome, str(n)]
        for what in ("configurations", "commands")
        for outcome, n in sorted(run[what]["counts"].items())
    ]
    return table(["generated", "outcome", "number"], rows)


TABLES: Mapping[str, Callable[[], str]] = {
    "kills": kills,
    "fuzz": fuzz,
    "kill-workloads": kill_workloads,
    "kill-places": kill_places,
    "digits": digits,
    "quality": quality,
    "fid": fid,
    "lora": lora,
    "gan-modes": gan_modes,
    "toy": toy,
    "toy-energy": toy_energy,
    "prediction": prediction,
    "dit-blocks": dit_blocks,
    "recordings": recordings,
    "reflow": reflow,
    "race": partial(race, "race-fashion"),
    "race-shares": partial(race_shares, "race-fashion"),
    "race-cifar10": partial(race, "race-cifar10"),
    "race-cifar10-shares": partial(race_shares, "race-cifar10"),
    "few-step-plane": few_step_plane,
    "few-step-policy": few_step_policy,
    "few-step-guided": partial(few_step_guided, "guided"),
    "few-step-guided-fashion": partial(few_step_guided, "guided-fashion"),
    "few-step-digits-10000": few_step_many,
    "guidance": guidance,
    "few-step-digits": partial(few_step_images, "digits", 2),
    "few-step-fashion": partial(few_step_images, "fashion", 1, (*FEW, "20")),
    "pusht": pusht,
    "pusht-mirror": pusht_mirror,
    "pusht-pixels": pusht_pixels,
    "sentences": sentences,
    "pusht-delay": pusht_delay,
    "policy-export": policy_export,
    "offline-q": offline_q,
    "rollouts": rollouts,
    "optimizers": optimizers,
    "pusht-finetune": pusht_finetune,
    "finetune-four-ways": finetune_four_ways,
    "finetune-anchored": finetune_anchored,
    "dpo-four-ways": partial(finetune_anchored, "dpo-four-ways"),
    "mixed": mixed,
    "rwr": rwr,
    "reward-methods": reward_methods,
    "execution": execution,
    "execution-anchored": partial(execution, "execution-anchored"),
    "q-function": q_function,
    "mujoco": mujoco,
    "ddpo": ddpo,
    "order": order,
    "speed": speed,
    "time-to-quality": time_to_quality,
    "overhead": overhead,
    "plan-networks": plan_networks,
    "plan-steps": plan_steps,
    "scale-data": scale_data,
    "scale-steps": scale_steps,
    "gpu-steps": gpu_steps,
    "gpu-precisions": gpu_precisions,
    "gpu-rest": gpu_rest,
    "structure": structure,
    "summary": summary,
}


def likelihood_error(path: str) -> str:
    """Mean error of the log-likelihood on the closed-form mixture, in nats."""
    return f"{load('order')['likelihood_error_nats'][path]:.1e}"


VALUES: Mapping[str, Callable[[], str]] = {
    "likelihood-linear": partial(likelihood_error, "linear"),
    "likelihood-vp": partial(likelihood_error, "vp"),
    "likelihood-ve": partial(likelihood_error, "ve"),
    "training-chain": training_chain,
}
