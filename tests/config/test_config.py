"""Configuration: precedence, round trips, and one clear line for every mistake."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import pytest
import yaml
from annotated_types import Ge, Gt, Lt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tyro.conf import Positional

from genkit.cli.commands.sample import Sample
from genkit.config import ConfigError, dump, from_dict, load_yaml, override, parse, table, to_yaml
from genkit.config.blocks import fields, load
from genkit.config.command import field_docs
from genkit.training.settings import TrainSettings

if TYPE_CHECKING:
    from genkit.core import Path as Curve  # not there when the annotations are evaluated

HERE = __name__  # registries of this module stand in for genkit's own


class Shape: ...


@dataclass(frozen=True)
class Line: ...


@dataclass(frozen=True)
class Arc:
    """A part of a circle."""

    radius: Annotated[float, Gt(0)] = 1.0
    """in metres"""
    points: tuple[int, ...] = (1, 2)


@dataclass(frozen=True)
class Wave:
    """A wave. And more."""

    path: Curve = field(default_factory=Line, metadata={"table": f"{HERE}:PATHS"})
    times: Literal["uniform", "logit-normal"] = "uniform"
    t_std: Annotated[float, Gt(0)] = 1.0
    low: float = 0.0
    mirror_x: bool = False

    def __post_init__(self) -> None:
        if self.low > self.t_std:
            raise ValueError(f"low: given {self.low};\nallowed up to t_std = {self.t_std}")


@dataclass(frozen=True)
class Pulse:
    width: int = 3  # in steps
    path: Any = field(default_factory=lambda: Arc(radius=7.0), metadata={"table": f"{HERE}:PATHS"})


@dataclass(frozen=True)
class Flat(Shape):
    depth: int = 2


@dataclass(frozen=True)
class Deep(Shape):
    depth: int = 5
    attention: bool = True


@dataclass(frozen=True)
class Points:
    suits: ClassVar[str] = "flat"
    step: int = 10


@dataclass(frozen=True)
class Folder:
    root: str
    suits: ClassVar[str] = "deep"


class NotADataclass: ...


PATHS = {"line": Line, "arc": Arc}
WAVES = {"wave": Wave, "short_pulse": Pulse}
NETS = {"flat": Flat, "deep": Deep}
DATA = {"points": Points, "folder": Folder}


def source(path: str) -> tuple[str, dict]:
    if path.endswith("empty"):
        raise ValueError(f"{path} holds no samples")
    return "folder", {"root": path}


@dataclass(frozen=True)
class Job:
    """All kinds of settings."""

    wave: Any = table(f"{HERE}:WAVES", "wave")
    """What moves."""
    net: Any = table(f"{HERE}:NETS", "deep", follows="data.suits", kind=f"{HERE}:Shape")
    data: Any = table(f"{HERE}:DATA", "points", fallback=f"{HERE}:source")
    steps: Annotated[int, Ge(1)] = 100
    lr: Annotated[float, Gt(0)] = 1e-3
    micro: Annotated[int, Ge(1)] | None = None
    betas: tuple[Annotated[float, Ge(0), Lt(1)], float] = (0.9, 0.99)
    ema: tuple[float, ...] = (0.999,)
    size: int | tuple[int, int] | None = None
    channels: Literal[1, 3] | None = None
    flip: bool = False
    tensorboard: bool = True
    out: str = "runs"
    name: str | None = None


@dataclass(frozen=True)
class Draw:
    run: Positional[str]
    n: int = 3
    mix: tuple[float, float] = (0.5, 0.5)


@dataclass(frozen=True)
class Jobs:
    first: Any = field(default_factory=lambda: Job(net=Deep()), metadata={"table": f"{HERE}:JOBS"})


JOBS = {"job": Job}


def job(*argv: str) -> Job:
    return parse(Job, argv, "genkit job")


def mistake(*argv: str, cls: type = Job) -> str:
    with pytest.raises(ConfigError) as e:
        parse(cls, argv, "genkit job")
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write text to c.yaml in the current directory, an empty one."""
    monkeypatch.chdir(tmp_path)
    return lambda text: Path("c.yaml").write_text(text)


