"""`genkit report` of every family of runs and of several at once: what a page shows is what the files say."""

import json

import numpy as np
import pytest
from PIL import Image

from genkit.cli import main as cli
from genkit.evaluation.report.curves import join_bounds
from genkit.evaluation.report.html import format_number
from genkit.evaluation.report.page import render_run, write_report
from genkit.evaluation.report.records import read_log
from genkit.evaluation.run_records import read_run
from genkit.training.annotations import annotate
from tests.support.evaluation import refusal, train
from tests.support.pages import check_page

FINETUNE = [
    "--num-envs=4",
    "--num-steps=3",
    "--iterations=3",
    "--eval-episodes=6",
    "--method.warmup=0",
    "--no-tensorboard",
]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A policy with two rollouts, one of them filmed."""
    out = tmp_path_factory.mktemp("policy") / "runs"
    run = train(out, "--data=four-ways", "--data.n=20", "--backbone.width=16", "--steps=4")
    assert cli.main(["rollout", str(run), "--episodes=6", "--film=1"]) == 0
    assert cli.main(["rollout", str(run), "--episodes=6", "--steps=1"]) == 0
    return run


@pytest.fixture(scope="module")
def tuned(policy):
    assert (
        cli.main(["finetune", str(policy), *FINETUNE, "--no-tensorboard", f"--out={policy.parent}", "--name=tuned"])
        == 0
    )
    return (policy.parent / "latest").resolve()


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A run whose sampler was swept, with held-out losses."""
    out = tmp_path_factory.mktemp("swept") / "runs"
    flags = ["--data=moons", "--data.n=200", "--backbone.width=16", "--steps=6", "--val-every=2", "--log-every=1"]
    run = train(out, *flags, "--name=swept")
    sweep = ["--sampler", "ddim", "heun", "--steps", "2", "4", "--n=30", "--confirm-n=60", "--num-confirm-extra=4"]
    assert cli.main(["sweep", str(run), *sweep, "--metric=mmd"]) == 0
    return run


def label(page, start):
    """The description of the plot that begins with ``start``."""
    return next(s["aria-label"] for s in page.all("svg") if s["aria-label"].startswith(start))


