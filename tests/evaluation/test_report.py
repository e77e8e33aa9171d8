"""`genkit report`: the page shows what is in the run's files, and needs no other file."""

import json
import math
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from genkit.cli import main as cli
from genkit.core.files import write_text
from genkit.evaluation.report import plots
from genkit.evaluation.report.html import format_number
from genkit.evaluation.report.page import render_run
from genkit.evaluation.report.records import Point, read_log
from genkit.evaluation.report.samples import TRAINING_GRIDS
from tests.support.pages import Page, check_page

CARD = {
    "metrics": {
        "fid": {"value": 12.345678, "low": 11.25, "high": 13.5},
        "accuracy": {"value": 0.98765, "low": 0.975, "high": None},
    },
    "settings": {"step": 200, "sampler": "heun", "steps": 10, "nfe": 19, "n": 1000, "features": {"name": "classifier"}},
}


def lines(n, **more):
    return [{"step": 10 * i, "samples": 80 * i, "seconds": 0.5 * i, "lr": 1e-3, "samples_per_s": 160.0, "skipped": 0,
             "denoise/loss": 1 / i, "denoise/grad_norm": 2.0, **more} for i in range(1, n + 1)]  # fmt: skip


def write_log(run, records):
    (run / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def picture(path, level=128, size=(12, 8)):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.full((size[1], size[0]), level, np.uint8)).save(path)


@pytest.fixture
def run(tmp_path):
    """The files of a run, as training writes them, without a log."""
    run = tmp_path / "0007-digits-flow-unet"
    run.mkdir()
    (run / "config.yaml").write_text(
        "objective: {name: flow}\nbackbone: {name: unet}\ndata: {name: digits}\nsteps: 200\n"
    )
    (run / "env.json").write_text(
        json.dumps({"genkit": "0.1.0", "packages": {"torch": "2.9"}, "argv": ["genkit", "x"]})
    )
    for step in (100, 200):
        picture(run / "samples" / f"step-{step:07d}.png", step)
    (run / "eval").mkdir()
    (run / "eval" / "0000200-heun10.json").write_text(json.dumps(CARD))
    return run


