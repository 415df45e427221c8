"""Every field of `meta.json` and of an index, wrong in every way: one line that names the field and says what to do."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_shards import LENGTH, make_tokenizer, write_shards

from electra_composer.batches.checks import check_split
from electra_composer.batches.shards import read_meta
from electra_composer.config import ShardsConfig
from electra_composer.errors import UserError
from electra_composer.storage.shard_folder import CONVERTER, Shard, ShardFile, SourceCounts, SplitCounts

WRONG = {  # by type of the good value
    int: ["x", None, -1, 1.5, True, [], {}, 10**30],
    str: [None, -1, 1.5, True, [], {}],
    dict: ["x", None, -1, []],
    list: ["x", None, -1, {}],
    type(None): ["x", -1, [], {}],
}
COUNTS = {*(field.name for field in fields(SplitCounts)), *(field.name for field in fields(SourceCounts))}
OPTIONAL = {*COUNTS, "files", "sources", "unk", 0, "train", "val"}  # may be missing


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    return Path(write_shards(folder / "out", make_tokenizer(folder), train=3, val=1))


def places(value, path=()):
    """Yield path and value of everything in a JSON object, inner values included; lists by their first element."""
    if path:
        yield path, value
    inner = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, part in inner:
        yield from places(part, (*path, key))


def is_read(name, path):
    """Whether this program, and not only Streaming, reads a field."""
    if name == "meta.json":
        return path[0] != "conversion" or len(path) == 1
    known = {field.name for schema in (Shard, ShardFile) for field in fields(schema)}
    return (
        path[0] == "shards"
        and all(key in known for key in path[1:] if isinstance(key, str))
        and path[2:3]
        not in (
            ("column_sizes",),
            ("hashes",),
        )
        and "xxh64" not in path
    )


def change(content, path, new):
    """Return a copy with one value replaced, or removed if `new` is the class `object`."""
    content = json.loads(json.dumps(content))
    *parents, last = path
    inner = content
    for key in parents:
        inner = inner[key]
    if new is object:
        del inner[last]
    else:
        inner[last] = new
    return content


def read(shards):
    meta = read_meta(str(shards))
    check_split(ShardsConfig(str(shards), LENGTH), meta, "train")
    return meta


def damage(shards, name, content):
    """Read the shards with another content of a file; return the error message."""
    path = shards / name
    before = path.read_text()
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    try:
        with pytest.raises(UserError) as caught:
            read(shards)
    finally:
        path.write_text(before)
    message = str(caught.value)
    assert str(path.parent) in message
    assert "\n" not in message
    assert len(message) < 500
    return message


@pytest.mark.parametrize("name", ["meta.json", "train/index.json"])
def test_every_field_of_the_wrong_type_or_missing(shards, name):
    read(shards)
    content = json.loads((shards / name).read_text())
    tried = 0
    for path, value in places(content):
        if not is_read(name, path):
            continue
        wrong_values = [*WRONG[type(value)], *([] if path[-1] in OPTIONAL else [object])]
        for wrong in wrong_values:
            if (path, wrong) == (("seed",), -1):
                continue
            message = damage(shards, name, change(content, path, wrong))
            assert CONVERTER in message
            field = path[-2] if isinstance(path[-1], int) else path[-1]
            assert str(field) in message or path[-1] == "raw_data", (path, wrong, message)
            tried += 1
    assert tried > 60


def test_the_message_names_the_field_and_its_range(shards):
    content = json.loads((shards / "meta.json").read_text())
    message = damage(shards, "meta.json", {**content, "max_seq_length": "x"})
    assert "meta.json is damaged or not the metadata of shards" in message
    assert "max_seq_length is 'x'; expected an integer from 5 to 65,535" in message
    assert "data.max_seq_length=" not in message
    for wrong, words in (
        ({"unknown": 1}, "unknown is unknown"),
        ({"packing": "loose"}, "packing is 'loose'; expected packed or one"),
        ({"tokenizer": {**content["tokenizer"], "special_ids": {"pad": 0}}}, "special_ids has no 'cls'"),
        ({"tokenizer": {**content["tokenizer"], "vocab_size": 4}}, "special_ids.mask is 4; expected less than"),
    ):
        assert words in damage(shards, "meta.json", {**content, **wrong})
    index = json.loads((shards / "train/index.json").read_text())
    index["shards"][0]["raw_data"] = None
    assert "shards.0 has neither raw_data nor zip_data" in damage(shards, "train/index.json", index)


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["shards", "format_version", "tokenizer"]), inner),
).map(json.dumps)


@settings(
    derandomize=True,
    database=None,
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    name=st.sampled_from(["meta.json", "train/index.json"]),
    content=st.one_of(
        st.text(max_size=20),
        st.sampled_from(["null", "[]", "{}", "[" * 100_000, '{"shards": 3}', '{"shards": [3]}', "1" * 5000, "NaN"]),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.text(max_size=3),
            lambda inner: (
                st.lists(inner) | st.dictionaries(st.sampled_from(["shards", "format_version", "tokenizer"]), inner)
            ),
        ).map(json.dumps),
    ),
)
def test_any_other_content(shards, name, content):
    if (name, content) != ("train/index.json", '{"shards": []}'):
        damage(shards, name, content)
