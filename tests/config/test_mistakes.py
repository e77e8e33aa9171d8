"""Every mistake is one line: the flag or file that caused it, what was given, what is allowed, what was meant."""

from pathlib import Path

import pytest
import yaml

from genkit.config import ConfigError, from_dict, load_yaml
from tests.support.toy_config import Draw, Flat, Job, refusal


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("stps: 3", "stps: unknown setting; allowed: wave, net, data, steps, lr, micro_batch, betas, ema, size, "
         "channels, flip, tensorboard, out, name; did you mean steps?"),
        ("wave: {tstd: 3}",
         "wave.tstd: unknown setting; allowed: path, times, t_std, low, mirror_x; did you mean t_std?"),
        ("wave: {path: {radius: 3}}", "wave.path.radius: unknown setting; Line has no settings"),
        ("1: 2", "1: unknown setting; allowed"),
        ("wave: wve", "wave: given 'wve'; allowed: wave, short_pulse, package.module:Class; did you mean wave?"),
        ("wave: {name: 3}", "wave: given 3; allowed: wave, short_pulse, package.module:Class"),
        ("wave: [a]", "wave: given ['a']; needs a name or a block like {name: ..., setting: ...}"),
        ("wave: null", "wave: given None; needs a name or a block"),
        ("data: folder", "data.root: is missing and has no default"),
        ("steps: x", "steps: given 'x'; needs an integer"),
        ("steps: 1.5", "steps: given 1.5; needs an integer"),
        ("steps: true", "steps: given True; needs an integer"),
        ("lr: yes", "lr: given True; needs a number"),
        ("ema: [0.9, false]", "ema: given [0.9, False]; needs a number or a list"),
        ("steps: 0", "steps: given 0; should be greater than or equal to 1"),
        ("steps: null", "steps: given None; needs an integer"),
        ("steps: [1]", "steps: given [1]; needs an integer"),
        ("lr: abc", "lr: given 'abc'; needs a number"),
        ("lr: .nan", "lr: given nan; should be a finite number"),
        ("lr: .inf", "lr: given inf; should be a finite number"),
        ("micro_batch: x",
         "micro_batch: given 'x'; needs an integer or null"),
        ("betas: [0.9, 0.9, 0.9]", "betas: given [0.9, 0.9, 0.9]; the list should have at most 2 items"),
        ("betas: [1.5, 0.9]", "betas[0]: given 1.5; should be less than 1"),
        ("flip: perhaps", "flip: given 'perhaps'; needs true or false"),
        ("out: 3", "out: given 3; needs text"),
        (f"steps: {10**30}", "steps: given 1000000000000000000000000000000; allowed integers up to 2^62"),
        ("lr: 1e300", "lr: given 1e+300; allowed numbers up to 1e30, which 32 bits can hold"),
        ("ema: [0.9, -1e38]", "ema[1]: given -1e+38; allowed numbers up to 1e30"),
        ("wave: {times: unifrom}",
         "wave.times: given 'unifrom'; should be 'uniform' or 'logit-normal'; did you mean uniform?"),
        ("wave: {low: 3}", "wave: low: given 3.0; allowed up to t_std = 1.0"),
        ("wave: {name: wave, path: {name: arc, radius: -1}}", "wave.path.radius: given -1; should be greater than 0"),
    ],
)  # fmt: skip
def test_mistakes_in_yaml(write_config, text, line):
    write_config(text)
    assert refusal("--config=c.yaml").startswith("c.yaml: " + line)
    with pytest.raises(ConfigError) as e:
        from_dict(Job, yaml.safe_load(text))
    assert str(e.value).startswith(line)


