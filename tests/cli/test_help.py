"""What `genkit --help`, `genkit COMMAND --help` and `genkit completion` say, against the settings and registries."""

import re
import shutil
import subprocess
from typing import Any

import pytest

from genkit.cli.main import COMMANDS, main
from genkit.config.blocks import get_fields, get_hints, load_object
from genkit.config.command import to_flag
from genkit.config.help_text import find_marks, read_field_docs
from genkit.config.names import NameIn
from tests.support.commands import settings_class

WITH_SETTINGS = [name for name, command in COMMANDS.items() if command.settings]


def read_help(capsys, *argv):
    """The help that a command line prints, with every run of white space as one blank and no frames."""
    with pytest.raises(SystemExit) as exit:
        main(list(argv))
    assert exit.value.code in (0, None)
    return " ".join(re.sub("[│─╭╮╰╯]", " ", capsys.readouterr().out).split())


@pytest.mark.parametrize("name", WITH_SETTINGS)
def test_the_table_of_commands_names_the_settings_that_each_command_parses(name):
    assert load_object(COMMANDS[name].settings) is settings_class(name)


@pytest.mark.parametrize("name", WITH_SETTINGS)
def test_help_lists_every_option_name_of_a_registry_and_every_example(capsys, name):
    text = read_help(capsys, name, "--help")
    assert text == read_help(capsys, "help", name)
    squeezed = text.replace(" ", "")  # tyro breaks long lists of names over lines
    cls = settings_class(name)
    for field, f in get_fields(cls).items():
        hint = get_hints(cls)[field]
        if "Positional" not in str(hint):
            assert f"{to_flag(field)}" in text or f"--no-{field}" in text
        names: list[Any] = [mark for mark in find_marks(hint) if isinstance(mark, NameIn)]
        for mark in names:
            assert "{" + ",".join(mark.names()) + "}" in squeezed, f"--{field} does not list its names"
        if "table" in f.metadata and len(load_object(f.metadata["table"])) > 1:
            section = text[text.index(f"{to_flag(field)}: ") :]
            assert all(f" {entry} " in section for entry in load_object(f.metadata["table"]))
    assert COMMANDS[name].examples
    assert all(" ".join(line.split()) in text for line in COMMANDS[name].examples)
    assert "``" not in text
    assert "{None}" not in text


def test_help_says_bounds_and_headings(capsys):
    text = read_help(capsys, "train", "--help")
    assert re.search(r"--steps INT [^-]*At least 1\.", text)
    assert re.search(r"--objective.cond-dropout FLOAT [^-]*-free guidance\. At least 0, below 1\.", text)
    assert "1000000" not in text, "bounds that no user meets are noise"
    headings = [group for _, group in read_field_docs(settings_class("train")).values()]
    assert "" not in headings, "an option of training without a heading"
    assert all(f"{group} options" in text for group in headings)


@pytest.mark.parametrize(("argv", "says"), [
    (["sample", "runs/x", "--sampler=huen"], "--sampler: given 'huen'; allowed: ddim"),
    (["train", "--eval-metrics=fid,kdi"], "--eval-metrics: given 'fid,kdi'; 'kdi' is unknown; allowed: fid"),
    (["train", "--eval-features=inceptoin"], "did you mean inception?"),
])  # fmt: skip
def test_a_wrong_name_is_refused_before_any_work(capsys, argv, says):
    assert main(argv) == 2
    assert says in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- completion
COMPLETE = {
    "bash": r"""
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}; COMPREPLY=()
f=$(complete -p genkit | sed 's/.*-F \([^ ]*\).*/\1/')
$f genkit "${COMP_WORDS[$COMP_CWORD]}" "${COMP_WORDS[$((COMP_CWORD-1))]}"
printf '%s\n' "${COMPREPLY[@]}"
""",
    "fish": r"""
source $argv[1]; complete -C (string join -- ' ' $argv[2..-1])
""",
}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(capsys, tmp_path, shell):
    assert main(["completion", shell]) == 0
    script = tmp_path / "genkit.completion"
    script.write_text(capsys.readouterr().out)
    assert all(name in script.read_text() for name in [*COMMANDS, "dpmpp_2m", "--objective.cond-dropout"])
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    if shell == "zsh":  # its completion runs within a terminal only; the syntax is checked
        subprocess.run(["zsh", "-n", script], check=True)
        return

    def complete(*words):
        (tmp_path / "ask").write_text(COMPLETE[shell])
        done = subprocess.run([shell, tmp_path / "ask", script, *words], capture_output=True, text=True)
        return {line.split("\t")[0] for line in done.stdout.splitlines() if line}

    assert complete("genkit", "s") == {"sample", "serve", "sweep"}
    assert complete("genkit", "sample", "--sampler", "dpm") == {"dpmpp_2m", "dpmpp_3m", "dpmpp_sde"}
    assert complete("genkit", "train", "--objective", "v") == {"vae", "vq"}
    assert "--guidance-rule" in complete("genkit", "sample", "--gui")
