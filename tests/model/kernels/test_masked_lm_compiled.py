"""Triton kernels of the masked-LM head are compiled for a GPU that is not there."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("name", "dtype", "constants"),
    [
        ("tile_statistics", "bf16", {"OWN_DRAW": False, "DISALLOW": False, "GUMBEL": False}),
        ("tile_statistics", "fp32", {"OWN_DRAW": True, "DISALLOW": True, "GUMBEL": False}),
        ("tile_statistics", "bf16", {"OWN_DRAW": True, "DISALLOW": True, "GUMBEL": True}),
        ("combine_tiles", "bf16", {"DISALLOW": True, "GUMBEL": False}),
        ("combine_tiles", "fp32", {"DISALLOW": False, "GUMBEL": True}),
        ("logits_gradient", "bf16", {}),
        ("logits_gradient", "fp32", {}),
    ],
)
def test_kernels_compile_for_hopper(
    name: str, dtype: str, constants: dict[str, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter accepts more than the compiler; compiling to machine code needs no GPU."""
    pytest.importorskip("triton")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from electra_composer.model.kernels import masked_lm_triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel_function = getattr(masked_lm_triton_kernels, name)
    sizes = {"BLOCK_M": 64, "TILE": 128, "BLOCK_E": 64, "TILES": 256, "TILES_PER_PROGRAM": 4, "PRECISION": "ieee"}
    known = {**sizes, **constants}
    pointers = {"targets": "i64", "seed": "i64", "sampled": "i64", "draw_token": "i32", "correct": "i1"}
    pointers |= dict.fromkeys(("features", "table", "gradient"), dtype)
    pointers |= dict.fromkeys(("bias", "noise", "largest", "total", "draw_largest", "draw_total", "of_target"), "fp32")
    pointers |= dict.fromkeys(("normalizer", "row_weights", "grad_loss", "bias_parts"), "fp32")
    scalars = dict.fromkeys(("inverse_temperature", "below_one", "label_smoothing"), "fp32")

    def type_of(argument: str) -> str:
        if argument in known:
            return "constexpr"
        return f"*{pointers[argument]}" if argument in pointers else scalars.get(argument, "i32")

    names = kernel_function.arg_names
    source = ASTSource(
        fn=kernel_function,
        signature={argument: type_of(argument) for argument in names},
        constexprs={(names.index(argument),): value for argument, value in known.items() if argument in names},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert len(compiled.asm["cubin"]) > 0
    if name != "combine_tiles" and dtype == "bf16":
        assert "wgmma" in compiled.asm["ptx"]  # the products are on the tensor cores
