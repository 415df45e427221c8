"""Execute the notebooks in order and store their outputs, so that they can be read without running them.

    make notebooks
    STEPS=1500 make notebooks  # shorter

Each is run in the same empty folder, since the second and third use the model of the first. What the outputs say of the
machine is removed: paths, times of execution, versions of Python in the metadata.
"""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).resolve().parent
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
CELL_SECONDS = 3600
MOST_BYTES = 300_000  # of a notebook
COLORS = 64  # of a stored picture; a third of the size
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
ABSOLUTE = re.compile(r"(?<![\w.:])/(?:home|root|tmp|work|usr|opt|var|mnt|srv|etc|private|Users|builds)\b[^\s'\"]*")
PROGRESS = re.compile(r"^(?!100\.0%)\d+\.\d% \d+/\d+ba .*\n", re.M)  # lines of progress bars, but the last


def execute(path: Path, folder: Path) -> Any:
    """Execute a notebook in a folder, without writing it.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        coalesce_streams=True,
    )
    return client.execute()


def normalise(notebook: Any, folder: Path) -> None:
    """Remove from a notebook what differs between machines and executions.

    Args:
        notebook: changed in place.
        folder: where it was executed; paths in its outputs become relative to it, as if it were `notebooks/`.
    """
    places = {str(folder): ".", str(FOLDER.parent): "..", sys.prefix: "environment", str(Path.home()): "~"}
    notebook["metadata"] = nbformat.from_dict(METADATA)
    for number, cell in enumerate(notebook["cells"], 1):
        cell["id"] = f"cell-{number:02}"
        cell["metadata"] = nbformat.from_dict({})
        if cell["cell_type"] == "code" and not cell["source"].startswith("%%"):
            # Advice of libraries about this machine. What the commands of a shell cell say stays.
            cell["outputs"] = [output for output in cell["outputs"] if output.get("name") != "stderr"]
        for output in cell.get("outputs", ()):
            output.pop("transient", None)
            if output["output_type"] == "stream":
                output["text"] = PROGRESS.sub("", _replace(output["text"], places))
                continue
            output["metadata"] = nbformat.from_dict({})
            for kind, content in output.get("data", {}).items():
                output["data"][kind] = _smaller(content) if kind == "image/png" else _replace(content, places)


def _replace(text: str, places: Mapping[str, str]) -> str:
    for place in sorted(places, key=len, reverse=True):
        if place != "/":  # the home of some accounts
            text = text.replace(place, places[place])
    return text


def _smaller(png: str) -> str:
    """Reduce the colours of a PNG; base64 in and out."""
    file = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(png))) as picture:
        picture.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE).save(file, format="PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def problems(path: Path) -> Iterator[str]:
    """Yield what a stored notebook must not be: not executed, failed, large, or with traces of a machine."""
    if path.stat().st_size > MOST_BYTES:
        yield f"{path.stat().st_size:,} bytes; expected at most {MOST_BYTES:,}"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    if notebook["metadata"] != METADATA or any(cell["metadata"] for cell in notebook["cells"]):
        yield "it has metadata of a machine or an editor"
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    if [cell["execution_count"] for cell in code] != list(range(1, len(code) + 1)):
        yield "its cells were not executed in order"
    outputs = [output for cell in code for output in cell["outputs"]]
    if not any("image/png" in output.get("data", {}) for output in outputs):
        yield "it has no picture"
    for output in outputs:
        if output["output_type"] == "error":
            yield f"a cell failed: {output['ename']}"
        texts = [output.get("text", ""), *(v for k, v in output.get("data", {}).items() if not k.startswith("image/"))]
        for text in texts:
            yield from (f"a path of a machine: {found}" for found in ABSOLUTE.findall(text))
            yield from (f"an address: {found}" for found in re.findall(r"\w+://[^\s\"'<]+", text))


def main() -> None:
    """Execute all notebooks in a temporary folder and store them."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # electra, python
    folder = Path(tempfile.mkdtemp(prefix="notebooks-"))
    try:
        for path in NOTEBOOKS:
            print(path.name, flush=True)
            notebook = execute(path, folder)
            normalise(notebook, folder)
            nbformat.write(notebook, path)
            for problem in problems(path):
                print(f"  {problem}", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
