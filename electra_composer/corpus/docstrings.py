"""Extract English prose that every machine has: the docstrings of the installed Python packages.

Files are read as text, never imported. Each module is a document, each paragraph a line. Code, doctests, tables and
headings are left out, and so are repeated paragraphs: many docstrings are copies of each other.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import math
import os
import random
import re
import signal
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor

# In addition to the standard library; packages that are not installed are skipped.
PACKAGES = (
    *("torch", "transformers", "numpy", "pandas", "sympy", "networkx"),
    *("torchvision", "torchmetrics", "composer", "streaming", "datasets", "pyarrow", "huggingface_hub"),
    *("matplotlib", "tensorboard", "wandb"),
)
MAX_COPIES = 20  # of one paragraph; transformers has hundreds of some
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3"}
_CHUNK = 32  # modules per task of a worker

# Python comments and string literals. Docstrings are the triple-quoted literals that begin a line (as the documentation
# of torch's C functions does too), or that are assigned to a name such as LLAMA_INPUTS_DOCSTRING. This takes a fifth of
# the time of parsing to a syntax tree.
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
    """Yield one document per module that has prose, its paragraphs as lines.

    Modules are shuffled with a fixed seed, so that the first few megabytes are a representative sample.

    Args:
        workers: number of reading processes; the result does not depend on it.
    """
    files = _module_files()
    chunks = [files[start : start + _CHUNK] for start in range(0, len(files), _CHUNK)]
    if workers <= 1:
        yield from _without_copies(map(_read_modules, chunks))
        return
    # Ctrl-C reaches every process; this one ends the workers.
    pool = ProcessPoolExecutor(workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    try:
        yield from _without_copies(pool.map(_read_modules, chunks))
    finally:
        pool.shutdown(cancel_futures=True)  # a caller that has read enough does not wait for the rest


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
    """List the modules of the installed packages and the standard library, in a reproducible random order."""
    roots = [("", sysconfig.get_paths()["stdlib"])]
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            roots.append((package, next(iter(spec.submodule_search_locations))))
    files: list[tuple[str, str]] = []  # name within the package, which determines the order; path
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
    """Return the prose of each docstring of a module, its paragraphs joined by newlines."""
    try:
        with open(path, encoding="utf-8") as file:
            source = file.read()
    except (OSError, UnicodeDecodeError):
        return []
    return [text for docstring in find_docstrings(source) if (text := "\n".join(extract_prose(docstring)))]


def find_docstrings(source: str) -> Iterator[str]:
    """Yield the docstrings of Python source code, in order."""
    for match in _LITERAL.finditer(source):
        if match["triple"] and match["lead"] is not None and not set(match["prefix"].lower()) & {"b", "f"}:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # invalid escapes
                    yield ast.literal_eval(match["text"])
            except (SyntaxError, ValueError):
                continue


def extract_prose(docstring: str) -> list[str]:
    """Return the paragraphs of a docstring that are sentences, each on one line.

    Left out: doctests, fenced and literal blocks, directives with code or formulas, headings and their underlines,
    "name : type" lines. Of "name (type): description" the description stays.
    """
    paragraphs: list[str] = []
    current: list[str] = []
    for text in (*_text_lines(docstring), ""):
        if text:
            current.append(text)
            continue
        if text is not None:
            paragraphs.append(_without_markup(" ".join(current)))
        current.clear()
    return list(filter(_is_prose, paragraphs))


def _text_lines(docstring: str) -> Iterator[str | None]:
    """Yield the lines of a docstring without code; "" ends a paragraph, None discards it as a heading."""
    skip_deeper_than = math.inf  # indentation of a block that is left out
    fence = doctest = False
    for line in inspect.cleandoc(docstring).split("\n"):
        text = line.strip()
        indent = len(line) - len(line.lstrip())
        if text.startswith("```"):
            fence = not fence
            yield ""
            continue
        if fence:
            continue
        if not text:
            doctest = False
            yield ""
            continue
        if indent > skip_deeper_than:
            continue
        skip_deeper_than = math.inf
        if doctest or text.startswith((">>>", "...")):
            doctest = True
            yield ""
        elif directive := _DIRECTIVE.match(text):
            yield ""
            if directive[1].lower() not in _PROSE_DIRECTIVES:
                skip_deeper_than = indent
            elif len(directive[2].split()) >= _MIN_WORDS:
                yield directive[2]
        elif _UNDERLINE.match(text):
            yield None
        else:
            if item := _BULLET.match(text) or _starts_parameter(text):
                yield ""
                text = text[item.end() :] if not _NUMPY_PARAMETER.match(text) else ""
            if text.endswith("::"):
                skip_deeper_than = indent
                text = text[:-1]
            if text:
                yield text


def _starts_parameter(text: str) -> re.Match[str] | None:
    """Match the name and type of a parameter at the start of a line, but not a sentence with a colon in it."""
    match = _PARAMETER.match(text)
    if match is None:
        return None
    name = match[0].split("(")[0].split(":")[0].strip(" `*")
    return match if len(name.split()) <= (3 if "," in name else 1) else None


def _without_markup(text: str) -> str:
    text = _ROLE.sub(r"\1", text)
    text = _LINK.sub(lambda match: match[1] or match[2], text)
    return " ".join(text.replace("`", "").replace("**", "").split())


def _is_prose(text: str) -> bool:
    words = _WORD.findall(text)
    letters = sum(map(len, words))
    return len(words) >= _MIN_WORDS and letters >= 0.6 * len(text.replace(" ", ""))