# ------------------------------------------------------------------------------------------------ precedence
@pytest.mark.parametrize(
    ("text", "argv", "t_std", "times"),
    [
        ("{}", [], 1.0, "uniform"),
        ("wave: {t_std: 2, times: logit-normal}", [], 2.0, "logit-normal"),
        ("wave: {name: wave, t_std: 2, times: logit-normal}", [], 2.0, "logit-normal"),
        ("wave: {t_std: 2, times: logit-normal}", ["--wave=wave"], 1.0, "uniform"),  # a NAME resets its block
        ("wave: {t_std: 2, times: logit-normal}", ["--wave.t-std=4"], 4.0, "logit-normal"),
        ("wave: {t_std: 2, times: logit-normal}", ["--wave.t-std=4", "--wave", "wave"], 4.0, "uniform"),
        ("wave: short_pulse", ["--wave=wave", "--wave.t-std", "4"], 4.0, "uniform"),
        ("{}", ["--wave", "short-pulse", "--wave=arc", "--wave=wave"], 1.0, "uniform"),
        ("{}", ["--wave.t-std=3", "--wave.t_std=4"], 4.0, "uniform"),  # the last of two equal flags holds
    ],
)
def test_defaults_then_yaml_then_name_then_flags(write, text, argv, t_std, times):
    write(text)
    wave = job("--config", "c.yaml", *argv).wave
    assert (wave.t_std, wave.times) == (t_std, times)
    assert job(*argv, "--config=c.yaml").wave == wave


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
        ("wave: short_pulse", [], Arc(7.0)),  # the default of the class that holds it
        ("wave: {name: short_pulse, path: {points: [3]}}", [], Arc(7.0, (3,))),  # no name: the default, changed
        ("{}", ["--wave=short_pulse", "--wave.path.points=3"], Arc(7.0, (3,))),
        ("{}", ["--wave=short-pulse", "--wave.path=arc"], Arc()),
        ("wave: short_pulse", ["--wave.path.radius=2", "--wave.width=5"], Arc(2.0)),
        ("wave: {low: 3}", ["--wave.t-std=4", "--wave.path=arc"], Arc()),  # only the whole has to make sense
    ],
)
def test_tables_nest(write, text, argv, path):
    write(text)
    assert job("--config", "c.yaml", *argv).wave.path == path


@pytest.mark.parametrize(
    ("text", "argv", "net"),
    [
        ("{}", [], Flat()),  # because of the points
        ("data: {name: folder, root: x}", [], Deep()),
        ("data: {name: folder, root: x}", ["--data=points"], Flat()),
        ("data: {name: folder, root: x}", ["--net.depth=3"], Deep(3)),
        ("net: {depth: 3}", [], Flat(3)),
        ("net: {attention: false}", ["--data=."], Deep(attention=False)),
        ("net: deep", [], Deep()),
        ("{}", ["--net=deep", "--net.no-attention"], Deep(attention=False)),
    ],
)
def test_without_a_name_the_network_suits_the_data(write, text, argv, net):
    write(text)
    assert job("--config", "c.yaml", *argv).net == net


def test_a_block_without_a_name_keeps_what_it_does_not_mention():
    assert from_dict(Jobs, {"first": {"steps": 3}}) == Jobs(Job(steps=3, net=Deep()))
    assert from_dict(Jobs, {"first": "job"}) == Jobs(Job(net=Flat()))


