"""Execute the notebooks of examples/notebooks and store their outputs.

    pip install -e ".[docs]"
    python tools/notebooks.py [NAME ...]

Pictures are drawn small, and what differs from one execution to the next (times, widget states) is not stored.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "notebooks"
SETUP = "%config InlineBackend.print_figure_kwargs = {'bbox_inches': 'tight', 'dpi': 76}"


def is_noise(output: nbformat.NotebookNode) -> bool:
    """Whether an output is a warning of a library, or what a progress bar leaves behind."""
    if output.output_type == "stream":
        return bool(output.name == "stderr")
    text = output.get("data", {}).get("text/plain")
    return text is not None and not text.strip()


def execute(path: Path) -> None:
    """Run every cell in a fresh kernel and write the outputs into ``path``."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(SETUP))
    NotebookClient(notebook, timeout=900, record_timing=False, resources={"metadata": {"path": str(FOLDER)}}).execute()
    del notebook.cells[0]
    for number, cell in enumerate((c for c in notebook.cells if c.cell_type == "code"), 1):
        cell.execution_count = number
        cell.outputs = [output for output in cell.outputs if not is_noise(output)]
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = number
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    nbformat.write(notebook, path)


def main() -> None:
    for path in sorted(FOLDER.glob("*.ipynb")):
        if not sys.argv[1:] or path.stem in sys.argv[1:]:
            execute(path)
            print(f"{path.name}  {path.stat().st_size / 1024:.0f} kB")


if __name__ == "__main__":
    main()
