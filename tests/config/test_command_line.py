"""The grammar of the command line: spellings, switches, positional arguments and help."""

import dataclasses

import pytest

from genkit.cli.commands.sample import Sample
from genkit.cli.main import COMMANDS
from genkit.config import ConfigError, parse
from genkit.config.command import negate, to_flag
from genkit.config.help_text import read_field_docs
from tests.support.commands import flag_parsers
from tests.support.toy_config import Arc, Draw, Job, Pulse, parse_job, refusal


def test_dashes_and_underscores_spaces_and_equals_signs_are_equivalent():
    spellings = ["--wave.t-std=2", "--wave.t_std=2", "--wave.t-std 2", "--wave.t_std 2"]
    assert {parse_job(*flags.split()).wave.t_std for flags in spellings} == {2.0}


def test_every_kind_of_value():
    assert parse_job("--lr", "1e-4", "--wave.low", "-3").wave.low == -3
    assert parse_job("--micro-batch=7").micro_batch == 7
    assert parse_job("--micro-batch=None").micro_batch is None
    assert parse_job("--name", "None").name is None
    assert (parse_job("--micro-batch=null").micro_batch, parse_job("--name=null").name) == (None, None)  # as in YAML
    assert parse_job("--betas", ".5", ".6", "--ema", "0.9", "0.99", "0.999").betas == (0.5, 0.6)
    assert (parse_job("--ema", "0.9", "0.99").ema, parse_job("--ema").ema) == ((0.9, 0.99), ())
    assert (parse_job("--size=8").size, parse_job("--size", "8", "9").size) == (8, (8, 9))
    assert parse_job("--channels=3").channels == 3
    assert parse_job("--wave.mirror-x").wave.mirror_x


# --------------------------------------------------------------------------------------------------- switches
@pytest.mark.parametrize(
    ("flag", "flip"),
    [
        ("--flip", True),
        ("--no-flip", False),
        ("--flip=true", True),
        ("--flip=False", False),
        ("--wave.mirror_x=true", False),
    ],
)
def test_switches(flag, flip):
    assert parse_job(flag).flip is flip
    assert parse_job("--no-tensorboard").tensorboard is False
    assert parse_job("--tensorboard=false").tensorboard is False
    assert parse_job("--wave.mirror-x=true", "--wave.no-mirror-x").wave.mirror_x is False


def test_a_switch_overrides_the_file(write_config):
    write_config("{flip: true, wave: {mirror_x: true}}")
    cfg = parse_job("--config=c.yaml", "--no-flip", "--wave.mirror-x=false")
    assert (cfg.flip, cfg.wave.mirror_x) == (False, False)


@pytest.mark.parametrize(
    "argv",
    [["--flip", "true"], ["--flip", "False", "--steps=3"], ["--steps=3", "--flip", "1"], ["--flip", "yes", "no"]],
)
def test_a_switch_takes_no_value_after_a_space(argv):
    assert refusal(*argv) == "--flip takes no value; give it alone, or --flip=false to switch it off"


@pytest.mark.parametrize("argv", [["--wave.no-mirror-x", "true"], ["--wave.no_mirror_x=false"]])
def test_a_negated_switch_takes_no_value_at_all(argv):
    expected = "--wave.no-mirror-x takes no value; give it alone, or --wave.mirror-x to switch it on"
    assert refusal(*argv) == expected


def test_a_switch_before_a_positional_argument_leaves_it_alone():
    assert parse(Draw, ["--clip", "R"]) == Draw("R", clip=True)
    assert parse(Draw, ["--clip", "--", "true"]) == Draw("true", clip=True)
    expected = "--clip takes no value; give it alone, or --clip=false to switch it off"
    assert refusal("--clip", "true", "R", cls=Draw) == expected
    assert refusal("R", "--clip", "true", cls=Draw) == expected
    assert refusal("R", "--clip", "S", cls=Draw) == expected


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "bench"])
def test_every_switch_of_every_command_refuses_a_value_after_a_space(command):
    for parser in flag_parsers(command):
        for path in parser.switches:
            flag, negated = to_flag(path), to_flag(negate(path))
            with pytest.raises(ConfigError) as e:
                parser.normalize([flag, "true"])
            assert str(e.value) == f"{flag} takes no value; give it alone, or {flag}=false to switch it off"
            with pytest.raises(ConfigError) as e:
                parser.normalize([negated, "true"])
            assert str(e.value) == f"{negated} takes no value; give it alone, or {flag} to switch it on"


# --------------------------------------------------------------------------------------- positional arguments
def test_positional_arguments():
    for argv in (["R", "--n", "5"], ["--n=5", "R"], ["--n", "5", "--", "R"]):
        assert parse(Draw, argv) == Draw("R", 5)
    assert refusal(cls=Draw) == "run: is missing and has no default"
    assert refusal("R", "S", cls=Draw) == "unexpected argument 'S'; see genkit job --help"
    assert parse(Sample, ["runs/latest", "--n=4"]) == Sample("runs/latest", 4)


# ------------------------------------------------------------------------------------------------------- help
def test_help_lists_the_chosen_classes_only(capsys):
    def text(*argv: str) -> str:
        with pytest.raises(SystemExit) as e:
            parse(Job, [*argv, "--help"], "genkit job", "Do a job.")
        assert e.value.code == 0
        return " ".join(capsys.readouterr().out.replace("│", " ").split())

    wave, pulse = text(), text("--wave=short-pulse")
    assert "usage: genkit job" in wave
    assert "Do a job." in wave
    assert "--wave {wave,short_pulse} What moves. (default: wave)" in wave
    assert "--wave.path {line,arc}" in wave
    assert "--wave.t-std FLOAT" in wave
    assert "A wave. And more." in wave
    assert "--config FILE" in wave
    assert "--wave.width" not in wave
    assert "--wave.path.radius" not in wave
    assert "--wave.t-std" not in pulse
    assert "--wave.width INT in steps (default: 3)" in pulse
    assert "--wave.path.radius FLOAT in metres. Above 0. (default: 7.0)" in pulse
    assert "--wave.path.radius FLOAT in metres. Above 0. (default: 1.0)" in text("--wave.path=arc")


def test_help_shows_a_positional_argument(capsys):
    with pytest.raises(SystemExit):
        parse(Draw, ["-h"], "genkit draw")
    assert "usage: genkit draw [-h] RUN [--config FILE]" in capsys.readouterr().out


def test_help_is_the_text_under_or_after_a_field():
    assert read_field_docs(Pulse) == {"width": ("in steps", ""), "path": ("", "")}
    assert read_field_docs(Arc) == {"radius": ("in metres", ""), "points": ("", "")}
    assert read_field_docs(dataclasses.make_dataclass("Typed", ["x"])) == {}
