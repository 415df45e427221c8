"""Names of formats and streams, which command lines offer before the readers are imported."""

AUTO = "auto"
FORMATS = ("csv", "tsv", "jsonl", "json", "parquet", "conll", "squad", "mrqa")
TEXT = "text"  # of an input to predict: a text per line
STDIN = STDOUT = "-"