@pytest.fixture
def run_with_log(run):
    write_log(run, lines(20))
    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A real run of a few steps."""
    out = tmp_path_factory.mktemp("report") / "runs"
    flags = ["--tensorboard=false", "--device=cpu", "--steps=4", "--batch=8", "--sample-every=2", "--log-every=1"]
    small = ["--objective=flow", "--data=digits", "--backbone.width=8", "--warmup=0"]
    assert cli.main(["train", *small, *flags, f"--out={out}"]) == 0
    return out / "latest"


def test_lines_of_validation_and_evaluation_hide_nothing_of_training(run):
    """They are written last, and say nothing of the samples seen or of the steps that were skipped."""
    trained = lines(20, skipped=3)
    write_log(run, trained)
    bare = read_log(run / "log.jsonl").last
    write_log(run, [*trained, {"step": 200, "val/loss": 0.5}, {"step": 200, "eval/fd": 2.0}])
    assert read_log(run / "log.jsonl").last == {**bare, "val/loss": 0.5, "eval/fd": 2.0}
    assert bare["skipped"] == 3


# --------------------------------------------------------------------------------------------------- whole pages
def test_a_real_run(trained, tmp_path, capsys):
    out = tmp_path / "deep" / "page.html"
    assert cli.main(["report", str(trained), f"--out={out}"]) == 0
    assert capsys.readouterr().out.split() == [str(out)]
    page = check_page(out.read_text())
    first = json.loads((trained / "log.jsonl").read_text().splitlines()[0])
    last = json.loads((trained / "log.jsonl").read_text().splitlines()[-1])
    assert "4 of 4" in page.text
    assert f"last denoise/loss {format_number(last['denoise/loss'])}" in page.text
    assert [i["alt"] for i in page.all("img")] == ["Grid of samples: step 2", "Grid of samples: step 4"]
    loss = next(s["aria-label"] for s in page.all("svg") if s["aria-label"].startswith("loss"))
    ends = format_number(first["denoise/loss"]), format_number(last["denoise/loss"])
    assert "denoise/loss from {} at step 1 to {} at step 4".format(*ends) in loss
    assert "width: 8" in page.text
    assert json.loads((trained / "env.json").read_text())["packages"]["torch"] in page.text
    assert not list(out.parent.glob(".*"))


def test_the_page_is_in_the_run_by_default(run, capsys):
    assert cli.main(["report", str(run)]) == 0
    assert check_page((run / "report.html").read_text())


def test_the_same_files_give_the_same_page(run_with_log):
    """Except for the prefixes of ids in plots."""
    pages = [re.sub(r"\bf\d+-", "f-", render_run(run_with_log)) for _ in range(2)]
    assert pages[0] == pages[1]


def test_mistakes(run, capsys):
    for argv, message in (
        ([str(run / "none")], "does not exist"),
        ([str(run), "--out=page.png"], "ends in .html"),
        ([str(run), f"--out={run}"], "ends in .html"),
        ([str(run), "--open=maybe"], "should be 'no' or 'yes'"),
    ):
        assert cli.main(["report", *argv]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1


# ------------------------------------------------------------------------------------------------------- cards
def test_numbers_of_the_cards(run):
    page = check_page(render_run(run))
    assert [(a["value"], text) for a, text in zip(page.all("data"), page.values, strict=True)] == [
        ("12.345678", "12.35"),
        ("0.98765", "0.9877"),
    ]
    assert "[11.25, 13.50]" in page.text
    assert "[0.9750, –]" in page.text
    assert "fd (classifier) ↓" in page.text
    assert "accuracy ↑" in page.text
    assert "features.name classifier" in page.text
    assert not [s for s in page.all("svg") if "evaluations" in s["aria-label"]]  # one card: nothing to plot against


def test_quality_against_evaluations(run):
    """One curve per sampler; settings that differ are columns, the others are listed once."""
    for sampler, nfe, fid in (("heun", 39, 3.25), ("ddim", 5, 50.5), ("ddim", 50, 4.75)):
        settings = CARD["settings"] | {"sampler": sampler, "nfe": nfe}
        card = {"metrics": {"fid": {"value": fid}}, "settings": settings}
        (run / "eval" / f"{sampler}-{nfe}.json").write_text(json.dumps(card))
    page = check_page(render_run(run))
    label = next(s["aria-label"] for s in page.all("svg") if s["aria-label"].startswith("fd (classifier) against"))
    assert "sampler ddim: 50.50 at 5, 4.750 at 50; sampler heun: 12.35 at 19, 3.250 at 39" in label
    heads = [t for t in page.texts if t in ("sampler", "nfe", "n", "steps", "step")]
    assert heads.count("sampler") == 1
    assert "sampler steps" not in page.text
    rows = [t for t in page.texts if t in ("ddim-5", "ddim-50", "heun-39", "0000200-heun10")]
    assert rows == ["ddim-5", "0000200-heun10", "heun-39", "ddim-50"]  # in order of cost


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2", "is not JSON"),
        ("[1, 2]", "has no metrics"),
        ('{"fid": 3}', "has no metrics"),
        ('{"metrics": {"fid": 3}, "settings": {}}', "has no number for fid"),
        ('{"metrics": {"fid": {"value": NaN}}}', "has no number for fid"),
        ('{"metrics": {"fid": {"value": "low"}}}', "has no number for fid"),
        ("[" * 100_000, "is not JSON"),
        ("\x00\xff", "is not JSON"),
    ],
)
def test_a_file_that_is_no_card_is_skipped_with_a_note(run, text, message):
    (run / "eval" / "strange.json").write_text(text, encoding="latin-1")
    page = check_page(render_run(run))
    assert f"strange.json: {message}" in page.text
    assert "12.35" in page.text


def test_a_card_without_settings(run):
    (run / "eval" / "0000200-heun10.json").write_text('{"metrics": {"fid": {"value": 1.5}}}')
    page = check_page(render_run(run))
    assert page.values == ["1.500"]


# -------------------------------------------------------------------------------------------------- other runs
def test_a_run_with_nothing_but_its_configuration(tmp_path):
    (tmp_path / "config.yaml").write_text("objective: flow\n")
    page = check_page(render_run(tmp_path))
    assert "The log has no lines yet." in page.text
    assert "env.json is missing" in page.text
    assert "Quality" not in page.text
    assert "Samples" not in page.text


def test_a_classifier_has_no_samples(run):
    """Its accuracy is in the log, under a name that the page does not know."""
    shutil.rmtree(run / "samples")
    write_log(run, lines(20, **{"classify/accuracy": 0.5, "classify/loss": 0.25}))
    page = check_page(render_run(run))
    assert not page.all("img")
    assert "Samples" not in page.text
    labels = [s["aria-label"] for s in page.all("svg")]
    assert any(v.startswith("accuracy against the step: classify/accuracy from 0.5000") for v in labels)
    assert sum("classify/loss" in v and "denoise/loss" in v for v in labels) == 1  # all losses in one figure


def test_many_grids_are_thinned_and_damaged_ones_left_out(run):
    for step in range(1, 41):
        picture(run / "samples" / f"step-{step:07d}.png", step)
    last = run / "samples" / "step-0000200.png"
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])  # cut off
    page = check_page(render_run(run))
    names = [f["data-name"] for f in page.all("figure") if "data-name" in f]
    assert len(names) == TRAINING_GRIDS - 1  # the last one is damaged
    assert names[0] == "step 1"
    assert "12 of 42 grids" in page.text
    assert "step-0000200.png: is damaged, or not a PNG" in page.text


def test_samples_of_genkit_sample(run):
    picture(run / "samples" / "sample-step200-heun10-seed3-n4.png")
    (run / "samples" / "sample-step200-heun10-seed3-n4.png.json").write_text(
        '{"sampler": "heun", "nfe": 19, "seed": 3}'
    )
    page = check_page(render_run(run))
    assert "sample-step200-heun10-seed3-n4 · sampler heun · nfe 19 · seed 3" in page.text


def test_content_of_files_is_escaped(run, tmp_path):
    """In texts, attributes and plots; names of directories and metrics are users' texts too."""
    bad = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>$x^2 &amp; \\1 \\g<0>"
    run = run.rename(tmp_path / '<b>bold<b> & "q"')
    write_log(run, lines(5, **{f"{bad}/loss": 1.0, "denoise/$\\frac{": 2.0}))
    (run / "config.yaml").write_text(f"objective: {{name: {json.dumps(bad)}}}\n")
    (run / "env.json").write_text(json.dumps({bad: bad, "argv": [bad]}))
    card = {"metrics": {bad: {"value": 1.5}, "fid": {"value": 2.5}}, "settings": {bad: {bad: bad}, "sampler": bad}}
    for nfe in (5, 10):
        (run / "eval" / f"{nfe}.json").write_text(json.dumps(card | {"settings": {**card["settings"], "nfe": nfe}}))
    (run / "eval" / "not a <card>.json").write_text("{}")
    picture(run / "samples" / 'a"><script>.png')
    (run / "samples" / 'a"><script>.png.json').write_text(json.dumps({"sampler": bad}))
    page = check_page(render_run(run))
    assert '<b>bold<b> & "q"' in page.texts
    assert page.text.count("alert(1)") > 6
    assert all(i["src"].startswith("data:") for i in page.all("img"))
    assert any(bad in a.get("aria-label", "") for _, a in page.tags)


