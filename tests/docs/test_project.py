"""What stands in several places agrees: the rooms and their map, addresses, versions, numbered examples."""

import re
from pathlib import Path

import pytest
import yaml

import genkit

ROOT = Path(__file__).parents[2]
ROOMS = sorted(p.parent.name for p in (ROOT / "genkit").glob("*/__init__.py"))


def read(path):
    return (ROOT / path).read_text()


def test_every_room_is_in_the_map_and_has_an_api_page():
    mapped = re.findall(r"^\| `(\w+)/` \|", read("docs/architecture.md"), re.MULTILINE)
    assert sorted(mapped) == ROOMS
    nav = read("mkdocs.yml")
    for room in ROOMS:
        assert f"::: genkit.{room}" in read(f"docs/api/{room}.md")
        assert f"- api/{room}.md" in nav


def test_the_map_is_in_the_order_of_the_import_contract():
    contract = read("pyproject.toml").partition("layers = [")[2].partition("]")[0]
    mapped = re.findall(r"^\| `(\w+)/` \|", read("docs/architecture.md"), re.MULTILINE)
    assert mapped == re.findall(r'"(\w+)"', contract)[::-1]


def test_every_public_name_is_on_the_api_page():
    page = read("docs/api/index.md")
    assert not [name for name in genkit.__all__ if not re.search(rf"`{name}`", page)]


def test_every_recipe_is_in_the_index():
    index = read("docs/contributing/index.md")
    for page in (ROOT / "docs/contributing").glob("*.md"):
        assert page.name == "index.md" or f"]({page.name})" in index, page.name


def test_versions_and_addresses_agree():
    project = read("pyproject.toml")
    assert f'version = "{genkit.__version__}"' in project
    citation = yaml.safe_load(read("CITATION.cff"))
    assert str(citation["version"]) == genkit.__version__
    urls = dict(re.findall(r'^(Source|Documentation) = "(.*)"$', project, re.MULTILINE))
    assert (citation["repository-code"], citation["url"]) == (urls["Source"], urls["Documentation"])
    assert f"repo_url: {urls['Source']}\n" in read("mkdocs.yml")
    assert f"site_url: {urls['Documentation']}\n" in read("mkdocs.yml")
    assert urls["Source"] in read("SECURITY.md")


def test_annotations_are_shipped():
    assert (ROOT / "genkit/py.typed").is_file()
    assert '"py.typed"' in read("pyproject.toml")


@pytest.mark.parametrize("name", ["ci", "docs", "release"])
def test_workflows_call_ci_run(name):
    jobs = yaml.safe_load(read(f".github/workflows/{name}.yml"))["jobs"]
    commands = [step.get("run", "") for job in jobs.values() for step in job["steps"]]
    assert any(command.startswith(".ci/run") for command in commands)


def test_examples_are_numbered_without_gaps_and_listed():
    names = sorted(p.name for p in (ROOT / "examples").glob("*.py"))
    assert [name[:3] for name in names] == [f"{i:02d}_" for i in range(1, len(names) + 1)]
    listed = re.findall(r"`(\d\d_\w+\.py)`", read("docs/getting-started.md"))
    assert listed == names


def test_the_changelog_has_its_headings():
    text = read("CHANGELOG.md")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE)[0] == "[Unreleased]"
    assert set(re.findall(r"^### (.*)$", text, re.MULTILINE)) <= {
        "Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"
    }  # fmt: skip


def test_python_on_the_front_page_runs(tmp_path, monkeypatch):
    """With fewer steps and samples, of a smaller model."""
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", read("README.md"), re.DOTALL)
    small = code.replace(
        "steps=2000", 'steps=2, backbone={"width": 8, "mults": [1, 2]}, batch=8, workers=0, device="cpu"'
    )
    small = small.replace("n=1000", "n=40, steps=2")
    assert small.count("steps=2") == 3
    exec(small.replace('sampler="heun", steps=20', "steps=2"), {})
    assert (tmp_path / "sevens.png").is_file()
