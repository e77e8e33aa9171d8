"""Which value wins: defaults, then the file, then names, then flags; and what follows from a sibling's class."""

import subprocess
import sys

import pytest

from genkit.config import ConfigError, from_dict, override
from genkit.training.settings import TrainSettings
from tests.support.toy_config import Arc, Deep, Flat, Job, Jobs, Line, parse_job


@pytest.mark.parametrize(
    ("text", "argv", "t_std", "times"),
    [
        ("{}", [], 1.0, "uniform"),
        ("wave: {t_std: 2, times: logit-normal}", [], 2.0, "logit-normal"),
        ("wave: {name: wave, t_std: 2, times: logit-normal}", [], 2.0, "logit-normal"),
        ("wave: {t_std: 2, times: logit-normal}", ["--wave=wave"], 1.0, "uniform"),  # a name resets its block
        ("wave: {t_std: 2, times: logit-normal}", ["--wave.t-std=4"], 4.0, "logit-normal"),
        ("wave: {t_std: 2, times: logit-normal}", ["--wave.t-std=4", "--wave", "wave"], 4.0, "uniform"),
        ("wave: short_pulse", ["--wave=wave", "--wave.t-std", "4"], 4.0, "uniform"),
        ("{}", ["--wave", "short-pulse", "--wave=arc", "--wave=wave"], 1.0, "uniform"),
        ("{}", ["--wave.t-std=3", "--wave.t_std=4"], 4.0, "uniform"),  # the last of two equal flags wins
    ],
)
def test_defaults_then_file_then_names_then_flags(write_config, text, argv, t_std, times):
    write_config(text)
    wave = parse_job("--config", "c.yaml", *argv).wave
    assert (wave.t_std, wave.times) == (t_std, times)
    assert parse_job(*argv, "--config=c.yaml").wave == wave


@pytest.mark.parametrize(
    ("text", "argv", "path"),
    [
        ("wave: {path: arc}", [], Arc()),
        ("wave: {path: {name: arc, radius: 3}}", [], Arc(3.0)),
        ("wave: {path: {name: arc, radius: 3}}", ["--wave.path.points", "5"], Arc(3.0, (5,))),
        ("wave: {path: {name: arc, radius: 3}}", ["--wave.path=arc"], Arc()),
        ("wave: {path: {name: arc, radius: 3}}", ["--wave.path=arc", "--wave.path.radius=2"], Arc(2.0)),
        ("wave: {path: {name: arc, radius: 3}}", ["--wave=wave"], Line()),
        ("{}", ["--wave.path.radius=2", "--wave.path", "arc", "--wave", "wave"], Arc(2.0)),  # in any order
        ("wave: short_pulse", [], Arc(7.0)),  # the default of the enclosing class
        ("wave: {name: short_pulse, path: {points: [3]}}", [], Arc(7.0, (3,))),  # no name: the default, changed
        ("{}", ["--wave=short_pulse", "--wave.path.points=3"], Arc(7.0, (3,))),
        ("{}", ["--wave=short-pulse", "--wave.path=arc"], Arc()),
        ("wave: short_pulse", ["--wave.path.radius=2", "--wave.width=5"], Arc(2.0)),
        ("wave: {low: 3}", ["--wave.t-std=4", "--wave.path=arc"], Arc()),  # only the final values must be consistent
    ],
)
def test_tables_nest(write_config, text, argv, path):
    write_config(text)
    assert parse_job("--config", "c.yaml", *argv).wave.path == path


@pytest.mark.parametrize(
    ("text", "argv", "net"),
    [
        ("{}", [], Flat()),  # the default for points
        ("data: {name: folder, root: x}", [], Deep()),
        ("data: {name: folder, root: x}", ["--data=points"], Flat()),
        ("data: {name: folder, root: x}", ["--net.depth=3"], Deep(3)),
        ("net: {depth: 3}", [], Flat(3)),
        ("net: {attention: false}", ["--data=."], Deep(attention=False)),
        ("net: deep", [], Deep()),
        ("{}", ["--net=deep", "--net.no-attention"], Deep(attention=False)),
    ],
)
def test_without_a_name_the_network_follows_the_data(write_config, text, argv, net):
    write_config(text)
    assert parse_job("--config", "c.yaml", *argv).net == net


def test_a_block_without_a_name_changes_only_what_it_mentions():
    assert from_dict(Jobs, {"first": {"steps": 3}}) == Jobs(Job(steps=3, net=Deep()))
    assert from_dict(Jobs, {"first": "job"}) == Jobs(Job(net=Flat()))


def test_keywords_change_settings_as_a_file_does():
    cfg = override(TrainSettings(lr=0.5), steps=5, backbone="mlp", objective={"name": "ddpm", "cond_dropout": 0.3})
    assert (cfg.lr, cfg.steps, type(cfg.backbone).__name__, cfg.objective.cond_dropout) == (0.5, 5, "MLP", 0.3)
    assert override(cfg, objective=cfg.objective).objective == cfg.objective
    assert from_dict(TrainSettings, {"objective": cfg.objective}).objective == cfg.objective
    for wrong in ({"stepz": 3}, {"steps": 0}, {"objective": cfg}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            override(cfg, **wrong)


def test_importing_the_configuration_does_not_import_torch():
    code = "import sys, genkit.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