# --------------------------------------------------------------------------------------------------------- logs
def test_a_short_log_is_read_exactly(run_with_log):
    log = read_log(run_with_log / "log.jsonl")
    assert (log.num_lines, log.lines_per_point, log.damaged, log.seconds) == (20, 1, False, 10.0)
    assert log.curves["denoise/loss"] == [Point(10 * i, 1 / i, 1 / i, 1 / i) for i in range(1, 21)]


def test_a_thinned_log_keeps_mean_and_range(run):
    """A point summarises a few lines; a spike in one line stays visible."""
    records = lines(1000)
    records[500]["denoise/loss"] = 77.0
    write_log(run, records)
    log = read_log(run / "log.jsonl", points=300)
    points = log.curves["denoise/loss"]
    assert log.lines_per_point == 4
    assert len(points) == 250
    for k, p in enumerate(points):
        v = [r["denoise/loss"] for r in records[4 * k : 4 * k + 4]]
        assert p == (10 * (4 * k + 4), pytest.approx(sum(v) / 4), min(v), max(v))
    assert max(p.high for p in points) == 77.0
    assert "1000 lines, 2 per point" in check_page(render_run(run)).text


@pytest.mark.parametrize("end", ['{"step": 210, "denoise/lo', '{"step": 210, "denoise/loss": 3}, {', "\x00\x00", "]"])
def test_a_cut_off_last_line(run_with_log, end):
    with open(run_with_log / "log.jsonl", "a") as f:
        f.write(end)
    log = read_log(run_with_log / "log.jsonl")
    assert log.damaged
    assert (log.num_lines, log.last["step"]) == (20, 200)


