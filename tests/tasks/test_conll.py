"""CoNLL files with any number of columns, and CoNLL-U."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from electra_composer.errors import UserError
from electra_composer.tasks.conll import looks_like_conll, read_conll

common = settings(derandomize=True, database=None, max_examples=60, deadline=None)
words = st.text(st.characters(exclude_categories=("Cs", "Cc", "Zs")), min_size=1, max_size=5) | st.sampled_from(
    ["#", "-", '"', "a\u00a0b", "\u2028", "😀"]
)

CONLL2003 = """-DOCSTART- -X- -X- O

EU NNP I-NP B-ORG
rejects  VBZ I-VP O

# NN I-NP O
1 CD I-NP O
-DOCSTART- -X- -X- O
\t
Peter NNP I-NP B-PER"""

CONLLU = """# newdoc id = a
# sent_id = 1
# text = vámonos al mar
1-2\tvámonos\t_\t_\t_\t_\t_\t_\t_\t_
1\tvamos\tir\tVERB\t_\t_\t0\troot\t_\t_
2\tnos\tnosotros\tPRON\tX\tCase=Acc\t1\tobj\t_\t_
2.1\tx\t_\t_\t_\t_\t_\t_\t_\t_
3\tmar\tmar\tNOUN\t_\t_\t1\tobl\t_\tSpaceAfter=No

# newdoc
# a comment
1\tSí\tsí\tINTJ\t_\t_\t0\troot\t_\t_
"""


def write(folder: Path, name: str, content: str) -> str:
    (folder / name).write_text(content, encoding="utf-8")
    return str(folder / name)


def test_conll2003(tmp_path: Path) -> None:
    path = write(tmp_path, "eng.train", CONLL2003)
    rows = list(read_conll(path))
    assert [row.where for row in rows] == [f"{path}:3", f"{path}:6", f"{path}:10"]
    assert rows[0].values == {
        "tokens": ["EU", "rejects"],
        "tags": ["B-ORG", "O"],
        "0": ["EU", "rejects"],
        "1": ["NNP", "VBZ"],
        "2": ["I-NP", "I-VP"],
        "3": ["B-ORG", "O"],
        "document": 0,
    }
    assert [row.values["tokens"] for row in rows[1:]] == [["#", "1"], ["Peter"]]
    assert [row.values["document"] for row in rows] == [0, 0, 1]
    assert [row.values["document"] for row in read_conll(path, 5)] == [5, 5, 6]


def test_conllu(tmp_path: Path) -> None:
    for name in ("es.conllu", "es.txt"):  # the content tells as well
        path = write(tmp_path, name, CONLLU)
        first, second = read_conll(path)
        assert first.values["tokens"] == first.values["form"] == ["vamos", "nos", "mar"]
        assert first.values["tags"] == first.values["upos"] == first.values["3"] == ["VERB", "PRON", "NOUN"]
        assert first.values["head"] == ["0", "1", "1"]
        assert [first.values[name][1] for name in ("lemma", "xpos", "feats", "deprel")] == [
            "nosotros",
            "X",
            "Case=Acc",
            "obj",
        ]
        assert (first.values["document"], second.values["document"]) == (0, 1)
        assert second.values["tokens"] == ["Sí"]
        assert second.where == f"{path}:12"


def test_comments_of_multiconer_and_tokens_alone(tmp_path: Path) -> None:
    path = write(tmp_path, "a.conll", "# id 12 \tdomain=train\na _ _ O\nb _ _ B-X\n\n# id 13\tdomain=train\nc _ _ O\n")
    assert [row.values["tokens"] for row in read_conll(path)] == [["a", "b"], ["c"]]
    path = write(tmp_path, "tokens.conll", "a\nb\n\nc\n")
    rows = list(read_conll(path))
    assert rows[0].values == {"tokens": ["a", "b"], "0": ["a", "b"], "document": 0}
    assert list(read_conll(write(tmp_path, "empty.conll", "\n\n"))) == []


@common
@given(
    sentences=st.lists(st.lists(st.tuples(words, st.sampled_from(["O", "B-X"])), min_size=1, max_size=4), max_size=4),
    separator=st.sampled_from([" ", "\t", "  "]),
    line_end=st.sampled_from(["\n", "\r\n"]),
)
def test_sentences_are_read_as_written(sentences: list[list[tuple[str, str]]], separator: str, line_end: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.bio"
        lines = [line for sentence in sentences for line in (*map(separator.join, sentence), "")]
        path.write_text(line_end.join(lines), encoding="utf-8", newline="")
        read = [list(zip(row.values["tokens"], row.values["tags"], strict=True)) for row in read_conll(str(path))]
    assert read == sentences


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.conll", "\na O\nb\n", r"a\.conll:3: 1 column; expected 2 as in line 2: a token and its tags, .*correct"),
        ("a.conll", "a O\nb c O\n", r"a\.conll:2: 3 columns; expected 2 as in line 1"),
        ("a.conllu", "# a comment\n1\ta\n", r"a\.conllu:2: 2 columns; expected 10 by CoNLL-U"),
    ],
)
def test_a_line_with_another_number_of_columns(name: str, content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        list(read_conll(write(tmp_path, name, content)))


@pytest.mark.parametrize(
    ("text", "is_conll"),
    [
        (CONLL2003 + "\n", True),
        (CONLLU, True),
        ("a\tO\n\t\nb\tO\n", True),
        ("a O\nb O\n", False),  # no blank line
        ("a\n\nb\n", False),  # one column
        ("A text of words.\n\nAnother one.\n", False),
        ("", False),
    ],
)
def test_recognition_by_content(text: str, is_conll: bool) -> None:
    assert looks_like_conll(text) == is_conll
