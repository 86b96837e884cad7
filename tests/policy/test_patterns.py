"""The one name matcher."""

from __future__ import annotations

import pytest

from sinkquant.errors import RequestError
from sinkquant.policy.rules import match

NAMES = [f"model.layers.{i}.{leaf}" for i in range(12)
         for leaf in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")]


@pytest.mark.parametrize(("pattern", "count"), [
    ("*.down_proj", 12), ("model.layers.1.*", 4), ("*.layers.[01].mlp.*", 4), ("model.layers.11.mlp.up_proj", 1),
    ("re:down_proj$", 12), (r"re:layers\.(0|11)\.", 8), ("re:^model.layers.1.mlp", 2), ("*", 48)])
def test_globs_and_expressions_match_whole_names_in_order(pattern: str, count: int) -> None:
    found = match(pattern, NAMES, "key")
    assert len(found) == count
    assert found == [name for name in NAMES if name in found]


@pytest.mark.parametrize(("pattern", "near"), [
    ("*.down_porj", "down_proj"), ("re:dwon_proj$", "down_proj"), ("down_proj", "down_proj"),
    ("model.layers.0.self_attn.qproj", "q_proj"), ("re:^layer.*up_prj$", "up_proj")])
def test_a_pattern_without_a_match_names_the_near_miss(pattern: str, near: str) -> None:
    with pytest.raises(RequestError) as error:
        match(pattern, NAMES, "weights.ignore")
    assert f"weights.ignore: the pattern {pattern!r} matches no module" in str(error.value)
    assert f"did you mean {near!r}" in str(error.value)


def test_an_expression_that_is_none_is_refused() -> None:
    with pytest.raises(RequestError, match=r"protect.modules: 're:\(' is not a regular expression"):
        match("re:(", NAMES, "protect.modules")
