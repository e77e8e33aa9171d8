"""The rules of the house: names, sizes, documentation. They hold for every module, also for those to come."""

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

import genkit

PACKAGE = Path(genkit.__file__).parent
ROOT = PACKAGE.parent
MODULES = {str(p.relative_to(ROOT)): ast.parse(p.read_text()) for p in sorted(PACKAGE.rglob("*.py"))}
ROOMS = ("core", "config", "diffusion", "backbones", "envs", "data", "objectives", "training", "integrations",
         "evaluation", "rl", "cli")  # fmt: skip
BANNED = set(  # words that do not say what a thing is or does
    [
        "told",
        "found",
        "looked",
        "judged",
        "held",
        "asked",
        "seen",
        "said",
        "beside",
        "ruler",
        "game",
        "walk",
        "settle",
        "here",
        "there",
        "how",
        "whole",
        "look",
        "looks",
        "judge",
        "drawn",
        "apart",
        "suits",
        "remark",
        "remarks",
        "dwell",
        "mine",
        "way",
        "ways",
    ]
)
SAME_EVERYWHERE = {"main"}  # every command has one


def public_definitions(tree):
    """``(name, node)`` of the public functions and classes of a module."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node.name, node


def public_names(tree):
    """Functions, classes, methods, parameters and fields."""
    for _, node in public_definitions(tree):
        yield node.name
        inner = [node]
        if isinstance(node, ast.ClassDef):
            inner = [n for n in node.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")]
            yield from (n.name for n in inner)
            yield from (
                n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
            )
        for function in (n for n in inner if isinstance(n, ast.FunctionDef)):
            yield from (a.arg for a in [*function.args.args, *function.args.kwonlyargs])


def test_there_are_twelve_rooms():
    assert {p.parent.name for p in PACKAGE.glob("*/__init__.py")} == set(ROOMS)


def test_a_public_name_has_one_meaning():
    places = defaultdict(set)
    for path, tree in MODULES.items():
        for name, _ in public_definitions(tree):
            places[name].add(path)
    crowded = {k: sorted(v) for k, v in places.items() if len(v) >= 3 and k not in SAME_EVERYWHERE}
    assert not crowded, crowded


@pytest.mark.parametrize("path", MODULES)
def test_public_names_say_what_they_are(path):
    assert not sorted(BANNED & set(public_names(MODULES[path])))


@pytest.mark.parametrize("path", MODULES)
def test_modules_and_functions_are_short(path):
    assert len((ROOT / path).read_text().splitlines()) <= 450
    for node in ast.walk(MODULES[path]):
        if isinstance(node, ast.FunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= 80, f"{node.name}: {lines} lines"


def documented_method_names():
    """Methods that a base class or protocol documents: an override need not say it again."""
    names = set()
    for tree in MODULES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                names |= {n.name for n in node.body if isinstance(n, ast.FunctionDef) and ast.get_docstring(n)}
    return names


INHERITED = documented_method_names()
PROTOCOL = {"alpha", "sigma", "forward", "path", "encode", "decode", "spec"}  # their class says what they are


@pytest.mark.parametrize("path", MODULES)
def test_what_is_public_is_documented(path):
    tree = MODULES[path]
    missing = [name for name, node in public_definitions(tree) if not ast.get_docstring(node)]
    for name, node in public_definitions(tree):
        if isinstance(node, ast.ClassDef):
            methods = [n for n in node.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")]
            missing += [
                f"{name}.{n.name}"
                for n in methods
                if not ast.get_docstring(n) and n.name not in INHERITED and n.name not in PROTOCOL
            ]
    assert not missing, f"{path}: {', '.join(missing)}"


def test_local_imports_are_lazy_ones():
    """An import inside a function is for speed or for an optional package, and says so."""
    unmarked = []
    for path, tree in MODULES.items():
        lines = (ROOT / path).read_text().splitlines()
        for function in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)):
            imports = [n for n in ast.walk(function) if isinstance(n, (ast.Import, ast.ImportFrom))]
            marked = [n for n in imports if "lazy" in lines[n.lineno - 1] or "lazy" in lines[(n.end_lineno or 1) - 1]]
            if imports and not marked:
                unmarked.append(f"{path}:{imports[0].lineno}")
    assert not unmarked, unmarked


def test_commands_print_through_the_console_that_escapes():
    """Except for JSON, in which nothing needs it, and texts of genkit's own."""
    for path, tree in MODULES.items():
        names = {a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module == "rich.console"
                 for a in n.names}  # fmt: skip
        assert "Console" not in names or path in ("genkit/cli/output.py", "genkit/core/progress.py"), path
        if not path.startswith("genkit/cli/commands"):
            continue
        for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
            if isinstance(call.func, ast.Name) and call.func.id == "print":
                assert ast.unparse(call.args[0]).startswith(("json.dumps(", "f'usage:", "format_completion(")), (
                    f"{path}:{call.lineno}"
                )


def test_tests_mirror_the_rooms_and_are_short():
    folders = {p.name for p in (ROOT / "tests").iterdir() if p.is_dir() and not re.match(r"[_.]", p.name)}
    assert set(ROOMS) <= folders
    long = {
        str(p.relative_to(ROOT)): n
        for p in (ROOT / "tests").rglob("*.py")
        if (n := len(p.read_text().splitlines())) > 600
    }
    assert not long, long


def test_importing_genkit_costs_no_torch_and_every_public_name_exists():
    for name in genkit.__all__:
        assert getattr(genkit, name) is not None


def test_hints_install_this_project():
    """On PyPI genkit is another project; this one is genkit-torch."""
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    other = re.compile(r"install [-\w ]*[\"']?genkit(?!-torch)\b")
    assert [str(p.relative_to(ROOT)) for p in files if other.search(p.read_text())] == []