@pytest.mark.parametrize(
    "text", ["lr: !!bool x", "lr: !!int x", "lr: !!timestamp x", "? [a]\n: b", "lr: !!python/tuple [1]"]
)
def test_text_that_pyyaml_cannot_construct_is_one_line(write_config, text):
    write_config(text)
    assert refusal("--config=c.yaml").startswith("c.yaml")


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
        ("--steps=x", "--steps: given 'x'; needs an integer"),
        ("--steps=1.5", "--steps: given '1.5'; needs an integer"),
        ("--steps=0", "--steps: given 0; should be greater than or equal to 1"),
        ("--lr=nan", "--lr: given nan; should be a finite number"),
        ("--wave.t-std=-1", "--wave.t-std: given -1.0; should be greater than 0"),
        ("--wave.path=arc --wave.path.radius=x", "--wave.path.radius: given 'x'; needs a number"),
        ("--wave.times=unifrom", "--wave.times: given 'unifrom'; should be 'uniform' or 'logit-normal'; did you mean"),
        ("--channels=2", "--channels: given '2'; should be 1 or 3"),
        ("--size 1 2 3", "--size: given ['1', '2', '3']; the list should have at most 2 items, not 3"),
        ("--ema x", "--ema[0]: given 'x'; needs a number"),
        ("--data.steps=3", "unknown option --data.steps; did you mean --data.step?"),
        ("-- --wave=wave", "unexpected argument '--wave=wave'; see genkit job --help"),
        ("--betas .5 x", "--betas[1]: given 'x'; needs a number"),
        ("--flip=perhaps", "--flip: given 'perhaps'; needs true or false"),
        ("--wave.low=3", "wave: low: given 3.0; allowed up to t_std = 1.0"),
        ("--steps", "--steps needs 1 value, given 0"),
        ("--steps --flip", "--steps needs 1 value, given 0"),
        ("--betas .5 --flip", "--betas needs 2 values, given 1"),
        ("--wave", "--wave needs 1 value, given 0"),
        ("--wave --flip", "--wave needs 1 value, given 0"),
        ("--config", "--config needs 1 value, given 0"),
        ("steps=3", "unexpected argument 'steps=3'; see genkit job --help"),
        ("-x", "unexpected argument '-x'; see genkit job --help"),
        ("--data=folder", "data.root: is missing and has no default"),
        ("--config=nowhere.yaml", "nowhere.yaml: cannot be read (No such file or directory)"),
        ("--config=.", ".: cannot be read (Is a directory)"),
    ],
)
def test_mistakes_on_the_command_line(argv, line):
    assert refusal(*argv.split()).startswith(line)


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
def test_a_file_that_is_not_a_configuration(write_config, text, line):
    write_config(text)
    assert refusal("--config=c.yaml").startswith(line)


def test_a_file_that_is_not_text(write_config):
    write_config("")
    Path("c.yaml").write_bytes(b"\xff\xfe\xfa")
    assert refusal("--config=c.yaml").startswith("c.yaml: not valid YAML: 'utf-8' codec can't decode")


def test_an_empty_file_and_merged_anchors_are_valid(write_config):
    write_config("# only a comment\n")
    assert load_yaml("c.yaml") == {}
    write_config("wave: &w {low: 0.5, times: uniform}\nother: {<<: *w, low: 1}")
    assert load_yaml("c.yaml")["other"] == {"low": 1, "times": "uniform"}


def test_an_error_names_the_flag_or_file_that_caused_it(write_config):
    write_config("steps: 3\nwave: {t_std: 2}")
    assert refusal("--config=c.yaml", "--steps=0").startswith("--steps: given 0")
    assert refusal("--config=c.yaml", "--wave.low=9").startswith("wave: low: given 9.0")
    assert refusal("--config=c.yaml", "--wave=wve").startswith("--wave: given 'wve'")
    assert refusal("--config=c.yaml", "--data=folder").startswith("data.root: is missing")
    write_config("n: 5")
    assert refusal("--config=c.yaml", cls=Draw) == "run: is missing and has no default"
    write_config("steps: 0")
    assert refusal("--config=c.yaml", "--lr=1").startswith("c.yaml: steps: given 0")


def test_numbers_may_be_text():
    cfg = from_dict(Job, {"lr": "1e-4", "steps": "7", "betas": ["1e-1", 0]})
    assert cfg == Job(net=Flat(), lr=1e-4, steps=7, betas=(0.1, 0.0))
    assert isinstance(from_dict(Job, {"lr": 1}).lr, float)
