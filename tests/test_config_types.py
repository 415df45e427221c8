"""A value of a wrong type, for every key of the schema: the message says what is expected, in the words of the YAML."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from complete_config import KEYS, load, load_kind, override

from electra_composer.errors import UserError

TYPED = {name: pair for name, pair in KEYS.items() if pair[1].kind is not Any}
ONCE = list({key.path: name for name, (_, key) in reversed(TYPED.items())}.values())  # shared keys in one schema
FOREIGN = re.compile(r"Union|Literal|Optional|Config\b|Integer|Float|NoneType|\bbool\b|\bstr\b|type")


@pytest.mark.parametrize("name", ONCE)
def test_every_key(name: str, tmp_path: Path) -> None:
    kind, key = TYPED[name]
    wrong = {"{a: 1}": "{'a': 1}", "[x]": "['x']"} if not key.path.endswith("[]") else {}
    if not key.optional and key.path != "data.path":  # null is the same as no path
        wrong["null"] = "null"
    if str not in key.kinds:
        wrong["always"] = "'always'"
    for text, shown in wrong.items():
        with pytest.raises(UserError) as caught:
            load_kind(tmp_path, kind, override(key, text))
        path = key.path.replace("<name>", "a").replace("[]", "[0]")
        assert str(caught.value) == f"the command line: {path} is {shown}; expected {key.expected()}"
        assert not FOREIGN.search(key.expected())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("trainer.cuda_graph=always", "trainer.cuda_graph is 'always'; expected true, false or auto"),
        ("trainer.compile=fast", "trainer.compile is 'fast'; expected true, false, auto, default, reduce-overhead, "),
        ("trainer.precision=bf16", "trainer.precision is 'bf16'; expected fp32, amp_bf16 or amp_fp16"),
        ("trainer.device=tpu", "trainer.device is 'tpu'; expected cpu, gpu or null"),
        ("trainer.device_train_microbatch_size=2.5", "is 2.5; expected an integer from 1 to 1,000,000, auto, or null"),
        ("data.num_workers=true", "data.num_workers is true; expected an integer from 0 to 256, or auto"),
        ("seed=true", "seed is true; expected an integer"),
        ("seed=${run_name}", "seed is '${run_name}'; expected an integer"),
        ("optimizer.lr=true", "optimizer.lr is true; expected a number"),
        ("optimizer.lr.x=1", "optimizer.lr is {'x': 1}; expected a number"),
        ("optimizer.betas=0.9", "optimizer.betas is 0.9; expected a list of 2 values"),
        ("optimizer.betas[0]=0.9", "optimizer.betas is {'0': 0.9}; expected a list of 2 values"),
        ("checkpoints.milestones=[0.1,x]", "checkpoints.milestones[1] is 'x'; expected a number in (0, 1]"),
        ("data.eval_streams=val", "data.eval_streams is 'val'; expected a list or null"),
        ("data.streams=[a]", "data.streams is ['a']; expected keys and values"),
        ("data.streams.a=3", "data.streams.a is 3; expected keys and values"),
        ("model=3", "model is 3; expected keys and values"),
        ("model=null", "model is null; expected keys and values"),
        ("optimizer=[1]", "optimizer is [1]; expected keys and values"),
        ("callbacks=3", "callbacks is 3; expected keys and values"),
        ("trainer={fsdp: true}", "trainer.fsdp is true; expected keys and values or null"),
        ("trainer=${run_name}", "str is not a subclass of TrainerConfig"),  # OmegaConf's, without a key
        ("data.streams={a.b: {repeat: x}}", "data.streams.a.b.repeat: Value 'x' of type"),  # a dot in a name
    ],
)
def test_messages(tmp_path: Path, words: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        load(tmp_path, words)