# -------------------------------------------------------------------------------------------------- spelling
def test_both_spellings_and_every_kind_of_value():
    both = ["--wave.t-std=2", "--wave.t_std=2", "--wave.t-std 2", "--wave.t_std 2"]
    assert {job(*flags.split()).wave.t_std for flags in both} == {2.0}
    assert job("--lr", "1e-4", "--wave.low", "-3").wave.low == -3
    assert (job("--micro-batch=7").micro, job("--micro-batch=None").micro, job("--name", "None").name) == (
        7,
        None,
        None,
    )
    assert job("--betas", ".5", ".6", "--ema", "0.9", "0.99", "0.999").betas == (0.5, 0.6)
    assert (job("--ema", "0.9", "0.99").ema, job("--ema").ema) == ((0.9, 0.99), ())
    assert (job("--size=8").size, job("--size", "8", "9").size, job("--channels=3").channels) == (8, (8, 9), 3)
    assert job("--wave.mirror-x").wave.mirror_x


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
    assert job(flag).flip is flip
    assert job("--no-tensorboard").tensorboard is False
    assert job("--tensorboard=false").tensorboard is False
    assert job("--wave.mirror-x=true", "--wave.no-mirror-x").wave.mirror_x is False


def test_a_switch_can_turn_yaml_off(write):
    write("{flip: true, wave: {mirror_x: true}}")
    cfg = job("--config=c.yaml", "--no-flip", "--wave.mirror-x=false")
    assert (cfg.flip, cfg.wave.mirror_x) == (False, False)


def test_positionals():
    for argv in (["R", "--n", "5"], ["--n=5", "R"], ["--n", "5", "--", "R"]):
        assert parse(Draw, argv) == Draw("R", 5)
    assert mistake(cls=Draw) == "run: is missing, and has no default"
    assert mistake("R", "S", cls=Draw) == "unexpected argument 'S'; see genkit job --help"
    assert parse(Sample, ["runs/latest", "--n=4"]) == Sample("runs/latest", 4)


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
    assert "--wave.path.radius FLOAT in metres (default: 7.0)" in pulse
    assert "--wave.path.radius FLOAT in metres (default: 1.0)" in text("--wave.path=arc")


def test_help_of_a_positional(capsys):
    with pytest.raises(SystemExit):
        parse(Draw, ["-h"], "genkit draw")
    assert "usage: genkit draw [-h] RUN [--config FILE]" in capsys.readouterr().out


def test_help_of_fields_stands_under_or_behind_them():
    assert field_docs(Pulse) == {"width": "in steps", "path": ""}
    assert field_docs(Arc) == {"radius": "in metres", "points": ""}
    assert field_docs(dataclasses.make_dataclass("Typed", ["x"])) == {}


# ---------------------------------------------------------------------------------- names from outside, paths
def test_a_class_from_outside():
    cfg = job(f"--wave={HERE}:Arc", "--wave.radius=2")
    assert cfg.wave == Arc(2.0)
    assert dump(cfg)["wave"] == {"name": f"{HERE}:Arc", "radius": 2.0, "points": [1, 2]}
    assert from_dict(Job, dump(cfg)) == cfg
    assert "needs a dataclass, and this is a type" in mistake(f"--wave={HERE}:NotADataclass")
    assert "needs a dataclass, and this is a dict" in mistake(f"--wave={HERE}:DATA")
    assert mistake("--wave=os:path.nothing") == "--wave: given os:path.nothing; the module has no such class"
    assert (
        mistake("--wave=nowhere.x:Y") == "--wave: given nowhere.x:Y; there is no module nowhere; is it on PYTHONPATH?"
    )
    assert mistake(f"--net={HERE}:Arc") == f"--net: given {HERE}:Arc; needs a subclass of {HERE}.Shape"


def test_an_error_inside_an_outside_module_keeps_its_traceback(write, monkeypatch):
    write("")
    Path("broken_outside.py").write_text("import nowhere_at_all\n")
    monkeypatch.syspath_prepend(".")
    with pytest.raises(ModuleNotFoundError, match="nowhere_at_all"):
        job("--wave=broken_outside:Wave")


def test_nothing_else_is_executed(write):
    write("wave: {t_std: !!python/object/apply:os.mkdir [hacked]}")
    assert "not valid YAML: could not determine a constructor" in mistake("--config=c.yaml")
    for text in ("os:mkdir('hacked')", "__import__('os')", "os.mkdir('hacked'):x", "..os:mkdir", ":", "os:", ":os"):
        assert "allowed: wave, short_pulse, package.module:Class" in mistake(f"--wave={text}")
    assert not os.path.exists("hacked")


