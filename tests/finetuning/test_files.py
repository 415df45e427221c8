"""Reading GLUE's TSV files: the layout and peculiarities of every task, and errors of malformed files."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import pytest
from tiny import SHARED_DATA

from electra_composer.errors import UserError
from electra_composer.finetuning.files import Example, find_file, read_examples
from electra_composer.finetuning.tasks import TASKS

GLUE_DATA = SHARED_DATA / "glue_data"
real_data = pytest.mark.skipif(not GLUE_DATA.is_dir(), reason="needs the GLUE files in ../shared/data")


def write(folder: Path, name: str, text: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")


def test_cola_train_and_dev_have_no_header_and_test_has_one(tmp_path: Path) -> None:
    write(tmp_path, "CoLA/train.tsv", "gj04\t1\t\tA b c.\nks08\t0\t*\tC b a.\n")
    write(tmp_path, "CoLA/test.tsv", "index\tsentence\n0\tA b.\n1\tB a.\n")
    cola = TASKS["cola"]
    assert read_examples(cola, "train", str(tmp_path)) == [Example(("A b c.",), 1), Example(("C b a.",), 0)]
    assert read_examples(cola, "test", str(tmp_path)) == [Example(("A b.",), None, 0), Example(("B a.",), None, 1)]


def test_byte_order_mark_bare_quotes_trailing_blanks_and_windows_line_ends(tmp_path: Path) -> None:
    header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String"
    write(tmp_path, "MRPC/train.tsv", f'{header}\r\n1\t1\t2\t" a b\tHe said " c\r\n0\t3\t4\ta\tb\r\n')
    write(tmp_path, "SST-2/train.tsv", 'sentence\tlabel\na "b c \t0\n')
    pairs = [Example(('" a b', 'He said " c'), 1), Example(("a", "b"), 0)]
    assert read_examples(TASKS["mrpc"], "train", str(tmp_path)) == pairs
    assert read_examples(TASKS["sst2"], "train", str(tmp_path)) == [Example(('a "b c ',), 0)]


def test_stsb_columns_are_found_by_name(tmp_path: Path) -> None:
    write(tmp_path, "STS-B/dev.tsv", "index\tscore\tsentence2\tsentence1\n0\t2.500\tb\ta\n")
    assert read_examples(TASKS["stsb"], "dev", str(tmp_path)) == [Example(("a", "b"), 2.5)]


@pytest.mark.parametrize(
    ("task", "text", "message"),
    [
        ("sst2", "sentence\tsentiment\na\t0\n", r"SST-2/train.tsv:1: no column 'label' .*'sentence', 'sentiment'"),
        ("sst2", "sentence\tlabel\na\t0\nb\n", r"SST-2/train.tsv:3: 1 columns; expected 2 \(sentence, label\)"),
        ("sst2", "sentence\tlabel\na\tb\t0\n", r"SST-2/train.tsv:2: 3 columns; expected 2"),
        ("sst2", "sentence\tlabel\na\tpositive\n", r"SST-2/train.tsv:2: label 'positive'; expected one of 0, 1"),
        ("sst2", "sentence\tlabel\n", r"no examples"),
        ("sst2", "", r"SST-2/train.tsv: the file is empty"),
        ("cola", "sentence\tlabel\na\t0\n", r"CoLA/train.tsv:1: 2 columns; expected 4, without a header"),
        ("stsb", "sentence1\tsentence2\tscore\na\tb\thigh\n", r"STS-B/train.tsv:2: label 'high'; expected a number"),
        (
            "stsb",
            "sentence1\tsentence2\tscore\na\tb\t5.5\n",
            r"STS-B/train.tsv:2: score 5.5 is out of range; expected 0 to 5",
        ),
        ("stsb", "sentence1\tsentence2\tscore\na\tb\tnan\n", r"STS-B/train.tsv:2: score nan is out of range"),
    ],
)
def test_faults_name_file_line_and_expectation(tmp_path: Path, task: str, text: str, message: str) -> None:
    write(tmp_path, f"{TASKS[task].folder}/train.tsv", text)
    with pytest.raises(UserError, match=message):
        read_examples(TASKS[task], "train", str(tmp_path))


def test_missing_folder_file_and_encoding(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        read_examples(TASKS["sst2"], "train", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"SST-2/train.tsv: no such file"):
        read_examples(TASKS["sst2"], "train", str(tmp_path))
    write(tmp_path, "SST-2/train.tsv", "")
    (tmp_path / "SST-2/train.tsv").write_bytes(b"sentence\tlabel\n\xff\xfe\t0\n")
    with pytest.raises(UserError, match=r"SST-2/train.tsv: .*expected UTF-8"):
        read_examples(TASKS["sst2"], "train", str(tmp_path))


PARSES = ["sentence1_binary_parse", "sentence2_binary_parse", "sentence1_parse", "sentence2_parse"]
MNLI_COLUMNS = ["index", "promptID", "pairID", "genre", *PARSES, "sentence1", "sentence2"]


def mnli_file(labels: list[str], *rows: tuple[str, ...]) -> str:
    """Return an MNLI file: parses between the used columns, `labels` at the end."""
    lines = ["\t".join([*MNLI_COLUMNS, *labels])]
    for index, (first, second, *values) in enumerate(rows):
        parses = ["( a b )", "( c )", "(ROOT (S a b))", "(ROOT (NP c))"]
        lines.append("\t".join([str(index), "31193", "31193n", "government", *parses, first, second, *values]))
    return "\n".join(lines) + "\n"


def test_mnli_has_its_label_last_of_many_columns_and_two_dev_and_test_files(tmp_path: Path) -> None:
    labels = ["label1", "label2", "label3", "label4", "label5", "gold_label"]
    train = mnli_file(["label1", "gold_label"], ("a", "b", "neutral", "neutral"), ("c", "d", "neutral", "entailment"))
    dev = mnli_file(labels, ("a", "b", "neutral", *["entailment"] * 2, *["contradiction"] * 3))
    write(tmp_path, "MNLI/train.tsv", train)
    write(tmp_path, "MNLI/dev_matched.tsv", dev)
    write(tmp_path, "MNLI/dev_mismatched.tsv", dev.replace("\ta\tb\t", "\tm \"\t'n\t"))
    write(tmp_path, "MNLI/test_matched.tsv", mnli_file([], ("a", "b"), ("c", "d")))
    write(tmp_path, "MNLI/test_mismatched.tsv", mnli_file([], ("e", "f")))
    assert [len(text.split("\n")[0].split("\t")) for text in (train, dev)] == [12, 16]  # as in the download
    read = {split: read_examples(TASKS["mnli"], split, str(tmp_path)) for split in TASKS["mnli"].splits}
    assert read == {
        "train": [Example(("a", "b"), 1), Example(("c", "d"), 0)],
        "dev": [Example(("a", "b"), 2)],
        "dev_mm": [Example(('m "', "'n"), 2)],
        "test": [Example(("a", "b"), None, 0), Example(("c", "d"), None, 1)],
        "test_mm": [Example(("e", "f"), None, 0)],
    }


def test_qqp_leaves_out_and_counts_rows_that_a_line_end_broke(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
    whole = [f'{i}\t1\t2\tWhy "a{i}?\tWhy b?\t{i % 2}\n' for i in range(300)]
    broken = ["300\t5\t6\tWhat is\n", "a line end?\tWhy?\t1\n"]
    empty = "301\t1\t2\t\tWhy b?\t0\n"  # an empty question is not a broken row
    write(tmp_path, "QQP/train.tsv", header + "".join([*whole[:100], *broken, *whole[100:], empty]))
    write(tmp_path, "QQP/test.tsv", "id\tquestion1\tquestion2\n0\ta\tb\n1\tc\td\n")
    with caplog.at_level(logging.WARNING):
        train = read_examples(TASKS["qqp"], "train", str(tmp_path))
    assert "skipped 2 of 303 rows: they have fewer than 6 columns" in caplog.text
    assert len(train) == 301
    assert train[100] == Example(('Why "a100?', "Why b?"), 0)
    assert train[300] == Example(("", "Why b?"), 0)
    assert read_examples(TASKS["qqp"], "test", str(tmp_path))[1] == Example(("c", "d"), None, 1)
    write(tmp_path, "QQP/test.tsv", "id\tquestion1\tquestion2\n0\ta\tb\n1\tc\n")
    # Not skipped: every test example needs a prediction.
    with pytest.raises(UserError, match=r"QQP/test.tsv:3: 2 columns; expected 3"):
        read_examples(TASKS["qqp"], "test", str(tmp_path))
    write(tmp_path, "QQP/dev.tsv", header + "".join(whole[:20] + broken))
    with pytest.raises(UserError, match=r"2 of 22 rows have fewer than 6 columns; .*download the file again"):
        read_examples(TASKS["qqp"], "dev", str(tmp_path))


@pytest.mark.parametrize(
    ("name", "columns", "labels"),
    [
        ("qnli", ("question", "sentence"), ("entailment", "not_entailment")),
        ("rte", ("sentence1", "sentence2"), ("entailment", "not_entailment")),
        ("wnli", ("sentence1", "sentence2"), ("0", "1")),
    ],
)
def test_qnli_rte_and_wnli_have_an_index_two_sentences_and_a_label(
    tmp_path: Path, name: str, columns: tuple[str, str], labels: tuple[str, str]
) -> None:
    task = TASKS[name]
    header = "\t".join(["index", *columns])
    lines = [f"{header}\tlabel", f"0\ta\tb\t{labels[1]}", f"1\tc\td\t{labels[0]}", ""]
    write(tmp_path, f"{task.folder}/train.tsv", "\n".join(lines))
    write(tmp_path, f"{task.folder}/test.tsv", f"{header}\n0\ta\tb\n1\tc\td\n")
    assert read_examples(task, "train", str(tmp_path)) == [Example(("a", "b"), 1), Example(("c", "d"), 0)]
    assert read_examples(task, "test", str(tmp_path))[1] == Example(("c", "d"), None, 1)


SMALL_AX = "index\tsentence1\tsentence2\n0\ta\tb\n1\tc\td\n"
FULL_AX = (
    "Lexical Semantics\tPredicate-Argument Structure\tLogic\tKnowledge\tDomain\tPremise\tHypothesis\tLabel\n"
    "\t\tNegation\t\tArtificial\ta\tb\tcontradiction\n\t\tNegation\t\tArtificial\tc\td\tneutral\n"
)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("AX/diagnostic.tsv", SMALL_AX),
        ("diagnostic/diagnostic.tsv", SMALL_AX),  # official download
        ("MNLI/diagnostic.tsv", SMALL_AX),  # google-research/electra
        ("AX/AX.tsv", SMALL_AX),
        ("AX/diagnostic-full.tsv", FULL_AX),
    ],
)
def test_diagnostics_wherever_they_are(tmp_path: Path, file: str, text: str) -> None:
    write(tmp_path, file, text)
    expected = [Example(("a", "b"), None, 0), Example(("c", "d"), None, 1)]
    assert read_examples(TASKS["ax"], "test", str(tmp_path)) == expected
    with pytest.raises(UserError, match=r"AX has no split 'train'; it has test"):
        read_examples(TASKS["ax"], "train", str(tmp_path))


def test_folders_of_google_and_the_official_one_before_them(tmp_path: Path) -> None:
    write(tmp_path, "sts/dev.tsv", "sentence1\tsentence2\tscore\na\tb\t1.0\n")
    write(tmp_path, "cola/dev.tsv", "gj04\t1\t\tA b.\n")
    assert read_examples(TASKS["stsb"], "dev", str(tmp_path)) == [Example(("a", "b"), 1.0)]
    assert read_examples(TASKS["cola"], "dev", str(tmp_path)) == [Example(("A b.",), 1)]
    write(tmp_path, "STS-B/dev.tsv", "sentence1\tsentence2\tscore\na\tb\t2.0\n")
    assert find_file(TASKS["stsb"], "dev", str(tmp_path))[0] == str(tmp_path / "STS-B" / "dev.tsv")
    with pytest.raises(UserError, match=r"AX/diagnostic.tsv: no such file; .*\(or diagnostic/diagnostic.tsv, MNLI/"):
        find_file(TASKS["ax"], "test", str(tmp_path))


@pytest.mark.parametrize(("text", "message"), [("index\tsentence\nx\ta\n", "index 'x'"), ("sentence\na\n", "'index'")])
def test_an_index_that_the_server_would_not_know(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path, "SST-2/test.tsv", text)
    with pytest.raises(UserError, match=message):
        read_examples(TASKS["sst2"], "test", str(tmp_path))


@real_data
@pytest.mark.parametrize(
    ("name", "sizes", "labels"),
    [  # counted in the official files with cut, sort and uniq
        ("cola", (8551, 1043, 1063), {1: 6023, 0: 2528}),
        ("sst2", (67349, 872, 1821), {1: 37569, 0: 29780}),
        ("mrpc", (3667, 408, 1725), {1: 2473, 0: 1194}),  # this download lacks one of 3668 rows
        ("stsb", (5749, 1500, 1379), None),
    ],
)
def test_sizes_and_labels_of_the_real_files(name: str, sizes: tuple[int, ...], labels: dict[int, int] | None) -> None:
    task = TASKS[name]
    splits = {split: read_examples(task, split, str(GLUE_DATA)) for split in ("train", "dev", "test")}
    counts = tuple(len(examples) for examples in splits.values())
    assert counts == sizes
    if labels is not None:
        assert Counter(example.label for example in splits["train"]) == labels
    else:
        scores = [example.label for example in splits["train"] if example.label is not None]
        assert (min(scores), max(scores)) == (0.0, 5.0)
        assert sum(scores) / len(scores) == pytest.approx(2.70, abs=0.01)
    assert all(len(example.texts) == len(task.hub_texts) for example in splits["dev"])
    assert [example.server_index for example in splits["test"]] == list(range(sizes[2]))
    assert all(text.strip() for examples in splits.values() for example in examples for text in example.texts)


@real_data
def test_real_sentences_keep_their_quotation_marks() -> None:
    examples = read_examples(TASKS["mrpc"], "train", str(GLUE_DATA))
    assert examples[0].texts[0].startswith('Amrozi accused his brother , whom he called " the witness "')
