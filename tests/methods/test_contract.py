"""The methods that are built in keep their contract, and nobody else knows them by name."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch

import sinkquant
from sinkquant.artifacts import LinearShape
from sinkquant.errors import RequestError
from sinkquant.methods import BUILT_IN, Problem, method_named, methods_of, need_hessian, need_unquantized_inputs
from sinkquant.quantize import GPTQ, to_integers
from sinkquant.recipe import Recipe
from sinkquant.schemes import WeightFormat
from sinkquant.schemes.codecs.fp8 import FP8Grid
from sinkquant.schemes.codecs.grid import Nearest

PACKAGE = Path(sinkquant.__file__).parent
COMPARED = re.compile(r"""methods?\b[^\n"']*(?:==|!=|\bin\b)[^\n"']*["'](?:rtn|gptq|gptaq)["']""")


def problem(form: WeightFormat, **more: torch.Tensor | None) -> Problem:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 64, generator=generator, dtype=torch.float64)
    given: dict[str, torch.Tensor | None] = {"hessian": inputs.T @ inputs / 200}
    return Problem("w", form, torch.randn(16, 64, generator=generator), torch.bfloat16, Recipe().weights,
                   **(given | more))  # type: ignore[arg-type]


def test_no_file_outside_compares_the_name_of_a_method() -> None:
    found = [f"{path.relative_to(PACKAGE)}: {line.strip()}" for path in PACKAGE.rglob("*.py")
             if path.parent.name != "methods" for line in path.read_text(encoding="utf-8").splitlines()
             if COMPARED.search(line)]
    assert found == []
    assert COMPARED.search('if decision.method == "gptaq":')  # the pattern finds what it is to find
    assert COMPARED.search('alone = methods == {"rtn"}')


def test_names_are_told_apart_and_facts_are_asked_for() -> None:
    assert len({method.name for method in BUILT_IN}) == len(BUILT_IN)
    assert [method.name for method in methods_of(["gptq", "none", "rtn", "gptq"])] == ["gptq", "rtn"]
    assert [need_hessian([name]) for name in ("rtn", "gptq", "gptaq", "none")] == [False, True, True, False]
    assert [need_unquantized_inputs([name]) for name in ("rtn", "gptq", "gptaq")] == [False, False, True]
    with pytest.raises(RequestError, match="there is no quantization method 'awk'; use 'rtn', 'gptq' or 'gptaq'"):
        method_named("awk")


def test_methods_are_known_without_torch() -> None:
    for path in (PACKAGE / "methods").glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.startswith(("torch", "sinkquant.quantize", "transformers")) for name in names), path


def test_each_solves_as_its_solver_does() -> None:
    integers, settings = WeightFormat(3, 32), Recipe().weights
    given = problem(integers)
    assert given.hessian is not None
    rounded = to_integers(3, 32).quantize(given.weight, given.hessian.diagonal())
    assert torch.equal(method_named("rtn").solve(given).dequantized(), rounded.dequantized())
    floats = method_named("rtn").solve(problem(WeightFormat(8, -1, "float")))
    nearest = Nearest(FP8Grid()).quantize(given.weight, given.hessian.diagonal())
    assert torch.equal(floats.dequantized(), nearest.dequantized())
    solver = GPTQ(3, 32, settings.damping, passes=settings.descent)
    expected = solver.quantize(given.weight, given.hessian)
    for name in ("gptq", "gptaq"):  # without what it makes up for, the second is the first
        assert torch.equal(method_named(name).solve(given).dequantized(), expected.dequantized())
    drawn = given.hessian.flip(0) / 10
    more = method_named("gptaq").solve(problem(integers, cross=drawn))
    assert torch.equal(more.dequantized(), solver.quantize(given.weight, given.hessian, cross=drawn).dequantized())
    assert not torch.equal(more.dequantized(), expected.dequantized())


@pytest.mark.parametrize("name", ["rtn", "gptq", "gptaq"])
def test_pruned_weights_stay_zero(name: str) -> None:
    kept = torch.rand(16, 64, generator=torch.Generator().manual_seed(1)) < 0.5
    given = problem(WeightFormat(4, 32), kept=kept)
    if not method_named(name).needs_hessian:
        given = Problem("w", given.form, given.weight * kept, given.scale_dtype, given.settings, kept=kept)
    assert (method_named(name).solve(given).codes[~kept] == 0).all()


def test_costs_grow_with_what_they_are_of() -> None:
    settings = Recipe().weights
    narrow, wide = LinearShape(rows=64, columns=64, block=0), LinearShape(rows=64, columns=256, block=0)
    for method in BUILT_IN:
        assert method.cost(narrow, settings).bytes < method.cost(wide, settings).bytes
    plain = settings.model_copy(update={"descent": 0})
    assert method_named("gptq").cost(wide, plain).operations < method_named("gptq").cost(wide, settings).operations


def test_floating_point_is_refused_by_methods_of_integers() -> None:
    floats = WeightFormat(8, -1, "float")
    assert [bool(method.takes(floats)) for method in BUILT_IN] == [False, True, True]
