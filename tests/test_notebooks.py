"""The notebooks: what is stored of them, and all their cells at tiny sizes."""

from __future__ import annotations

import os
import sys
import time

import nbformat
import programs
import pytest
from doc_pages import load_script
from jupyter_client import launcher
from tiny import ROOT

script = load_script("notebooks/execute.py")

# The environment variables that the first cells read.
TINY = {
    "DOCUMENTS": "300",
    "VOCABULARY": "1000",
    "STEPS": "20",
    "EXAMPLES": "64",
    "EPOCHS": "1",
    "SEEDS": "1",
    "KIND_STEPS": "2",
    "SENTENCES": "60",
    "SOURCE": "runs/first/export/discriminator",
}
# `electra` and `python` of the cells: started by the server of programs.py.
COMMAND = f"""#!{sys.executable} -S
import sys
sys.path[:0] = {[str(ROOT / "tests"), str(ROOT), *sys.path]!r}
import programs
name, words = {{name!r}}, sys.argv[1:]
if name == "electra":
    from electra_composer.command import command_line
    _, *words = command_line(words)
sys.exit(programs.run([sys.executable, *words]).returncode)
"""


def start_kernel(*arguments, **options):
    """Start a kernel; return when it has its own process group, which jupyter_client sends signals to."""
    process = programs.Program(*arguments, **options)
    while os.getpgid(process.pid) != process.pid:
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("path", script.NOTEBOOKS, ids=lambda path: path.name)
def test_what_is_stored(path):
    assert list(script.problems(path)) == []


def test_what_must_not_be_stored_is_found(tmp_path):
    stream, error = nbformat.v4.new_output("stream"), nbformat.v4.new_output("error", ename="KeyError")
    stream["text"] = "written to /home/me/a.png\nfrom https://example.org/simple\n"
    notebook = nbformat.v4.new_notebook(metadata={"title": "mine"})
    notebook["cells"] = [nbformat.v4.new_code_cell("1", execution_count=2, outputs=[stream, error])]
    path = tmp_path / "bad.ipynb"
    nbformat.write(notebook, path)
    found = list(script.problems(path))
    for said in (
        "metadata",
        "not executed in order",
        "no picture",
        "a cell failed: KeyError",
        "a path of a machine: /home/me/a.png",
        "an address: https://example.org/simple",
    ):
        assert any(said in problem for problem in found), said
    assert len(found) == 6


def test_outputs_are_normalised():
    """Paths are replaced, the longest first; the advice of libraries is dropped, what a shell cell says is kept."""
    text = f"{ROOT}/work/runs {ROOT}/yamls\n50.0% 1/2ba [00:10<00:10], loss 1\n100.0% 2/2ba [00:20<00:00], loss 1\n"
    said = nbformat.v4.new_output("stream", name="stderr", text=text)
    cells = [nbformat.v4.new_code_cell(source, outputs=[dict(said)]) for source in ("%%bash\nls", "import torch")]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"title": "mine"})
    cells[0]["metadata"]["execution"] = {"iopub.execute_input": "2026-01-01"}
    script.normalise(notebook, ROOT / "work")
    kept = "./runs ../yamls\n100.0% 2/2ba [00:20<00:00], loss 1\n"
    assert [[output["text"] for output in cell["outputs"]] for cell in notebook["cells"]] == [[kept], []]
    assert notebook["metadata"] == script.METADATA
    assert [(cell["id"], cell["metadata"]) for cell in notebook["cells"]] == [("cell-01", {}), ("cell-02", {})]


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """Tiny sizes; kernels and the programs that they start are forked from the server of programs.py."""
    programs.start_server()
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("electra", "python"):
        (commands / name).write_text(COMMAND.format(name=name))
        (commands / name).chmod(0o755)
    changes = {**TINY, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "IPYTHONDIR": str(tmp_path / "ipython")}
    for name, value in {**changes, "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launcher, "Popen", start_kernel)


@pytest.mark.slow
def test_all_cells_run_one_notebook_after_another(environment, tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    for path in script.NOTEBOOKS:
        notebook = script.execute(path, folder)
        script.normalise(notebook, folder)
        nbformat.write(notebook, tmp_path / path.name)
        assert list(script.problems(tmp_path / path.name)) == []