def test_a_path_is_a_dataset(write):
    write("data: pictures")
    os.mkdir("pictures")
    os.mkdir("empty")
    os.mkdir("points")
    assert job("--config=c.yaml").data == Folder("pictures")
    assert job("--data", "./pictures").data == Folder("./pictures")
    assert job("--data=folder", "--data.root=pictures").data == Folder("pictures")
    assert job("--data=points").data == Points()  # a NAME before a path
    assert mistake("--data=empty") == "--data: empty holds no samples"
    assert mistake("--data=pictues").startswith(
        "--data: given 'pictues'; allowed: points, folder, package.module:Class,"
    )
    assert "a path that exists" in mistake("--data=pictues")
    assert "--wave: given 'pictures'; allowed" in mistake("--wave=pictures")  # only where the table says so


# -------------------------------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("stps: 3", "stps: unknown; allowed here: wave, net, data, steps, lr, micro, betas, ema, size, channels, flip, "
         "tensorboard, out, name; did you mean steps?"),
        ("wave: {tstd: 3}", "wave.tstd: unknown; allowed here: path, times, t_std, low, mirror_x; did you mean t_std?"),
        ("wave: {path: {radius: 3}}", "wave.path.radius: unknown; allowed here: nothing, Line has no settings"),
        ("1: 2", "1: unknown; allowed here"),
        ("wave: wve", "wave: given 'wve'; allowed: wave, short_pulse, package.module:Class; did you mean wave?"),
        ("wave: {name: 3}", "wave: given 3; allowed: wave, short_pulse, package.module:Class"),
        ("wave: [a]", "wave: given ['a']; needs a name or a block like {name: ..., setting: ...}"),
        ("wave: null", "wave: given None; needs a name or a block"),
        ("data: folder", "data.root: is missing, and has no default"),
        ("steps: x", "steps: given 'x'; should be a valid integer"),
        ("steps: 1.5", "steps: given 1.5; should be a valid integer"),
        ("steps: true", "steps: given True; needs an integer"),
        ("lr: yes", "lr: given True; needs a number"),
        ("ema: [0.9, false]", "ema: given [0.9, False]; needs a number or a list"),
        ("steps: 0", "steps: given 0; should be greater than or equal to 1"),
        ("steps: null", "steps: given None; should be a valid integer"),
        ("steps: [1]", "steps: given [1]; should be a valid integer"),
        ("lr: abc", "lr: given 'abc'; should be a valid number"),
        ("lr: .nan", "lr: given nan; should be a finite number"),
        ("lr: .inf", "lr: given inf; should be a finite number"),
        ("micro: x", "micro: given 'x'; should be a valid integer, unable to parse string as an integer (or null)"),
        ("betas: [0.9, 0.9, 0.9]", "betas: given [0.9, 0.9, 0.9]; the list should have at most 2 items"),
        ("betas: [1.5, 0.9]", "betas[0]: given 1.5; should be less than 1"),
        ("flip: perhaps", "flip: given 'perhaps'; should be a valid boolean"),
        ("out: 3", "out: given 3; should be a valid string"),
        ("wave: {times: unifrom}",
         "wave.times: given 'unifrom'; should be 'uniform' or 'logit-normal'; did you mean uniform?"),
        ("wave: {low: 3}", "wave: low: given 3.0; allowed up to t_std = 1.0"),
        ("wave: {name: wave, path: {name: arc, radius: -1}}", "wave.path.radius: given -1; should be greater than 0"),
    ],
)  # fmt: skip
def test_mistakes_in_yaml(write, text, line):
    write(text)
    assert mistake("--config=c.yaml").startswith("c.yaml: " + line)
    with pytest.raises(ConfigError) as e:
        from_dict(Job, yaml.safe_load(text))
    assert str(e.value).startswith(line)


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("--stps 3", "unknown option --stps; did you mean --steps?"),
        ("--wave.t-st=3", "unknown option --wave.t-st; did you mean --wave.t-std?"),
        ("--wave.pth=arc", "unknown option --wave.pth; did you mean --wave.path?"),
        ("--t-std=3", "unknown option --t-std; did you mean --wave.t-std?"),
        ("--wave.zzzzz=3", "unknown option --wave.zzzzz; see --help"),
        ("--wave=short-pulse --wave.t-std=3", "unknown option --wave.t-std; see --help"),
        ("--no-steps", "unknown option --no-steps; did you mean --steps?"),
        ("--wave=wve", "--wave: given 'wve'; allowed: wave, short_pulse, package.module:Class; did you mean wave?"),
        ("--wave.path=ark", "--wave.path: given 'ark'; allowed: line, arc, package.module:Class; did you mean arc?"),
        ("--steps=x", "--steps: given 'x'; should be a valid integer"),
        ("--steps=1.5", "--steps: given '1.5'; should be a valid integer"),
        ("--steps=0", "--steps: given 0; should be greater than or equal to 1"),
        ("--lr=nan", "--lr: given nan; should be a finite number"),
        ("--wave.t-std=-1", "--wave.t-std: given -1.0; should be greater than 0"),
        ("--wave.path=arc --wave.path.radius=x", "--wave.path.radius: given 'x'; should be a valid number"),
        ("--wave.times=unifrom", "--wave.times: given 'unifrom'; should be 'uniform' or 'logit-normal'; did you mean"),
        ("--channels=2", "--channels: given '2'; should be 1 or 3 (or null)"),
        ("--size 1 2 3", "--size: given ['1', '2', '3']; should be a valid integer"),
        ("--ema x", "--ema[0]: given 'x'; should be a valid number"),
        ("--data.steps=3", "unknown option --data.steps; did you mean --data.step?"),
        ("-- --wave=wave", "unexpected argument '--wave=wave'; see genkit job --help"),
        ("--betas .5 x", "--betas[1]: given 'x'; should be a valid number"),
        ("--flip=perhaps", "--flip: given 'perhaps'; should be a valid boolean"),
        ("--wave.low=3", "wave: low: given 3.0; allowed up to t_std = 1.0"),
        ("--steps", "--steps needs 1 value, given 0"),
        ("--steps --flip", "--steps needs 1 value, given 0"),
        ("--betas .5 --flip", "--betas needs 2 values, given 1"),
        ("--wave", "--wave needs 1 value, given 0"),
        ("--wave --flip", "--wave needs 1 value, given 0"),
        ("--config", "--config needs 1 value, given 0"),
        ("steps=3", "unexpected argument 'steps=3'; see genkit job --help"),
        ("-x", "unexpected argument '-x'; see genkit job --help"),
        ("--data=folder", "data.root: is missing, and has no default"),
        ("--config=nowhere.yaml", "nowhere.yaml: cannot be read (No such file or directory)"),
        ("--config=.", ".: cannot be read (Is a directory)"),
    ],
)
def test_mistakes_on_the_command_line(argv, line):
    assert mistake(*argv.split()).startswith(line)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: [1\nb: 2\n", "c.yaml:2: not valid YAML: "),
        ("a: 1\n  b: 2\n", "c.yaml:2: not valid YAML: mapping values are not allowed here"),
        ("steps: 1\nlr: 1\nsteps: 2\n", "c.yaml:3: not valid YAML: steps is given twice"),
        ("wave: {low: 0, low: 1}", "c.yaml:1: not valid YAML: low is given twice"),
        ("{[a]: 1}", "c.yaml:1: not valid YAML: found unhashable key"),
        ("- 1", "c.yaml: given [1]; a configuration is a mapping such as 'steps: 1000'"),
        ("words", "c.yaml: given 'words'; a configuration is a mapping"),
        ("a: 2020-99-99", "c.yaml: not valid YAML: month must be in 1..12"),
        ("\x01", "c.yaml: not valid YAML: "),
        ("[" * 5000, "c.yaml: not valid YAML: "),
    ],
)
def test_files_that_are_no_configuration(write, text, line):
    write(text)
    assert mistake("--config=c.yaml").startswith(line)