def test_a_cut_off_line_of_a_thinned_log(run):
    write_log(run, lines(1003))
    with open(run / "log.jsonl", "a") as f:
        f.write('{"step": 1')
    log = read_log(run / "log.jsonl", points=100)
    assert (log.num_lines, log.damaged, log.last["step"]) == (1003, True, 10030)
    assert log.curves["lr"][-1].step == 10030
    assert "one line cannot be read" in check_page(render_run(run)).text


def test_numbers_that_are_not_finite(run):
    """The log has null for them, other programs write NaN; both are left out of the curve, with a note."""
    records = lines(20)
    records[3]["denoise/loss"], records[4]["denoise/loss"], records[5]["denoise/loss"] = None, math.nan, math.inf
    write_log(run, records)
    log = read_log(run / "log.jsonl")
    assert len(log.curves["denoise/loss"]) == 17
    assert "denoise/loss: 3 not finite" in check_page(render_run(run)).text


def test_a_negative_loss_and_a_single_line(run):
    """A loss can be negative: no logarithmic scale then."""
    write_log(run, [lines(1)[0] | {"denoise/loss": -3.0}])
    check_page(render_run(run))
    write_log(run, [])
    assert "no lines yet" in render_run(run)


def test_seconds_over_sessions(run):
    """The clock of the log restarts at 0 whenever training is resumed."""
    records = lines(20)
    for r in records[12:]:
        r["seconds"] -= 6.0
    write_log(run, records)
    assert read_log(run / "log.jsonl").seconds == pytest.approx(6.0 + 4.0)


@pytest.mark.slow
def test_a_million_lines(run):
    """They need no more memory than few lines, and make a page of the same size."""
    import tracemalloc

    line = json.dumps(lines(7)[6]) + "\n"
    with open(run / "log.jsonl", "w") as f:
        f.writelines(line.replace('"step": 70', f'"step": {i}') for i in range(100_000))
    tracemalloc.start()
    read_log(run / "log.jsonl")
    assert tracemalloc.get_traced_memory()[1] < 8e6  # the file has 16 MB, its objects 100 MB
    tracemalloc.stop()
    with open(run / "log.jsonl", "w") as f:
        f.writelines(line.replace('"step": 70', f'"step": {i}') for i in range(1_000_000))
    html = render_run(run)
    assert len(html) < 200_000
    assert "1000000 lines, 2000 per point" in html


# ------------------------------------------------------------------------------------------------------- numbers
@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (12.345678, "12.35"), (3.0, "3"), (1234.5, "1234"), (0.00123456, "0.001235"), (123456.0, "1.235e+05"),
     (9.87e-6, "9.870e-06"), (-0.5, "-0.5000"), (99999.6, "100000"), (None, "–")],
)  # fmt: skip
def test_number(value, text):
    assert format_number(value) == text


# ------------------------------------------------------------------------------------------------------- browser
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium installed")
def test_in_a_browser(run, tmp_path):
    """The script runs: one grid is shown, the slider is at the newest; the page's policy blocks nothing."""
    path = write_text(tmp_path / "page.html", render_run(run))
    flags = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}/profile",
        "--enable-logging=stderr",
    ]
    done = subprocess.run(
        [BROWSER, *flags, "--virtual-time-budget=2000", "--window-size=400,800", "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=90, env={**os.environ, "HOME": str(tmp_path)},
    )  # fmt: skip
    page = Page(done.stdout)
    assert [f["class"] for f in page.all("figure") if "data-name" in f] == ["frame", "frame on"]
    slider = page.all("input")[0]
    assert (slider["max"], slider["aria-valuetext"]) == ("1", "step 200")
    assert not re.search(r"CONSOLE.*(Error|Refused|violates)", done.stderr), done.stderr


@pytest.mark.parametrize("curves", [3, 9])
def test_a_legend_of_many_curves_leaves_the_axes_free(curves):
    axes = Figure(layout="constrained").add_subplot()
    for i in range(curves):
        axes.plot([1, 2], [i, i], label=str(i))
    plots.draw_legend(axes)
    below = curves > plots.CROWDED
    assert (axes.get_legend() is None, len(axes.figure.legends)) == (below, below)
