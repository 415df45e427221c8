"""Triton kernels of layers and embeddings are compiled for GPUs that are not there."""

from __future__ import annotations

from pathlib import Path

import pytest

NORM = {"HAS_BIAS": True, "HAS_RESIDUAL": True, "DROPOUT": True, "HAS_STREAM": True, "HAS_PRODUCT": True}
BLOCK = {"ROWS": 8, "BLOCK": 256}


@pytest.mark.parametrize(
    ("module", "name", "constants"),
    [
        ("layers", "add_norm", {**NORM, **BLOCK}),
        ("layers", "add_norm_gradient", {**NORM, **BLOCK}),
        ("layers", "sum_partials", {"PARTS": 64, "BLOCK": 32}),
        ("layers", "gelu", BLOCK),
        ("layers", "gelu_gradient", BLOCK),
        ("embeddings", "embed", {**NORM, **BLOCK}),
        ("embeddings", "embed_gradient", {**NORM, **BLOCK}),
        ("embeddings", "sum_by_id", {"TOKENS": 32, "ENTRIES": 64, "BLOCK": 64}),
    ],
)
def test_kernels_compile_for_hopper(
    module: str, name: str, constants: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter accepts more than the compiler; compiling to machine code needs no GPU."""
    pytest.importorskip("triton")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from electra_composer.model.kernels import embeddings_triton_kernels, layers_triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr({"layers": layers_triton_kernels, "embeddings": embeddings_triton_kernels}[module], name)
    integers = ("count", "width", "rows_each", "threshold", "programs", "num_positions", "entries", "tokens_each")
    types = {"eps": "fp32", "scale": "fp32", **dict.fromkeys(integers, "i32")}
    ids = ("seed", "word_ids", "position_ids", "type_ids")
    half = {"x", "bias", "residual", "stream", "product", "out", "third"}
    half |= {"of_stream", "of_product", "of_x", "of_residual", "of_out"}

    def type_of(argument: str) -> str:
        if argument in constants:
            return "constexpr"
        return types.get(argument) or ("*i64" if argument in ids else "*bf16" if argument in half else "*fp32")

    names = function.arg_names
    source = ASTSource(
        fn=function,
        signature={argument: type_of(argument) for argument in names},
        constexprs={(names.index(argument),): value for argument, value in constants.items() if argument in names},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert len(compiled.asm["cubin"]) > 0