def test_a_file_that_is_not_text(write):
    write("")
    Path("c.yaml").write_bytes(b"\xff\xfe\xfa")
    assert mistake("--config=c.yaml").startswith("c.yaml: not valid YAML: 'utf-8' codec can't decode")
    write("# only a comment\n")
    assert load_yaml("c.yaml") == {}
    write("wave: &w {low: 0.5, times: uniform}\nother: {<<: *w, low: 1}")
    assert load_yaml("c.yaml")["other"] == {"low": 1, "times": "uniform"}


def test_a_mistake_is_blamed_on_who_made_it(write):
    write("steps: 3\nwave: {t_std: 2}")
    assert mistake("--config=c.yaml", "--steps=0").startswith("--steps: given 0")
    assert mistake("--config=c.yaml", "--wave.low=9").startswith("wave: low: given 9.0")
    assert mistake("--config=c.yaml", "--wave=wve").startswith("--wave: given 'wve'")
    assert mistake("--config=c.yaml", "--data=folder").startswith("data.root: is missing")
    write("n: 5")
    assert mistake("--config=c.yaml", cls=Draw) == "run: is missing, and has no default"
    write("steps: 0")
    assert mistake("--config=c.yaml", "--lr=1").startswith("c.yaml: steps: given 0")


def test_numbers_may_be_text():
    assert from_dict(Job, {"lr": "1e-4", "steps": "7", "betas": ["1e-1", 0]}) == Job(
        net=Flat(), lr=1e-4, steps=7, betas=(0.1, 0.0)
    )
    assert isinstance(from_dict(Job, {"lr": 1}).lr, float)


