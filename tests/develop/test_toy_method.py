"""A method from outside the package goes from a recipe to a report."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from develop.toy_method import ErrorDiffusion
from small_runs import model_folder, small_recipe

import sinkquant as sq
from sinkquant import Plan, RequestError
from sinkquant.methods import GROUP, Problem, method_named, method_names
from sinkquant.recipe import Recipe
from sinkquant.schemes import WeightFormat


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `pip install` leaves of a package that brings the method."""
    info = tmp_path / "site" / "toy-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(
        f"[{GROUP}]\nerror-diffusion = develop.toy_method:ErrorDiffusion\nbroken = develop.toy_method:torch\n",
        encoding="utf-8")
    monkeypatch.syspath_prepend(info.parent)


@pytest.mark.usefixtures("installed")
def test_a_method_of_another_package_goes_from_a_recipe_to_a_report(tmp_path: Path, text_file: Path) -> None:
    folder = model_folder(tmp_path / "model")
    recipe = small_recipe(text_file, "weights.method=error-diffusion", "detect.super_weights=false",
                          "evaluate.fidelity=false")
    report = sq.run(recipe, folder, tmp_path / "out")
    assert report is not None
    plan = Plan.load(tmp_path / "out" / "plan.json")
    methods = {decision.method for decision in plan.modules.values()}
    assert methods == {"error-diffusion"}
    assert not plan.needs_rows
    model, _ = sq.load(tmp_path / "out" / "model")
    name = "model.layers.0.mlp.down_proj"
    original = sq.load(folder)[0].get_submodule(name).weight.data
    given = model.get_submodule(name).weight.data
    # Errors that are handed on leave the sum of a row nearer to what it was than rounding alone does.
    rounded = sq.quantize(sq.load(folder)[0], Plan.load(tmp_path / "out" / "plan.json").model_copy(update={
        "modules": {key: one.model_copy(update={"method": "rtn"}) for key, one in plan.modules.items()}}))
    plain = rounded.get_submodule(name).weight.data
    drift, before = ((one - original).sum(1).abs().mean() for one in (given, plain))
    assert drift < 0.5 * before


@pytest.mark.usefixtures("installed")
def test_it_is_listed_after_those_built_in_and_refused_where_it_does_not_fit(text_file: Path) -> None:
    assert method_names() == ["rtn", "gptq", "gptaq", "broken", "error-diffusion"]
    assert isinstance(method_named("error-diffusion"), ErrorDiffusion)
    with pytest.raises(RequestError, match=r"the entry point 'broken' of sinkquant\.methods is no .*mend the package"):
        method_named("broken")


def test_without_its_package_it_is_refused_by_name(text_file: Path) -> None:
    with pytest.raises(RequestError, match=r"weights\.method: Input should be 'rtn', 'gptq' or 'gptaq'"):
        small_recipe(text_file, "weights.method=error-diffusion")
    with pytest.raises(RequestError, match=r"no quantization method 'error-diffusion'.* install the package"):
        method_named("error-diffusion")


def test_a_problem_is_solved_on_the_grid() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    kept = weight.abs() > 0.3
    problem = Problem("w", WeightFormat(3, 32), weight, torch.bfloat16, Recipe().weights, kept=kept)
    packed = ErrorDiffusion().solve(problem)
    assert packed.codes.min() >= -4
    assert packed.codes.max() <= 3
    assert (packed.codes[~kept] == 0).all()
