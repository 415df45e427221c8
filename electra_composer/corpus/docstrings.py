"""English prose that is on every machine: the docstrings of the Python packages installed beside the project.

The files are read as text, never imported. One module is one document, one paragraph one line. Code, doctests, tables
and headings are left out, and so is what has been given out before: many docstrings are copies of each other.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import random
import re
import signal
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor

# Besides the standard library; those that are not installed are left out.
PACKAGES = (
    *("torch", "transformers", "numpy", "pandas", "sympy", "networkx"),
    *("torchvision", "torchmetrics", "composer", "streaming", "datasets", "pyarrow", "huggingface_hub"),
    *("matplotlib", "tensorboard", "wandb"),
)
MAX_COPIES = 20  # how often one paragraph may come; transformers has hundreds of some
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3"}
_CHUNK = 32  # modules that a worker reads at a time

# Comments and string literals of Python; of these, docstrings are the triple-quoted ones that begin their line, as the
# text that torch gives its C functions does too, or that are assigned to a name such as LLAMA_INPUTS_DOCSTRING.
# A scan by this takes a fifth of the time that parsing to a syntax tree does.
_LITERAL = re.compile(
    r"""
    \#[^\n]*
    | (?P<lead> (?:^|\n)[ \t]* | \b\w*DOC\w*[ \t]*=[ \t]* )?
      (?P<text> (?P<prefix>[rRuUbBfF]{0,2})
        (?: (?P<triple> \"{3}(?:[^"\\]|\\.|"(?!""))*\"{3} | '{3}(?:[^'\\]|\\.|'(?!''))*'{3} )
          | "(?:[^"\\\n]|\\.)*" | '(?:[^'\\\n]|\\.)*' ) )
    """,
    re.VERBOSE | re.DOTALL,
)
_UNDERLINE = re.compile(r"^[-=~^*+#.\s|]{3,}$")
_BULLET = re.compile(r"^([-*+•]|\d+[.)])\s+")
_DIRECTIVE = re.compile(r"^\.\.\s+(\S+)::\s*(.*)$")
_PROSE_DIRECTIVES = {"note", "warning", "tip", "important", "seealso", "versionadded", "versionchanged", "deprecated"}
_PARAMETER = re.compile(r"^[*`]*[\w.,*\s/]{1,60}[`*]*\s*(\([^)]*\))?\s*:\s*")  # "name (type): what it is"
_NUMPY_PARAMETER = re.compile(r"^[\w, *]+ : ")  # "name : type", nothing else on the line
_ROLE = re.compile(r":[\w:]+:`~?([^`<]+?)(?:\s*<[^>]*>)?`")  # :class:`~torch.Tensor` → torch.Tensor
_LINK = re.compile(r"\[([^\]]+)\]\([^)]*\)|`([^`<]+?)\s*<[^>]*>`_+")
_WORD = re.compile(r"[A-Za-z]{2,}")
_MIN_WORDS = 5


def read_docstrings(workers: int = 1) -> Iterator[str]:
    """One document per module that has prose, its paragraphs as lines.

    The order of the modules is shuffled, always the same way, so that the first few megabytes are a fair sample.

    Args:
        workers: processes that read; the result does not depend on it.
    """
    files = _module_files()
    chunks = [files[start : start + _CHUNK] for start in range(0, len(files), _CHUNK)]
    if workers <= 1:
        yield from _without_copies(map(_read_modules, chunks))
        return
    # Ctrl-C reaches every process; this one ends the others.
    pool = ProcessPoolExecutor(workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    try:
        yield from _without_copies(pool.map(_read_modules, chunks))
    finally:
        pool.shutdown(cancel_futures=True)  # whoever has read enough does not wait for the rest


def _without_copies(chunks: Iterable[list[list[str]]]) -> Iterator[str]:
    docstrings: set[str] = set()
    copies: Counter[str] = Counter()
    for module in (module for chunk in chunks for module in chunk):
        lines: list[str] = []
        for docstring in module:
            if docstring not in docstrings:
                docstrings.add(docstring)
                paragraphs = docstring.split("\n")
                lines.extend(paragraph for paragraph in paragraphs if copies[paragraph] < MAX_COPIES)
                copies.update(paragraphs)
        if lines:
            yield "\n".join(lines)


def _module_files() -> list[str]:
    """Modules of the packages that are installed and of the standard library, in a fixed order on a given machine."""
    roots = [("", sysconfig.get_paths()["stdlib"])]
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            roots.append((package, next(iter(spec.submodule_search_locations))))
    files: list[tuple[str, str]] = []  # name within its package, which is what the order is made from; and path
    for package, root in roots:
        for folder, folders, names in os.walk(root):
            folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
            for name in names:
                if name.endswith(".py"):
                    path = os.path.join(folder, name)
                    files.append((os.path.join(package, os.path.relpath(path, root)), path))
    files.sort()
    random.Random(0).shuffle(files)
    return [path for _, path in files]


def _read_modules(paths: list[str]) -> list[list[str]]:
    return [_module_prose(path) for path in paths]


def _module_prose(path: str) -> list[str]:
    """Prose of each docstring of a module, its paragraphs joined by newlines."""
    try:
        with open(path, encoding="utf-8") as file:
            source = file.read()
    except (OSError, UnicodeDecodeError):
        return []
    return [text for docstring in find_docstrings(source) if (text := "\n".join(prose(docstring)))]


def find_docstrings(source: str) -> Iterator[str]:
    """The values of a Python source's docstrings, in order."""
    for match in _LITERAL.finditer(source):
        if match["triple"] and match["lead"] is not None and not set(match["prefix"].lower()) & {"b", "f"}:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # invalid escapes in other people's strings
                    yield ast.literal_eval(match["text"])
            except (SyntaxError, ValueError):
                continue