# ----------------------------------------------------------------------------------------------- round trips
def same(cfg: Any) -> bool:
    return from_dict(type(cfg), yaml.safe_load(to_yaml(cfg))) == cfg == from_dict(type(cfg), dump(cfg))


REGISTRIES = [
    "genkit.objectives:OBJECTIVES",
    "genkit.backbones:BACKBONES",
    "genkit.data:DATA",
    "genkit.diffusion.paths:PATHS",
]


@pytest.mark.parametrize("registry", REGISTRIES)
def test_every_entry_of_every_registry_makes_the_round_trip(registry):
    where = {"genkit.diffusion.paths:PATHS": "objective.path"}.get(registry, registry.split(":")[1].lower().rstrip("s"))
    assert load(registry)
    for name, cls in load(registry).items():
        assert "name" not in fields(cls), f"{name}: `name` is taken, it names the class in YAML"
        missing = {
            k: "x"
            for k, f in fields(cls).items()
            if f.default is f.default_factory is dataclasses.MISSING  # the root of a folder
        }
        block: dict[str, Any] = {"name": name, **missing}
        for part in reversed(where.split(".")):
            block = {part: block}
        cfg = from_dict(TrainSettings, block)
        value: Any = cfg
        for part in where.split("."):
            value = getattr(value, part)
        assert type(value) is cls
        assert same(cfg)
        flags = [f"--{where}.{k}={v}" for k, v in missing.items()]
        assert parse(TrainSettings, [f"--{where}={name}", *flags]) == cfg or missing


def test_a_configuration_is_plain_yaml():
    cfg = job("--wave.path=arc", "--ema", "0.9", "0.99")
    assert dump(cfg)["ema"] == [0.9, 0.99]
    assert dump(cfg)["wave"]["path"] == {"name": "arc", "radius": 1.0, "points": [1, 2]}
    assert "\nnet: {name: flat, depth: 2}\n" in to_yaml(cfg)  # one line where one is enough
    assert list(dump(cfg)) == list(fields(Job))
    assert to_yaml(Draw("R", 3)) == "run: R\nn: 3\nmix: [0.5, 0.5]\n"