def records(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


# -------------------------------------------------------------------------------------------------------- policies
def test_rollouts_of_a_policy(policy):
    page = check_page(render_run(policy))
    for file in (policy / "rollouts").glob("*.json"):
        summary = json.loads(file.read_text())
        shown = {value["value"] for value in page.all("data")}
        assert {repr(float(summary[k]["value"])) for k in ("success", "return", "mode_entropy_bits")} <= shown
        assert file.stem in page.text
        assert f"[{format_number(summary['success']['low'])}, {format_number(summary['success']['high'])}]" in page.text
    alts = [image["alt"] for image in page.all("img")]
    assert sum("paths of" in alt for alt in alts) == 2
    assert sum("actions of" in alt for alt in alts) == 2
    assert sum("Frames of an episode" in alt for alt in alts) == 1
    film = next(image for image in page.all("img") if image["alt"].startswith("Film"))
    assert film["src"].startswith("data:image/gif")


def test_a_film_is_shown_as_frames_and_only_moves_when_it_is_asked_for(policy):
    html = render_run(policy)
    closed = html.count(
        "</details>", html.rindex("<details>", 0, html.index("data:image/gif")), html.index("image/gif")
    )
    assert closed == 0, "the moving picture is inside the part that has to be opened"
    gif = next((policy / "rollouts").glob("*.gif"))
    with Image.open(gif) as film:
        assert f"6 of {film.n_frames} frames" in html


def test_marks_compare_rollouts_of_the_same_episodes_only(policy, tmp_path):
    from genkit.evaluation.report.rollouts import mark_best

    def summary(success, half, **settings):
        low, high = success - half, success + half
        return {
            "episodes": 50,
            "success": {"value": success, "low": low, "high": high},
            "settings": {"env": "x", **settings},
        }

    rows = [summary(0.5, 0.1, seed=0, steps=1), summary(0.9, 0.05, seed=0, steps=4), summary(0.99, 0.01, seed=7)]
    assert mark_best(rows, ["success"])["success"] == ["", "best", ""]
    rows[0] = summary(0.85, 0.1, seed=0, steps=1)
    assert mark_best(rows, ["success"])["success"] == ["tied", "best, tied", ""]


def test_damaged_rollouts_are_left_out(policy, tmp_path):
    import shutil

    run = tmp_path / "copy"
    shutil.copytree(policy, run)
    folder = run / "rollouts"
    next(folder.glob("*.gif")).write_bytes(b"GIF89a")
    next(folder.glob("*-paths.png")).write_bytes(b"no")
    for i, text in enumerate(
        ["", "[]", '{"episodes": 3}', '{"episodes": 3, "success": {"value": "x"}, "settings": 4}']
    ):
        (folder / f"bad{i}.json").write_text(text)
    page = check_page(render_run(run))
    assert "is damaged" in page.text
    assert "bad2" in page.text
    assert "bad0" not in page.text


# ----------------------------------------------------------------------------------------------------- fine-tuning
def test_fine_tuning_curves_and_results(tuned):
    page = check_page(render_run(tuned))
    log = [record for record in records(tuned) if "reward" in record]
    for key, title in (("reward", "reward"), ("kl_reference", "KL divergence"), ("mode_entropy_bits", "diversity")):
        first, last = format_number(log[0][key]), format_number(log[-1][key])
        assert f"{key} from {first} at iteration 1 to {last} at iteration 3" in label(page, title)
    assert "against KL divergence from the pretrained model" in label(page, "success against")
    shown = {value["value"] for value in page.all("data")}
    for name in ("before", "after"):
        results = json.loads((tuned / f"{name}.json").read_text())
        assert repr(float(results["success"]["value"])) in shown
        assert name in page.texts
    assert "3 of 3" in page.text
    training = [s["aria-label"] for s in page.all("svg") if "against the step" in s["aria-label"]]
    assert not training, "steps of fine-tuning are iterations"


# ------------------------------------------------------------------------------------------------- Pareto, best row
def test_pareto_front_and_best_values(swept):
    page = check_page(render_run(swept))
    cards = [card for card in read_run(swept).cards if card.settings["n"] == 60]
    best = min(cards, key=lambda card: card.metrics["mmd"].value)
    description = label(page, "mmd against the number of network evaluations")
    front = description.partition("Pareto front: ")[2].split(", ")
    assert front[-1] == f"{format_number(best.metrics['mmd'].value)} at {best.nfe:g}"
    cheapest = min(card.nfe for card in cards)
    assert front[0].endswith(f" at {cheapest:g}")
    values = [float(text.split()[0]) for text in front]
    assert values == sorted(values, reverse=True), "each point of the front is better than the cheaper ones"
    assert label(page, "mmd against CPU milliseconds per sample")
    html = render_run(swept)
    marked = html.split('<strong class="best">')[1:]
    assert f'value="{best.metrics["mmd"].value!r}"' in marked[0]
    assert sum(text.startswith("best") for text in page.texts) >= 1
    assert "30 samples against" in page.text.partition("Settings of all these cards")[2], "the screening is folded"


def test_held_out_losses_are_in_the_plot_of_the_loss(swept):
    page = check_page(render_run(swept))
    held_out = [(r["step"], r["val/loss"]) for r in records(swept) if "val/loss" in r]
    assert len(held_out) == 3
    step, value = min(held_out, key=lambda pair: pair[1])
    assert f"lowest val/loss: {format_number(value)} at step {step}" in label(page, "loss against")
    assert f"lowest val/loss {format_number(value)} at step {step}" in page.text


def test_evaluations_while_training_are_one_curve_with_their_interval(tmp_path):
    flags = ["--data=moons", "--data.n=100", "--backbone.width=8", "--steps=4", "--log-every=1"]
    run = train(tmp_path, *flags, "--eval-every=2", "--eval-n=40", "--eval-metrics=mmd", "--eval-steps=2")
    page = check_page(render_run(run))
    plots = [s["aria-label"] for s in page.all("svg") if "eval/mmd" in s["aria-label"]]
    assert len(plots) == 1
    assert "eval/mmd_low" not in page.text
    curve = join_bounds(read_log(run / "log.jsonl").curves)["eval/mmd"]
    logged = [record for record in records(run) if "eval/mmd" in record]
    assert [tuple(p) for p in curve] == [
        (r["step"], r["eval/mmd"], r["eval/mmd_low"], r["eval/mmd_high"]) for r in logged
    ]


# ---------------------------------------------------------------------------------------------- notes, navigation
def test_notes_and_tags_are_shown_as_text(swept):
    annotate(swept, "<b>bold</b> & more", tags=["a&amp;b"])
    page = check_page(render_run(swept))
    assert "<b>bold</b> & more" in page.text
    assert "a&amp;b" in page.texts


def test_every_section_is_in_the_table_of_contents(swept):
    html = render_run(swept)
    page = check_page(html)
    headings = [attrs["id"] for attrs in page.all("h2")]
    links = [attrs["href"][1:] for attrs in page.all("a")]
    assert links == ["content", *headings]
    assert page.all("nav")[0]["aria-label"]
    labelled = [attrs.get("aria-labelledby") for attrs in page.all("section")]
    assert labelled == [None, *headings]


# --------------------------------------------------------------------------------------------------- several runs
def test_two_runs_side_by_side(policy, tuned):
    path = write_report(policy, tuned)
    assert path == policy.parent / f"report-{policy.name}-{tuned.name}.html"
    page = check_page(path.read_text())
    assert f"{policy.name} and {tuned.name}" in page.texts
    assert page.texts.count("finished") == 2
    assert "finetune (" in page.text
    loss = label(page, "loss against")
    assert f"{policy.name}: denoise/loss" in loss
    assert f"{tuned.name}: reward" in label(page, "reward: reward against")
    for file in (policy / "rollouts").glob("*.json"):
        assert file.stem in page.text


def test_marks_across_runs_need_equal_measurements(swept, tmp_path):
    other = train(tmp_path, "--data=moons", "--data.n=200", "--backbone.width=16", "--steps=2", "--name=other")
    for n in (60, 50):
        assert cli.main(["eval", str(other), f"--n={n}", "--metrics=mmd", "--steps=2"]) == 0
    html = write_report(swept, other, out=tmp_path / "both.html").read_text()
    page = check_page(html)
    table = html[html.index("60 samples") : html.index("50 samples")]
    values = [
        card.metrics["mmd"].value for run in (swept, other) for card in read_run(run).cards if card.settings["n"] == 60
    ]
    assert f'<strong class="best"><data value="{min(values)!r}"' in table
    assert "other" in page.text


def test_directories_of_runs_and_of_cards(policy, tuned, swept, tmp_path):
    page = check_page(write_report(policy.parent, out=tmp_path / "all.html").read_text())
    assert "2 runs" in page.texts or f"{policy.name} and {tuned.name}" in page.texts
    folder = swept / "eval"
    page = check_page(write_report(folder, out=tmp_path / "cards.html").read_text())
    shown = {value["value"] for value in page.all("data")}
    for file in folder.glob("*.json"):
        assert repr(json.loads(file.read_text())["metrics"]["mmd"]["value"]) in shown
        assert file.stem in page.text
    card = next(folder.glob("*.json"))
    assert write_report(card) == card.with_suffix(".html")


def test_latest_is_a_run(policy, tuned, tmp_path):
    assert tuned.name in write_report(policy.parent / "latest", out=tmp_path / "page.html").read_text()


def test_mistakes(policy, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "neither runs nor cards" in refusal(capsys, "report", tmp_path / "empty")
    assert "does not exist" in refusal(capsys, "report", policy, tmp_path / "none")
    (tmp_path / "x.json").write_text("{}")
    assert "is not a card" in refusal(capsys, "report", tmp_path / "x.json")
    (tmp_path / "config.yaml").write_text("a: [")
    assert "not valid YAML" in refusal(capsys, "report", tmp_path)


@pytest.mark.parametrize("objective", ["ddpm", "vae", "gan"])
def test_other_families(objective, tmp_path):
    flags = ["--data=digits", "--backbone=mlp", "--backbone.width=8", "--steps=2", "--sample-every=2", "--log-every=1"]
    run = train(tmp_path, f"--objective={objective}", *flags)
    page = check_page(write_report(run).read_text())
    last = records(run)[-1]
    for key, value in last.items():
        if key.endswith("/loss"):
            assert f"last {key} {format_number(value)}" in page.text
    assert next(i["alt"] for i in page.all("img")) == "Grid of samples: step 2"
    assert np.isfinite([v for v in last.values() if v is not None]).all()