def prose(docstring: str) -> list[str]:
    """The paragraphs of a docstring that are sentences, each on one line.

    Left out: doctests, fenced and literal blocks, directives that hold code or formulas, headings and their underlines,
    "name : type" lines; of "name (type): description" the description stays.
    """
    paragraphs: list[str] = []
    current: list[str] = []
    skip_deeper_than: int | None = None  # inside a block that is indented more than this
    fence = False
    doctest = False

    def end_paragraph() -> None:
        if current:
            text = _plain(" ".join(current))
            if _is_prose(text):
                paragraphs.append(text)
            current.clear()

    for line in inspect.cleandoc(docstring).split("\n"):
        text = line.strip()
        indent = len(line) - len(line.lstrip())
        if text.startswith("```"):
            end_paragraph()
            fence = not fence
            continue
        if fence:
            continue
        if not text:
            end_paragraph()
            doctest = False
            continue
        if skip_deeper_than is not None:
            if indent > skip_deeper_than:
                continue
            skip_deeper_than = None
        if text.startswith((">>>", "...")) or doctest:
            end_paragraph()
            doctest = True
            continue
        directive = _DIRECTIVE.match(text)
        if directive:
            end_paragraph()
            if directive[1].lower() not in _PROSE_DIRECTIVES:
                skip_deeper_than = indent
            elif len(directive[2].split()) >= _MIN_WORDS:
                current.append(directive[2])
            continue
        if _UNDERLINE.match(text):
            current.clear()  # what stood above it was a heading
            continue
        item = _BULLET.match(text) or _starts_parameter(text)
        if item:
            end_paragraph()
            text = text[item.end() :] if not _NUMPY_PARAMETER.match(text) else ""
        if text.endswith("::"):
            skip_deeper_than = indent
            text = text[:-1]
        if text:
            current.append(text)
    end_paragraph()
    return paragraphs


def _starts_parameter(text: str) -> re.Match[str] | None:
    """A match of the name and type of a parameter at the start of a line; a sentence with a colon in it is none."""
    match = _PARAMETER.match(text)
    if match is None:
        return None
    name = match[0].split("(")[0].split(":")[0].strip(" `*")
    return match if len(name.split()) <= (3 if "," in name else 1) else None


def _plain(text: str) -> str:
    text = _ROLE.sub(r"\1", text)
    text = _LINK.sub(lambda match: match[1] or match[2], text)
    return " ".join(text.replace("`", "").replace("**", "").split())


def _is_prose(text: str) -> bool:
    words = _WORD.findall(text)
    letters = sum(map(len, words))
    return len(words) >= _MIN_WORDS and letters >= 0.6 * len(text.replace(" ", ""))
