"""One list of number formats: every name is known once, and nothing outside the list's room compares one."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import sinkquant
from sinkquant import Recipe, RequestError
from sinkquant.schemes import INPUTS, SCHEMES, backend_of, find, scheme_of
from sinkquant.schemes.inputs import NO_ROUNDING
from sinkquant.schemes.weight_format import WeightFormat

PACKAGE = Path(sinkquant.__file__).parent
KERNELS = PACKAGE / "inference"
"""Kernels have names of their own, "int8" among them."""


def test_every_scheme_has_a_name_of_its_own() -> None:
    assert len({(scheme.storage, scheme.kind) for scheme in SCHEMES}) == len(SCHEMES)
    asked = {(one.backend, one.format, one.double_quantization, one.kind, one.symmetric, one.ends)
             for one in SCHEMES if one.format}
    assert len(asked) == len([one for one in SCHEMES if one.format])
    assert all(scheme.loads for scheme in SCHEMES)


def test_formats_are_found_by_storage_and_kind() -> None:
    assert scheme_of(WeightFormat(8, -1, "float")).words == "FP8 weights"
    assert backend_of([WeightFormat(8, -1, "float"), WeightFormat(4, 64)]) == "compressed-tensors"
    assert backend_of([]) == "compressed-tensors"
    with pytest.raises(RequestError, match="the storage 'nf4' holds weights of the kind 'int', not 'float'"):
        find("nf4", "float")


@pytest.mark.parametrize(("setting", "message"), [
    ("backend=bitsandbites", "a backend is one of compressed-tensors, bitsandbytes, quanto, gptq"),
    ("weights.format=nf5", "weights have one of the formats int, nvfp4, mxfp4, mxfp8, nf4, fp4, float8"),
    ("activations.format=int5", "inputs are rounded to one of 16-bit, int8, fp8, int6, int4")])
def test_names_that_nobody_has_are_refused(setting: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Recipe().replace([setting])


def compared(tree: ast.Module) -> set[str]:
    """Every string that stands in a comparison or a pattern, or that a string is asked to begin or end with."""
    places: list[ast.AST] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare | ast.MatchValue):
            places.append(node)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in (
                "startswith", "endswith", "removeprefix", "removesuffix"):
            places += node.args
    return {leaf.value for place in places for leaf in ast.walk(place)
            if isinstance(leaf, ast.Constant) and isinstance(leaf.value, str)}


def test_no_file_outside_compares_the_name_of_a_format() -> None:
    names = {name for scheme in SCHEMES for name in (scheme.storage, scheme.backend, scheme.format, *scheme.layouts)}
    names |= {form.name for form in INPUTS} | {"float"}
    names -= {NO_ROUNDING, ""}
    own = PACKAGE / "schemes"
    assert any(compared(ast.parse(path.read_text(encoding="utf-8"))) & names for path in own.rglob("*.py"))
    found = {}
    for path in PACKAGE.rglob("*.py"):
        if not path.is_relative_to(own) and not path.is_relative_to(KERNELS):
            found[str(path)] = compared(ast.parse(path.read_text(encoding="utf-8"))) & names
    assert {path: used for path, used in found.items() if used} == {}
