"""Recipes: strict, and the same in YAML and in Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from sinkquant.errors import RequestError
from sinkquant.recipe import ModuleOverride, Recipe, Section, recipe_names


def sections(model: type[BaseModel] = Recipe, prefix: str = "") -> dict[str, type[BaseModel]]:
    """Dotted name -> class of every section of the recipe, "" the recipe itself."""
    found = {prefix: model}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            found |= sections(field.annotation, f"{prefix}.{name}".strip("."))
    return found


def nested(path: str, value: Any) -> dict[str, Any]:
    for part in reversed(path.split(".")):
        value = {part: value}
    return dict(value)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
BITS = st.integers(2, 8)
GROUP = st.sampled_from([-1, 1, 16, 32, 64, 128])
OVERRIDE = st.builds(ModuleOverride, pattern=TEXT, bits=st.one_of(BITS, st.just(16)),
                     group_size=st.one_of(st.none(), GROUP), method=st.sampled_from([None, "rtn", "gptq"]))
SHARE = st.floats(0, 1, exclude_min=True, exclude_max=True)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    data = Recipe().model_dump()
    data |= {"name": draw(TEXT), "description": draw(TEXT), "seed": draw(st.integers(0, 2**32 - 1))}
    data["calibration"] |= {"text": draw(st.one_of(st.none(), TEXT)), "rows": draw(st.integers(1, 10**6)),
                            "bos": draw(st.sampled_from(["auto", "always", "never"]))}
    data["detect"] |= {"threshold": draw(SHARE), "massive_ratio": draw(st.floats(1, 1e300, exclude_min=True))}
    data["weights"] |= {"bits": draw(BITS), "group_size": draw(GROUP), "damping": draw(SHARE),
                        "ignore": draw(st.lists(TEXT, max_size=3)),
                        "overrides": [one.model_dump() for one in draw(st.lists(OVERRIDE, max_size=3))]}
    data["protect"] |= {"sink_weight": draw(st.floats(1, 1e30)), "max_share": draw(SHARE)}
    data["budget"] = {"bits": draw(st.one_of(st.none(), st.floats(2, 16, exclude_min=True)))}
    data["gate"] |= {"min_recovery": draw(st.one_of(st.none(), SHARE))}
    return Recipe.parse(data)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(recipes())
def test_yaml_and_back_loses_nothing(recipe: Recipe) -> None:
    text = recipe.to_yaml()
    assert Recipe.parse(yaml.safe_load(text)) == recipe
    assert Recipe.parse(yaml.safe_load(text)).to_yaml() == text


def test_a_file_gives_the_same_recipe_back(tmp_path: Path) -> None:
    recipe = Recipe().replace(["name=mine", "weights.bits=3", "description='two\nlines: é'"])
    (tmp_path / "mine.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert Recipe.load(tmp_path / "mine.yaml") == recipe


def test_an_empty_file_is_the_default_recipe(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n", encoding="utf-8")
    assert Recipe.load(tmp_path / "empty.yaml") == Recipe()


@pytest.mark.parametrize("name", recipe_names())
def test_packaged_recipes_are_valid_described_and_lossless(name: str) -> None:
    recipe = Recipe.load(name)
    assert recipe == Recipe.load(f"{name}.yaml")
    assert recipe.name == name
    assert recipe.description
    assert Recipe.parse(yaml.safe_load(recipe.to_yaml())) == recipe


@pytest.mark.parametrize("section", sections())
def test_an_unknown_key_is_refused_with_the_near_miss_in_every_section(section: str) -> None:
    known = next(iter(sections()[section].model_fields))
    wrong = f"{section}.{known}x".strip(".")
    for attempt in (lambda: Recipe.parse(nested(wrong, 1)), lambda: Recipe().replace([f"{wrong}=1"])):
        with pytest.raises(RequestError) as error:
            attempt()
        assert f"unknown key {wrong!r}" in str(error.value)
        assert f"did you mean {known!r}" in str(error.value)


def test_an_unknown_key_inside_a_list_is_refused_with_the_near_miss() -> None:
    with pytest.raises(RequestError, match=r"unknown key 'weights.overrides.0.patern', did you mean 'pattern'"):
        Recipe.parse({"weights": {"overrides": [{"patern": "*", "bits": 4}]}})


@pytest.mark.parametrize(("data", "message"), [
    ([1], "mapping"), ({1: 2}, "1: Keys should be strings"), ({"weights": None}, "weights"),
    ({"weights": 3}, "weights"), ({"seed": "many"}, "seed")])
def test_what_is_no_recipe_is_refused(data: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Recipe.parse(data)


@pytest.mark.parametrize(("assignment", "section", "key", "value"), [
    ("weights.bits=3", "weights", "bits", 3),
    ("weights.group_size=-1", "weights", "group_size", -1),
    ("weights.damping=1e-3", "weights", "damping", 1e-3),
    ("weights.act_order=false", "weights", "act_order", False),
    ("weights.ignore=['*.down_proj', 're:0$']", "weights", "ignore", ["*.down_proj", "re:0$"]),
    ("weights.overrides=[{pattern: '*.q_proj', bits: 16}]", "weights", "overrides",
     [ModuleOverride(pattern="*.q_proj", bits=16)]),
    ("budget.bits=4.5", "budget", "bits", 4.5),
    ("budget.bits=null", "budget", "bits", None),
    ("calibration.text=a=b.txt", "calibration", "text", "a=b.txt"),
    ("calibration.text=", "calibration", "text", None),
    ("evaluate.tasks=[]", "evaluate", "tasks", []),
])
def test_assignments_reach_their_key(assignment: str, section: str, key: str, value: Any) -> None:
    start = Recipe.load("w4a16-sink-rtn")
    changed = start.replace([assignment])
    assert getattr(getattr(changed, section), key) == value
    kept = changed.model_dump() | {section: None}
    assert kept == start.model_dump() | {section: None}


def test_later_assignments_win_and_the_recipe_itself_never_changes() -> None:
    recipe = Recipe()
    assert recipe.replace(["weights.bits=3", "weights.bits=2"]).weights.bits == 2
    assert recipe == Recipe()


@pytest.mark.parametrize(("assignment", "message"), [
    ("weights.bits", "no '='"), ("wieghts.bits=3", "'wieghts' is not a section of the recipe, did you mean 'weights'"),
    ("weights.bits.more=3", "'weights.bits' is not a section"), ("weights.bits=[", "not YAML"),
    ("weights.bits=nine", "weights.bits"), ("evaluate.tasks=a", "evaluate.tasks"), ("=3", "unknown key ''"),
    ("weights.bits=1", "weights.bits"), ("weights.bits=9", "weights.bits"), ("weights.bits=2.5", "weights.bits"),
    ("weights.bits=null", "weights.bits"), ("weights.group_size=0", "weights.group_size"),
    ("weights.group_size=-2", "weights.group_size"), ("weights.damping=0", "weights.damping"),
    ("weights.damping=.nan", "weights.damping"), ("weights.damping=.inf", "weights.damping"),
    ("weights.symmetric=3", "weights.symmetric"), ("weights.method=awk", "weights.method"),
    ("weights.overrides=[{pattern: a, bits: 12}]", "2 to 8 bits, or 16"),
    ("weights.overrides=[{pattern: a, bits: 4, group_size: 0}]", "group_size"),
    ("protect.bits=12", "2 to 8 bits, or 16"), ("protect.sink_weight=0.5", "protect.sink_weight"),
    ("protect.max_share=1.1", "protect.max_share"), ("protect.channels=modules", "protect.channels"),
    ("budget.bits=2", "budget.bits"), ("seed=-1", "seed"), ("seed=4294967296", "seed"),
    ("calibration.rows=0", "calibration.rows"),
    ("calibration.bos=sometimes", "calibration.bos")])
def test_wrong_assignments_are_refused_in_one_sentence(assignment: str, message: str) -> None:
    with pytest.raises(RequestError) as error:
        Recipe().replace([assignment])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_recipe_names_the_near_miss() -> None:
    with pytest.raises(RequestError, match=r"did you mean 'w4a16-sink'.*w8a16-sink-rtn"):
        Recipe.load("w4a16-snik")


@pytest.mark.parametrize("text", ["weights: [", "weights: 'a", "\x07", "a: b: c", "!!python/object:os.system {}",
                                  "a: 2024-99-99"])
def test_a_file_that_is_not_yaml_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "broken.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(RequestError, match=r"broken.yaml is not YAML"):
        Recipe.load(tmp_path / "broken.yaml")


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(RequestError, match=r"broken.yaml is not YAML"):
        Recipe.load(tmp_path / "broken.yaml")


@pytest.mark.parametrize("key", ["calibration.text", "evaluate.text"])
@pytest.mark.parametrize("path", ["set #2/a: b.txt", "/x y/it's [1].txt", "- a.txt", "{a}.txt", "*.txt", "é/日本.txt",
                                  "no", "123", "~/a.txt", "a=b", "a'", "@a", "%a", "a\tb", " a "])
def test_a_path_is_taken_as_it_stands(key: str, path: str) -> None:
    """YAML would cut it off at ` #`, or read a list, a number or a truth value."""
    section, _, leaf = key.partition(".")
    for recipe in (Recipe().replace([f"{key}={path}"]), Recipe().changed(**{section: {leaf: path}})):
        assert getattr(getattr(recipe, section), leaf) == path.replace("~", str(Path.home()))


@pytest.mark.parametrize("key", ["calibration.text", "evaluate.text"])
def test_several_paths_are_a_list(key: str) -> None:
    recipe = Recipe().replace([f"{key}=[a b.txt, 'it [1].txt', chats.jsonl@3]"])
    section, _, leaf = key.partition(".")
    assert getattr(getattr(recipe, section), leaf) == ["a b.txt", "it [1].txt", "chats.jsonl@3"]


def test_a_key_of_two_kinds_is_refused_by_its_name() -> None:
    with pytest.raises(RequestError) as error:
        Recipe().replace(["prune.blocks=-1"])
    assert "prune.blocks: Input should be greater than or equal to 1, or Input should be greater than 0" in str(
        error.value)


@pytest.mark.parametrize(("written", "read"), [("null", None), ("", None), ("~", None), ("'null'", "null"),
                                               ('"a b"', "a b")])
def test_quotes_and_null_of_a_path_are_yaml(written: str, read: str | None) -> None:
    assert Recipe().replace(["calibration.text=a.txt", f"calibration.text={written}"]).calibration.text == read


def test_values_change_by_section() -> None:
    recipe = Recipe().changed(weights={"bits": 3}, seed=7, kv_cache={"key_bits": 2}, evaluate={"tasks": ["a"]})
    assert recipe == Recipe().replace(["weights.bits=3", "seed=7", "kv_cache.key_bits=2", "evaluate.tasks=[a]"])
    assert recipe.changed() == recipe
    assert recipe.changed(kv_cache={"window": 4}).kv_cache.key_bits == 2
    assert recipe.changed(kv_cache=None).kv_cache is None
    with pytest.raises(RequestError, match="did you mean 'bits'"):
        recipe.changed(weights={"bitz": 3})


def test_another_engine_is_that_of_the_budget_too() -> None:
    recipe = Recipe.parse({"engine": "vllm-cuda", "budget": {"bits": 4.5}})
    assert recipe.budget.engine == "vllm-cuda"
    assert recipe.replace(["engine=any"]).budget.engine == "any"
    assert recipe.changed(engine="transformers").budget.engine == "transformers"
    assert recipe.replace(["weights.bits=3"]).budget.engine == "vllm-cuda"
    assert recipe.replace(["budget.solver=even"]).budget.solver == "even"
    own = Recipe.parse({"engine": "vllm-cuda", "budget": {"bits": 4.5, "engine": "vllm"}})
    assert own.replace(["engine=any"]).budget.engine == "vllm"


@pytest.mark.parametrize(("assignment", "words"), [
    ("budget.engine=vllm", "name a limit, or the recipe's engine"), ("prune.sparsity=0.6", "leave sparsity out"),
    ("prune.pattern=2:4", "leave pattern out"), ("prune.ignore=['*.o_proj']", "leave ignore out"),
    ("kv_cache.first_n=8", "set it to 'first-n', or leave first_n at 4")])
def test_keys_that_would_change_nothing_are_refused(assignment: str, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        Recipe().replace([assignment])


def test_two_keys_that_leave_inputs_alone_are_refused() -> None:
    """A linear that sinks would take out of a budget of inputs' bits costs more of it than was solved for."""
    with pytest.raises(RequestError, match="set sinks to 'dynamic'"):
        Recipe().replace(["activations.format=int8", "activations.bits=10", "activations.sinks=16-bit"])


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    """PyYAML would drop the first."""
    (tmp_path / "twice.yaml").write_text("weights: {bits: 3}\nweights: {group_size: 64}\n", encoding="utf-8")
    with pytest.raises(RequestError, match="the key 'weights' stands twice, in line 2 again"):
        Recipe.load(tmp_path / "twice.yaml")
    with pytest.raises(RequestError, match="not YAML"):
        Recipe().replace(["weights={bits: 3, bits: 2}"])
    (tmp_path / "merged.yaml").write_text("weights: &a {bits: 3, group_size: 64}\nactivations: {}\n", encoding="utf-8")
    assert Recipe.load(tmp_path / "merged.yaml").weights.bits == 3


def test_where_all_weights_are_left_alone_no_method_is_asked_for() -> None:
    assert Recipe().methods == {"gptq"}
    assert Recipe().replace(["weights.ignore=['*']"]).methods == set()
