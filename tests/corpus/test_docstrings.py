"""Extraction of prose from docstrings."""

from __future__ import annotations

from electra_composer.corpus import docstrings
from electra_composer.corpus.docstrings import extract_prose, find_docstrings, read_docstrings

SOURCE = '''
"""Module: what it is for, in one sentence."""
# """a comment that is no docstring"""
code = "a string with \\"\\"\\" in it"
template = """not a docstring but a template of code"""
class A:
    r"""Raw text with a \\backslash inside."""
    def f(self):
        \'\'\'Single quotes do as well, with "double" ones inside.\'\'\'
        f"""{self} is a formatted string, no docstring"""
THING_INPUTS_DOCSTRING = r"""
    Documentation that is assigned to a name.
"""
'''


def test_docstrings_of_a_source():
    assert [text.strip() for text in find_docstrings(SOURCE)] == [
        "Module: what it is for, in one sentence.",
        "Raw text with a \\backslash inside.",
        'Single quotes do as well, with "double" ones inside.',
        "Documentation that is assigned to a name.",
    ]


def test_prose_of_a_docstring():
    docstring = """Compute the thing that :class:`~torch.Tensor` users want.

    This paragraph is long enough and
    goes over two lines.

    Args:
        size (int): How many of the things there are to compute.
        x : array_like
            The values that the computation is to begin with.

    Example::

        >>> compute(3)
        this output of the code is left out too

    >>> another(1) + some(more) + code(here)
    and the output of that is also left out

    .. code-block:: python

        compute the thing in code that reads like text

    .. note:: Notes are prose as well, so they stay.

    References
    ----------
    ```python
    fenced = "code that is left out of the prose"
    ```
    - A list item with enough words to stay.

    x = a[i] + b[j] * 2 - 3 ** 4
    """
    assert extract_prose(docstring) == [
        "Compute the thing that torch.Tensor users want.",
        "This paragraph is long enough and goes over two lines.",
        "How many of the things there are to compute.",
        "The values that the computation is to begin with.",
        "Notes are prose as well, so they stay.",
        "A list item with enough words to stay.",
    ]


def test_docstrings_are_the_same_from_any_number_of_workers(monkeypatch):
    files = docstrings._module_files()
    assert files == docstrings._module_files()
    monkeypatch.setattr(docstrings, "_module_files", lambda: files[:150])
    one = list(read_docstrings(1))
    assert one == list(read_docstrings(2))
    assert sum(map(len, one)) > 200_000
    paragraphs = [paragraph for document in one for paragraph in document.split("\n")]
    assert max(map(paragraphs.count, set(paragraphs))) <= docstrings.MAX_COPIES
