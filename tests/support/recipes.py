"""The recipes of docs/contributing: the code on a page is the code that a test executes."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--data=moons", "--backbone.width=16", "--backbone.depth=1", "--steps=4", "--batch=8", "--workers=0",
        "--no-tensorboard", "--device=cpu"]  # fmt: skip


def page_shows(name):
    """``docs/contributing/NAME.md`` shows ``tests/recipes/NAME.py`` word for word."""
    page = (ROOT / "docs" / "contributing" / f"{name}.md").read_text(encoding="utf-8")
    code = (ROOT / "tests" / "recipes" / f"{name.replace('-', '_')}.py").read_text(encoding="utf-8")
    assert f"```python\n{code}```\n" in page, f"docs/contributing/{name}.md does not show tests/recipes/{name}.py"
