"""The model card of a run on the hub (Mitchell et al. 2019), written from its configuration, log and evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from genkit.core.durations import format_duration
from genkit.core.markdown import markdown_table
from genkit.evaluation.cards import Card, describe_settings, to_number, to_text
from genkit.evaluation.report.records import read_log
from genkit.evaluation.run_records import RunRecord

SETTINGS = ("batch", "lr", "ema", "seed", "precision", "codec", "init")  # of training, which the card names
TEXT_KINDS = ("text", "tokens")  # of conditions, in state.json


def write_model_card(run: RunRecord, repo: str, weights: str, picture: bool = False) -> str:
    """The text of README.md for the model ``repo`` with the exported ``weights``; ``picture``: there is samples.png."""
    head = yaml.safe_dump(metadata(run, repo), sort_keys=False, allow_unicode=True)
    sections = [f"# {repo.partition('/')[2]}", introduce(run, weights)]
    if picture:
        sections.append("![samples](samples.png)")
    sections += [
        "## Use",
        f"```bash\npip install 'genkit-torch[hub]'\ngenkit sample hf://{repo} --n 16\n```",
        f"```python\nimport genkit\n\nrun = genkit.load('hf://{repo}')\nrun.sample(16)\n```",
        "## Training",
        markdown_table(("setting", "value"), [(f"`{k}`", v) for k, v in training_facts(run).items()]),
        "Every setting is in `config.yaml`.",
        "## Evaluation",
        evaluation(run.cards),
    ]
    return f"---\n{head}---\n\n" + "\n\n".join(sections) + "\n"


def metadata(run: RunRecord, repo: str) -> dict[str, Any]:
    """The block that the hub reads: library, tags, and results that may be ranked."""
    head: dict[str, Any] = {"library_name": "genkit", "tags": ["genkit", *run.objective.split(" + "), run.backbone]}
    task = hub_task(run.checkpoint_state.get("spec"))
    if task:
        head["pipeline_tag"] = task
    rankable = [card for card in run.cards if not card.is_trained_on]
    results = [result for card in rankable for result in hub_results(card, run.data, task)]
    if task and results:
        head["model-index"] = [{"name": repo.partition("/")[2], "results": results}]
    return head


def hub_task(spec: object) -> str | None:
    """What the hub calls the task of a model of images ``spec``, as ``state.json`` has it; None for other data."""
    if not isinstance(spec, Mapping) or len(spec.get("shape", ())) != 3:
        return None
    kinds = [str(kind.get("kind")).lower() for kind in spec.get("cond", {}).values() if isinstance(kind, Mapping)]
    return "text-to-image" if any(kind in TEXT_KINDS for kind in kinds) else "unconditional-image-generation"


def hub_results(card: Card, data: str, task: str | None) -> list[dict[str, Any]]:
    """A card's metrics as the hub's ``model-index`` has them."""
    dataset = {"type": data, "name": data}
    return [
        {"task": {"type": task}, "dataset": dataset, "metrics": [{"type": k, "name": card.title(k), "value": v.value}]}
        for k, v in card.metrics.items()
    ]


def introduce(run: RunRecord, weights: str) -> str:
    """What the model is, in two sentences."""
    count = sum(run.parameters.values())
    size = f" with {count / 1e6:.2f} million parameters" if count else ""
    return (
        f"`{run.objective}` with the backbone `{run.backbone}`{size}, trained on `{run.data}` with "
        f"[genkit](https://github.com/genkit-torch/genkit). The weights are {weights} of the run `{run.name}`."
    )


def training_facts(run: RunRecord) -> dict[str, str]:
    """Objective, backbone, data, steps and the settings that results depend on most."""
    facts = {"objective": run.objective, "backbone": run.backbone, "data": run.data, "steps": f"{run.step}"}
    facts |= {name: to_text(run.config[name]) for name in SETTINGS if run.config.get(name) not in (None, "", [])}
    log = read_log(run.path / "log.jsonl")
    if samples := to_number(log.last.get("samples")):
        facts["samples seen"] = f"{samples:.0f}"
    if log.seconds:
        facts["time"] = format_duration(log.seconds)
    for name in ("gpu", "device", "torch", "genkit"):
        if value := run.environment.get(name):
            facts[name] = to_text(value)
    return facts


def evaluation(cards: Sequence[Card]) -> str:
    """The metrics of all cards, with their intervals and settings."""
    if not cards:
        return "This run has not been evaluated (`genkit eval`)."
    rows = []
    for card in cards:
        note = (
            "; the model was trained on these features, so that the value ranks nothing" if card.is_trained_on else ""
        )
        settings = describe_settings(card.settings) + note
        rows += [(card.title(name), str(estimate), settings) for name, estimate in card.metrics.items()]
    return (
        markdown_table(("metric", "value", "measured"), rows)
        + "\n\nThe files in `eval` have every setting of the numbers."
    )