number = st.floats(allow_nan=False, allow_infinity=False)
positive = st.floats(0, exclude_min=True, allow_infinity=False)
arcs = st.builds(Arc, positive, st.lists(st.integers()).map(tuple))
waves = st.builds(
    Wave,
    st.one_of(st.builds(Line), arcs),
    st.sampled_from(["uniform", "logit-normal"]),
    positive,
    st.floats(max_value=0, allow_infinity=False),
    st.booleans(),
)
jobs = st.builds(
    Job,
    wave=st.one_of(waves, st.builds(Pulse, st.integers(), arcs), arcs),
    net=st.one_of(st.builds(Flat, st.integers()), st.builds(Deep, st.integers(), st.booleans())),
    data=st.one_of(st.builds(Points, st.integers()), st.builds(Folder, st.text())),
    steps=st.integers(1),
    lr=positive,
    micro=st.none() | st.integers(1),
    betas=st.tuples(st.floats(0, 1, exclude_max=True), number),
    ema=st.lists(number).map(tuple),
    size=st.none() | st.integers() | st.tuples(st.integers(), st.integers()),
    channels=st.sampled_from([None, 1, 3]),
    flip=st.booleans(),
    out=st.text(),
    name=st.none() | st.text(),
)


@given(jobs)
def test_any_configuration_makes_the_round_trip(cfg):
    assert same(cfg)


# --------------------------------------------------------------------------------------------------- fuzzing
WORDS = ["name", "wave", "arc", "line", "folder", "points", "x", "None", "null", "true", "1e-4", "-1", "0", "", "a:b"]
WORDS += [*fields(Job), *fields(Wave), *fields(Arc), "short-pulse", "no_flip", ".", "--", "=", "wave.path", "__class__"]
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(WORDS) | st.dates()
)
keys = st.sampled_from(WORDS) | scalars
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4), max_leaves=12
)


def sound(make: Callable[[], Any]) -> bool:
    """Whether a configuration comes out and makes the round trip, or a mistake in one line, or help."""
    try:
        return same(make())
    except ConfigError as e:
        return len(str(e).splitlines()) == 1
    except SystemExit as e:
        return e.code == 0


@given(st.dictionaries(keys, trees, max_size=5) | trees)
@settings(max_examples=300, deadline=None)
def test_any_mapping_gives_a_configuration_or_one_line(tree):
    assert sound(lambda: from_dict(Job, tree))


flags = st.builds(
    lambda dashes, path, tail: dashes + path + tail,
    st.sampled_from(["--", "-", ""]),
    st.lists(st.sampled_from([*WORDS, "t-std", "no-flip"]), min_size=1, max_size=3).map(".".join),
    st.sampled_from(["", "="]) | st.sampled_from(WORDS).map("={}".format),
)


@given(st.lists(flags | st.sampled_from(WORDS) | st.text(max_size=4), max_size=6))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_command_line_gives_a_configuration_or_one_line(capsys, argv):
    assert sound(lambda: parse(Job, argv))
    assert sound(lambda: parse(Draw, argv))
    assert not capsys.readouterr().err


@given(st.text(alphabet=st.sampled_from("ab:-[]{}!&*#|>'\"\n\t ,%@`?0.1"), max_size=30))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_file_gives_a_configuration_or_one_line(tmp_path, text):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    assert sound(lambda: from_dict(Job, load_yaml(file)))


def test_keywords_change_settings_as_a_file_does():
    cfg = override(TrainSettings(lr=0.5), steps=5, backbone="mlp", objective={"name": "ddpm", "drop": 0.3})
    assert (cfg.lr, cfg.steps, type(cfg.backbone).__name__, cfg.objective.drop) == (0.5, 5, "MLP", 0.3)
    assert override(cfg, objective=cfg.objective).objective == cfg.objective
    assert from_dict(TrainSettings, {"objective": cfg.objective}).objective == cfg.objective
    for wrong in ({"stepz": 3}, {"steps": 0}, {"objective": cfg}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            override(cfg, **wrong)


def test_importing_the_configuration_does_not_import_torch():
    code = "import sys, genkit.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
