"""Every configuration survives the way to YAML and back; anything else is refused in one line."""

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from genkit.config import ConfigError, dump, from_dict, load_object, load_yaml, parse, to_yaml
from genkit.config.blocks import get_fields
from genkit.training.settings import TrainSettings
from tests.support.toy_config import Arc, Deep, Draw, Flat, Folder, Job, Line, Points, Pulse, Wave, parse_job


def survives(cfg: Any) -> bool:
    """Whether YAML and mappings give an equal configuration back."""
    return from_dict(type(cfg), yaml.safe_load(to_yaml(cfg))) == cfg == from_dict(type(cfg), dump(cfg))


TABLES = {
    "objective": "genkit.objectives:OBJECTIVES",
    "objective.path": "genkit.diffusion.paths:PATHS",
    "backbone": "genkit.backbones:BACKBONES",
    "data": "genkit.data:DATA",
}


@pytest.mark.parametrize("path", TABLES)
def test_every_entry_of_every_registry_makes_the_round_trip(path):
    registry = load_object(TABLES[path])
    assert registry
    for name, cls in registry.items():
        assert "name" not in get_fields(cls), f"{name}: `name` is taken, it selects the class in YAML"
        required = {k: "x" for k, f in get_fields(cls).items() if f.default is f.default_factory is dataclasses.MISSING}
        block: dict[str, Any] = {"name": name, **required}
        for part in reversed(path.split(".")):
            block = {part: block}
        cfg = from_dict(TrainSettings, block)
        assert type(operator.attrgetter(path)(cfg)) is cls
        assert survives(cfg)
        flags = [f"--{path}.{k}={v}" for k, v in required.items()]
        assert parse(TrainSettings, [f"--{path}={name}", *flags]) == cfg or required


def test_a_configuration_is_plain_yaml():
    cfg = parse_job("--wave.path=arc", "--ema", "0.9", "0.99")
    assert dump(cfg)["ema"] == [0.9, 0.99]
    assert dump(cfg)["wave"]["path"] == {"name": "arc", "radius": 1.0, "points": [1, 2]}
    assert "\nnet: {name: flat, depth: 2}\n" in to_yaml(cfg)  # one line where one is enough
    assert list(dump(cfg)) == list(get_fields(Job))
    assert to_yaml(Draw("R", 3)) == "run: R\nn: 3\nmix: [0.5, 0.5]\nclip: false\n"


number = st.floats(-1e30, 1e30)
positive = st.floats(0, 1e30, exclude_min=True)
integers = st.integers(-(2**62), 2**62)
counts = st.integers(1, 2**62)
arcs = st.builds(Arc, positive, st.lists(integers).map(tuple))
waves = st.builds(
    Wave,
    st.one_of(st.builds(Line), arcs),
    st.sampled_from(["uniform", "logit-normal"]),
    positive,
    st.floats(-1e30, 0),
    st.booleans(),
)
jobs = st.builds(
    Job,
    wave=st.one_of(waves, st.builds(Pulse, integers, arcs), arcs),
    net=st.one_of(st.builds(Flat, integers), st.builds(Deep, integers, st.booleans())),
    data=st.one_of(st.builds(Points, integers), st.builds(Folder, st.text())),
    steps=counts,
    lr=positive,
    micro_batch=st.none() | counts,
    betas=st.tuples(st.floats(0, 1, exclude_max=True), number),
    ema=st.lists(number).map(tuple),
    size=st.none() | integers | st.tuples(integers, integers),
    channels=st.sampled_from([None, 1, 3]),
    flip=st.booleans(),
    out=st.text(),
    name=st.none() | st.text(),
)


@given(jobs)
def test_any_configuration_makes_the_round_trip(cfg):
    assert survives(cfg)


# --------------------------------------------------------------------------------------------------- fuzzing
WORDS = ["name", "wave", "arc", "line", "folder", "points", "x", "None", "null", "true", "1e-4", "-1", "0", "", "a:b"]
WORDS += [*get_fields(Job), *get_fields(Wave), *get_fields(Arc), "short-pulse", "no_flip", "wave.path", "__class__"]
WORDS += [".", "--", "="]
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(WORDS) | st.dates()
)
keys = st.sampled_from(WORDS) | scalars
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4), max_leaves=12
)


def is_handled(make: Callable[[], Any]) -> bool:
    """Whether the result is a configuration that makes the round trip, an error in one line, or help."""
    try:
        return survives(make())
    except ConfigError as e:
        return len(str(e).splitlines()) == 1
    except SystemExit as e:
        return e.code == 0


@given(st.dictionaries(keys, trees, max_size=5) | trees)
@settings(max_examples=300, deadline=None)
def test_any_mapping_gives_a_configuration_or_one_line(tree):
    assert is_handled(lambda: from_dict(Job, tree))


flags = st.builds(
    lambda dashes, path, tail: dashes + path + tail,
    st.sampled_from(["--", "-", ""]),
    st.lists(st.sampled_from([*WORDS, "t-std", "no-flip"]), min_size=1, max_size=3).map(".".join),
    st.sampled_from(["", "="]) | st.sampled_from(WORDS).map("={}".format),
)


@given(st.lists(flags | st.sampled_from(WORDS) | st.text(max_size=4), max_size=6))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_command_line_gives_a_configuration_or_one_line(capsys, argv):
    assert is_handled(lambda: parse(Job, argv))
    assert is_handled(lambda: parse(Draw, argv))
    assert not capsys.readouterr().err


@given(st.text(alphabet=st.sampled_from("ab:-[]{}!&*#|>'\"\n\t ,%@`?0.1"), max_size=30))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_file_gives_a_configuration_or_one_line(tmp_path, text):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    assert is_handled(lambda: from_dict(Job, load_yaml(file)))
