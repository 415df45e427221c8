"""Names beside the programs: no library finds one of our files in place of a package."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT
from transformers.utils import import_utils

PROGRAMS = [
    path
    for folder in ("electra_composer", "electra_composer/finetuning", "data_prep")
    for path in sorted((ROOT / folder).glob("*.py"))
    if "__main__" in path.read_text(encoding="utf-8") and path.name != "program.py"
]
OPTIONAL = re.compile(r"""(?:_is_package_available|find_spec|importlib\.metadata\.version)\(\s*["']([\w.]+)""")

# What a program does before its imports, as Python would run it; then where it would find each name.
BEGIN = """
import ast, importlib.machinery, json, os, sys
__file__, *names = sys.argv[1:]
sys.path[0] = os.path.dirname(__file__)
before = [name for name in names if importlib.machinery.PathFinder.find_spec(name)]
with open(__file__, encoding="utf-8") as file:
    body = ast.parse(file.read()).body
docstring, future, begin = body[:3]
assert isinstance(docstring, ast.Expr) and future.module == "__future__" and isinstance(begin, ast.If)
exec(compile(ast.Module([begin], []), __file__, "exec"))
found = {name: spec for name in names if (spec := importlib.machinery.PathFinder.find_spec(name))}
folder = os.path.join(os.path.dirname(__file__), "")
shadowed = [name for name, spec in found.items() if (spec.origin or str(list(spec.submodule_search_locations))).
            startswith(folder)]
print(json.dumps([before, shadowed, sorted(name for name in sys.modules if "." not in name)]))
"""


def names_beside(program: Path) -> set[str]:
    """Names that Python would import from the folder of a program."""
    here = program.parent.iterdir()
    return {path.stem for path in here if path.suffix == ".py" or (path.is_dir() and path.name.isidentifier())}


def optional_imports() -> set[str]:
    """Top-level names that transformers looks for."""
    source = Path(import_utils.__file__).read_text(encoding="utf-8")
    return {name.split(".")[0] for name in OPTIONAL.findall(source)}


def test_the_names_are_found():
    assert {"kernels", "flash_attn", "accelerate", "peft", "sklearn"} <= optional_imports()
    assert {"model", "config", "storage", "pretrain"} <= names_beside(ROOT / "electra_composer/pretrain.py")
    assert {"command", "doctor", "pretrain", "push", "score", "convert_owt", "synthetic"} <= {
        path.stem for path in PROGRAMS
    }


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_no_name_beside_a_program_is_that_of_a_package(program):
    others = {name for name in importlib.metadata.packages_distributions() if name != "electra_composer"}
    assert not names_beside(program) & (others | optional_imports() | set(sys.stdlib_module_names))


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_a_program_sees_no_module_of_its_own_folder(program):
    """Not even one whose name is that of no package today. What it imports before that is the standard library's."""
    command = [sys.executable, "-c", BEGIN, str(program), *sorted(names_beside(program))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, after, imported = json.loads(done.stdout)
    assert program.stem in before
    assert after == []
    assert not {"torch", "composer", "transformers", "numpy", "yaml"} & set(imported)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_only_a_program_takes_its_first_steps(program):
    """An import of the same file does not install handlers."""
    condition = next(node for node in ast.parse(program.read_text(encoding="utf-8")).body if isinstance(node, ast.If))
    assert ast.unparse(condition.test) == "__name__ == '__main__'"


@pytest.mark.parametrize(
    ("program", "yaml", "words", "message"),
    [
        ("pretrain", "small", "optimizer.lr=1e400", "optimizer.lr is inf; expected a number in (0, 10]"),
        ("pretrain", "small", "trainer.cuda_graph=always", "expected true, false or auto"),
        ("glue", "glue", "seeds=3", "seeds is 3; expected a list of 1 to 10,000 values"),
        ("finetune", "classification", "task.kind=ner", "expected classification, regression, tagging or qa"),
    ],
)
def test_a_wrong_configuration_is_refused_before_libraries_are_imported(program, yaml, words, message):
    command = [sys.executable, "-X", "importtime", ROOT / f"electra_composer/{program}.py", ROOT / f"yamls/{yaml}.yaml"]
    done = subprocess.run([*command, words], capture_output=True, text=True, check=False)
    *imports, error = done.stderr.splitlines()
    assert done.returncode == 2
    assert error.startswith("error: the command line: ")
    assert message in error
    names = {line.rpartition("|")[2].strip() for line in imports}
    assert "omegaconf" in names
    assert not {"torch", "composer", "transformers", "numpy"} & names


SPAWNS = """
if __name__ == "__main__":
    from electra_composer.program import begin

    begin()

import importlib.util, multiprocessing

def find(name):
    return importlib.util.find_spec(name) is not None

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(find("beside"), pool.apply(find, ["beside"]))
"""


def test_nor_do_the_processes_that_it_spawns(tmp_path):
    (tmp_path / "beside.py").touch()
    (tmp_path / "spawns.py").write_text(SPAWNS)
    done = subprocess.run([sys.executable, tmp_path / "spawns.py"], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"
