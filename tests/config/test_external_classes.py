"""Classes from outside the package, paths as data sets, and that nothing else is imported or executed."""

import os
from pathlib import Path

import pytest

from genkit.config import dump, from_dict
from tests.support.toy_config import MODULE, Arc, Folder, Job, Points, parse_job, refusal


def test_a_class_from_outside():
    cfg = parse_job(f"--wave={MODULE}:Arc", "--wave.radius=2")
    assert cfg.wave == Arc(2.0)
    assert dump(cfg)["wave"] == {"name": f"{MODULE}:Arc", "radius": 2.0, "points": [1, 2]}
    assert from_dict(Job, dump(cfg)) == cfg


@pytest.mark.parametrize(
    ("flag", "problem"),
    [
        (f"--wave={MODULE}:NotADataclass", f"--wave: given {MODULE}:NotADataclass, a type; needs a dataclass"),
        (f"--wave={MODULE}:DATA", f"--wave: given {MODULE}:DATA, a dict; needs a dataclass"),
        (f"--net={MODULE}:Arc", f"--net: given {MODULE}:Arc; needs a subclass of {MODULE}.Shape"),
        ("--wave=os:path.nothing", "--wave: given os:path.nothing; the module has no such class"),
        (
            "--wave=nowhere.x:Y",
            f"--wave: given nowhere.x:Y; there is no module nowhere on PYTHONPATH or here, in {os.getcwd()}",
        ),
    ],
)
def test_an_unsuitable_class_from_outside_is_refused(flag, problem):
    assert refusal(flag) == problem + (os.getcwd() if problem.endswith(" in ") else "")


def test_an_error_inside_an_outside_module_keeps_its_traceback(write_config, monkeypatch):
    write_config("")
    Path("broken_outside.py").write_text("import nowhere_at_all\n")
    monkeypatch.syspath_prepend(".")
    with pytest.raises(ModuleNotFoundError, match="nowhere_at_all"):
        parse_job("--wave=broken_outside:Wave")


def test_nothing_else_is_executed(write_config):
    write_config("wave: {t_std: !!python/object/apply:os.mkdir [hacked]}")
    assert "not valid YAML: could not determine a constructor" in refusal("--config=c.yaml")
    for text in ("os:mkdir('hacked')", "__import__('os')", "os.mkdir('hacked'):x", "..os:mkdir", ":", "os:", ":os"):
        assert "allowed: wave, short_pulse, package.module:Class" in refusal(f"--wave={text}")
    assert not os.path.exists("hacked")


def test_a_path_is_a_data_set(write_config):
    write_config("data: pictures")
    os.mkdir("pictures")
    os.mkdir("empty")
    os.mkdir("points")
    assert parse_job("--config=c.yaml").data == Folder("pictures")
    assert parse_job("--data", "./pictures").data == Folder("./pictures")
    assert parse_job("--data=folder", "--data.root=pictures").data == Folder("pictures")
    assert parse_job("--data=points").data == Points()  # a name takes precedence over a path
    assert refusal("--data=empty") == "--data: empty holds no samples"
    assert refusal("--data=pictues").startswith(
        "--data: given 'pictues'; allowed: points, folder, package.module:Class,"
    )
    assert "a path that exists" in refusal("--data=pictues")
    assert "--wave: given 'pictures'; allowed" in refusal("--wave=pictures")  # only if the table has a fallback
