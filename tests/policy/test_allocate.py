"""Budgets that are solved for: bytes, constraints, reasons, refusals."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from costs import sensitivity_of
from families import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from sinkmaps import sink_map_of
from tiny_tokenizer import tiny_tokenizer

from sinkquant import quantize, save
from sinkquant.artifacts import ModelShape, Plan, Terms
from sinkquant.artifacts.sensitivity import InputLoss, InputSensitivity
from sinkquant.artifacts.sizes import module_bytes
from sinkquant.errors import RequestError
from sinkquant.models import Decoder
from sinkquant.policy import make_control, make_plan
from sinkquant.recipe import Budget, Recipe

DECODER = Decoder.of(tiny_model("llama"))
SHAPE = DECODER.shape("tiny")
DOWN = "model.layers.1.mlp.down_proj"
SINKS = sink_map_of(DECODER, {DOWN: 0.6})
Q, K, V = (f"model.layers.0.self_attn.{leaf}_proj" for leaf in "qkv")


def solved(*assignments: str, weight: dict[str, float] | None = None, groups: Iterable[int] = (32,)) -> Plan:
    recipe = Recipe().replace(["weights.group_size=32", "weights.method=rtn", "budget.solver=sensitivity",
                               *assignments])
    return make_plan(SHAPE, SINKS, recipe, sensitivity_of(SHAPE, weight, groups=groups))


def linear_bits(plan: Plan, shape: ModelShape = SHAPE) -> float:
    return 8 * sum(d.bytes for d in plan.modules.values()) / sum(x.parameters for x in shape.linears.values())


@pytest.mark.parametrize("bits", [3.3, 4.5, 5.7, 9.0, 16.0])
def test_average_bits_are_kept_and_sensitive_modules_get_more(bits: float) -> None:
    plan = solved(f"budget.bits={bits}", weight={DOWN: 1000.0, Q: 0.001})
    assert linear_bits(plan) <= bits
    assert plan.bits_per_weight == pytest.approx(linear_bits(plan))
    found = {name: decision.bits for name, decision in plan.modules.items()}
    assert found[DOWN] == max(found.values())
    assert found[Q] == found[K] == found[V] == min(found.values())
    assert plan.predicted["kl_sinks"] == pytest.approx(0.1 * plan.predicted["kl"])
    assert plan.predicted["solver_gap"] == 0
    assert any(note.startswith(f"solved for the budget of bits {bits}") for note in plan.notes)


@settings(max_examples=6)
@given(st.integers(70_000, 230_000), st.sampled_from([(32,), (32, 64, -1)]))
def test_a_budget_of_bytes_is_kept_to_the_byte_or_refused_with_one_that_is_feasible(
        allowed: int, groups: tuple[int, ...]) -> None:
    try:
        plan = solved(f"budget.bytes={allowed}", groups=groups)
    except RequestError as error:
        nearest = int(str(error).split("raise budget.bytes to ")[1].split(", or")[0].replace(",", ""))
        assert nearest > allowed
        assert solved(f"budget.bytes={nearest}", groups=groups).weight_bytes == nearest
        return
    assert plan.weight_bytes <= allowed


def test_bytes_are_those_on_disk(tmp_path: Path) -> None:
    plan = solved("budget.bytes=220000", "weights.scale_search=false", weight={DOWN: 50.0})
    model = tiny_model("llama")
    save(quantize(model, plan), tiny_tokenizer(), tmp_path / "out")
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert written == plan.weight_bytes <= 220_000
    assert plan.weight_bytes > 0.97 * 220_000


ENDS = ["weights.group_size=32", "weights.method=rtn", "budget.solver=sensitivity", "sensitivity.end_bits=[4,8]"]


@pytest.mark.parametrize("tied", [False, True])
def test_a_budget_of_the_whole_checkpoint_chooses_head_and_embedding(tied: bool, tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=tied)
    decoder = Decoder.of(model)
    shape, sink_map = decoder.shape("tiny"), sink_map_of(decoder)

    def plan(*assignments: str, ends: float = 1.0) -> Plan:
        return make_plan(shape, sink_map, Recipe().replace([*ENDS, *assignments]), sensitivity_of(shape, ends=ends))

    small = plan("budget.megabytes=0.12")
    assert {end.bits for end in small.ends.values()} <= ({8} if tied else {4, 8})
    assert 0.98 * 120_000 < small.weight_bytes <= 120_000
    assert small.predicted["kl_ends"] == pytest.approx(sum(4.0 ** -end.bits for end in small.ends.values()))
    assert all("as the budget is solved for" in end.reason for end in small.ends.values())
    control = make_control(shape, sink_map, Recipe.parse(small.recipe), small)
    assert control.ends == small.ends
    assert abs(control.weight_bytes - small.weight_bytes) < 0.01 * small.weight_bytes
    # Ends that lose much stay in 16 bits, and the blocks pay.
    dear = plan("budget.megabytes=0.12", ends=1e6)
    assert not dear.ends
    assert dear.bits_per_weight < small.bits_per_weight
    per_parameter = plan(f"budget.bits_per_parameter={8 * small.weight_bytes / shape.values:.4f}")
    assert abs(per_parameter.weight_bytes - small.weight_bytes) < 0.02 * small.weight_bytes
    save(quantize(model, small), tiny_tokenizer(), tmp_path / "out")
    assert sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")) == small.weight_bytes
    # vLLM loads no embedding of a byte each.
    assert "embedding" not in {shape.ends[name].kind for name in plan(
        "budget.megabytes=0.14", "budget.engine=vllm").ends}
    with pytest.raises(RequestError, match=r"hold no losses of the head and the embedding"):
        plan("budget.megabytes=0.12", ends=0.0)
    with pytest.raises(RequestError, match=r"raise budget\.megabytes to 0\.0"):
        plan("budget.megabytes=0.01")


def test_a_ceiling_of_loss_is_met_in_the_fewest_bytes() -> None:
    plan = solved("budget.loss=0.01")
    assert plan.predicted["kl"] <= 0.01
    for name, decision in plan.modules.items():
        assert decision.bits > 2, name
    # One bit less anywhere would be over it, or the solver would have taken it.
    losses = {unit.modules[0]: unit for unit in sensitivity_of(SHAPE).units}
    for name, unit in losses.items():
        form = plan.modules[name].form
        now, less = unit.loss(form), next(loss for loss in unit.losses if loss.bits == form.bits - 1)
        assert now is not None
        assert plan.predicted["kl"] - now.terms.total + less.terms.total > 0.01


def test_what_refusals_name_is_feasible() -> None:
    for name, size in (("megabytes", 14_123_440_001), ("megabytes", 1_001_000), ("bits_per_parameter", 123_457)):
        budget = Budget.model_validate({name: 1})
        nearest = Budget.model_validate({name: float(budget.in_words(size, SHAPE.values))}).whole(SHAPE.values)
        assert nearest is not None
        assert 0 <= nearest - size < 1000
    fixed = ["budget.loss=1e-9", f"weights.overrides=[{{pattern: {DOWN}, bits: 3}}]"]
    with pytest.raises(RequestError, match="is not feasible") as refused:
        solved(*fixed, weight={DOWN: 0.77747})
    nearest_loss = str(refused.value).partition("loses ")[2].partition(" nats")[0]
    assert solved(*fixed, f"budget.loss={nearest_loss}", weight={DOWN: 0.77747}).predicted["kl"] > 0


def test_what_is_fixed_stays_and_counts() -> None:
    plan = solved("budget.bits=4.5", f"weights.overrides=[{{pattern: {DOWN}, bits: 2}}]", "weights.ignore=['*.0.*']",
                  "protect.modules=['*.2.*o_proj']", "budget.bits=14")
    assert plan.modules[DOWN].bits == 2
    assert "override" in plan.modules[DOWN].reason
    assert all(d.bits == 16 for name, d in plan.modules.items() if ".0." in name)
    assert plan.modules["model.layers.2.self_attn.o_proj"].bits == 8
    assert linear_bits(plan) <= 14
    with pytest.raises(RequestError, match=r"name every linear"):
        solved("budget.bits=16", "weights.ignore=['re:q|k|v|up|gate']", "weights.overrides=[{pattern: '*', bits: 4}]")


def test_engines_get_the_formats_that_they_load() -> None:
    plan = solved("budget.bits=6", "budget.engine=vllm", "budget.solver=null")
    assert {d.bits for d in plan.modules.values()} <= {4, 8, 16}
    assert "vllm" in plan.loads_in
    assert {3, 5, 6, 7} & {d.bits for d in solved("budget.bits=6.3", weight={DOWN: 9.0, Q: 0.1}).modules.values()}


def test_a_budgets_engine_runs_the_inputs_too() -> None:
    eight = ("budget.bits=12", "budget.engine=vllm-cpu", "weights.bits=8", "weights.group_size=-1",
             "sensitivity.bits=[8]", "activations.format=int8")
    plan = solved(*eight, "activations.scale=tensor", groups=(-1,))
    assert {d.inputs for d in plan.modules.values() if d.bits == 8} == {("int8", "tensor"), ("int8", "token")}
    with pytest.raises(RequestError, match=r"vllm-cpu does not load .*down_proj in 8 bits, .* with 16-bit inputs"):
        solved(*eight, "activations.scale=tensor", "activations.sinks=16-bit", groups=(-1,))
    costs = sensitivity_of(SHAPE, groups=(-1,))
    costs = costs.model_copy(update={"inputs": [
        InputSensitivity(modules=unit.modules, losses=[InputLoss(activations="int8", scale="token", sinks=0, total=1)])
        for unit in costs.units]})
    plan = make_plan(SHAPE, SINKS, Recipe().replace(["weights.method=rtn", *eight, "activations.bits=12"]), costs)
    assert {d.inputs for d in plan.modules.values() if d.bits == 8} == {("int8", "token")}


def test_reasons_carry_their_figures() -> None:
    plan = solved("budget.bits=4", weight={DOWN: 1000.0})
    bits = plan.modules[DOWN].bits
    assert plan.modules[DOWN].reason == (
        f"{bits} bits, '<s>' sets its input range (90 against 4 elsewhere) and gives 60% of trace(H); predicted "
        f"{320 * 4.0 ** -bits:+.2g} nats, of which {32 * 4.0 ** -bits:.2g} through '<s>'; at {bits - 1} bits "
        f"{1280 * 4.0 ** -bits:+.2g} nats, of which {128 * 4.0 ** -bits:.2g} through '<s>'")
    assert "for q_proj + k_proj + v_proj together" in plan.modules[K].reason
    exact = solved("budget.bytes=1000000").modules[DOWN]
    assert exact.reason.startswith("left in 16 bits, ")
    assert "at 8 bits predicted" in exact.reason


def test_the_control_is_uniform_of_the_same_size_and_predicts_its_loss_too() -> None:
    recipe = Recipe().replace(["weights.group_size=32", "weights.method=rtn", "budget.solver=sensitivity",
                               "budget.bits=4.6"])
    costs = sensitivity_of(SHAPE, {DOWN: 1000.0, Q: 0.001})
    plan = make_plan(SHAPE, SINKS, recipe, costs)
    control = make_control(SHAPE, SINKS, recipe, plan, costs)
    assert control.weight_bytes == pytest.approx(plan.weight_bytes, rel=0.01)
    assert {d.bits for d in control.modules.values()} <= {4, 5}
    assert control.predicted["kl"] > plan.predicted["kl"]


def test_the_context_of_a_budget_counts_the_cache() -> None:
    alone = solved("budget.bytes=230000")
    packed = solved("budget.bytes=230000", "budget.context=64", "budget.batch=2", "kv_cache={length: 64}")
    dense = solved("budget.bytes=230000", "budget.context=64", "budget.batch=2")
    assert dense.weight_bytes + 2 * 2 * 64 * 3 * 2 * 32 <= 230_000  # 3 layers, 2 heads of 16 + 16 channels
    assert dense.weight_bytes < alone.weight_bytes
    assert packed.kv_cache is not None
    with pytest.raises(RequestError, match=r"of the KV cache; raise budget\.bytes to"):
        solved("budget.bytes=90000", "budget.context=200")


@pytest.mark.parametrize(("assignments", "message"), [
    (("budget.bits=2.5",), r"budget.bits 2.5 is not feasible: .* take 2\.5\d\d bits per weight"),
    (("budget.loss=0.001", f"weights.overrides=[{{pattern: {DOWN}, bits: 2}}]"),
     r"budget.loss 0.001 is not feasible: what the recipe fixes loses 0.02 nats"),
    (("budget.bits=4", "weights.rotate=values"), "weights.rotate=values changes the weights that sensitivities"),
    (("budget.bits=4", "backend=gptq"), "solved for in the formats of compressed-tensors and gguf, not of gptq"),
    (("budget.bits=10", "budget.engine=vllm", f"weights.overrides=[{{pattern: {DOWN}, bits: 3}}]"),
     "budget.engine vllm does not load .* in 3 bits, groups of 32"),
    (("budget.bits=8", "budget.engine=vllm", "budget.solver=null", "weights.lm_head=8", "weights.embeddings=8"),
     "budget.engine vllm does not load model.embed_tokens in 8 bits"),
    (("budget.bits=4", "budget.loss=1"), "name one of bits, bytes, megabytes, bits_per_parameter and loss"),
    (("budget.context=5",), "context is for a budget of bytes"),
    (("budget.loss=1", "budget.solver=even"), "'even' knows bits and bytes"),
    (("budget.bits=4", "sensitivity.end_bits=[8]"), "counts the blocks' linears alone"),
    (("budget.bytes=4000000", "sensitivity.end_bits=[8]", "backend=gptq"), "end_bits is for the backend compressed"),
    ((), "needs one of bits, bytes, megabytes, bits_per_parameter and loss")])
def test_what_cannot_be_solved_is_refused_with_what_can(assignments: tuple[str, ...], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        solved(*assignments)


def test_sensitivities_are_needed_and_must_be_of_this_model() -> None:
    recipe = Recipe().replace(["budget.loss=0.1", "weights.group_size=32"])
    with pytest.raises(RequestError, match="needs sensitivities"):
        make_plan(SHAPE, SINKS, recipe)
    other = sensitivity_of(Decoder.of(tiny_model("gpt_neox")).shape("x"))
    with pytest.raises(RequestError, match="of another model"):
        make_plan(SHAPE, SINKS, recipe, other)


def test_a_budget_of_bits_alone_is_spent_evenly_as_ever_and_one_of_bytes_too() -> None:
    recipe = Recipe().replace(["weights.group_size=32", "weights.bits=3", "budget.bits=4.5"])
    by_bits = make_plan(SHAPE, SINKS, recipe)
    by_bytes = make_plan(SHAPE, SINKS, recipe.replace(["budget.bits=null", f"budget.bytes={by_bits.weight_bytes}"]))
    assert by_bytes.weight_bytes <= by_bits.weight_bytes
    assert {n: d.form for n, d in by_bytes.modules.items()} == {n: d.form for n, d in by_bits.modules.items()}
    with pytest.raises(RequestError, match="take a checkpoint of"):
        make_plan(SHAPE, SINKS, recipe.replace(["budget.bits=null", "budget.bytes=50000"]))


def test_every_linear_takes_the_method_that_loses_less_in_its_format() -> None:
    costs = sensitivity_of(SHAPE)
    units = []
    for unit in costs.units:  # a second method, better in one linear and worse in all others
        factor = 0.5 if unit.modules == [DOWN] else 2.0
        other = [loss.model_copy(update={"method": "gptq", "predicted": Terms(**{
            term: factor * value for term, value in loss.predicted.model_dump().items()})}) for loss in unit.losses]
        units.append(unit.model_copy(update={"losses": [*unit.losses, *other]}))
    both = costs.model_copy(update={"units": units})
    recipe = Recipe().replace(["weights.group_size=32", "weights.method=rtn", "budget.solver=sensitivity",
                               "budget.bits=4.5", "sensitivity.methods=[rtn, gptq]"])
    plan = make_plan(SHAPE, SINKS, recipe, both)
    methods = {name: decision.method for name, decision in plan.modules.items()}
    assert methods == {name: "gptq" if name == DOWN else "rtn" for name in methods}
    assert plan.predicted["kl"] < make_plan(SHAPE, SINKS, recipe, costs).predicted["kl"]
    fixed = make_plan(SHAPE, SINKS, recipe.replace(["budget={}", "weights.bits=4"]), both)  # no choice of method there
    assert fixed.predicted["kl"] == pytest.approx(sum(unit.losses[2].predicted.total for unit in costs.units))
    assert {loss.bits for unit in costs.units for loss in unit.losses[2:3]} == {4}


def test_the_diagonal_score_is_what_the_solver_sees_where_it_is_asked_for() -> None:
    upside_down = solved("budget.bits=5", "sensitivity.score=diagonal")
    assert upside_down.modules[DOWN].form == next(
        loss.form for unit in sensitivity_of(SHAPE).units if unit.modules == [DOWN] for loss in unit.losses[:1])
    assert sum(module_bytes(SHAPE, n, d.form) for n, d in upside_down.modules.items()) == sum(
        d.bytes for d in upside_down.modules.values())


def test_experts_take_one_format_in_the_whole_model() -> None:
    decoder = Decoder.of(tiny_model("qwen3_moe"))
    shape = decoder.shape("tiny")
    experts = [name for name, linear in shape.linears.items() if linear.part_of]
    units = sensitivity_of(shape, {experts[0]: 50.0}).units
    plain = [unit for unit in units if unit.modules[0] not in experts]
    layers = [[name for name in experts if shape.linears[name].block == block] for block in range(shape.blocks)]
    whole = next(unit for unit in units if unit.modules[0] == experts[0])
    costs = sensitivity_of(shape).model_copy(update={"units": plain + [
        whole.model_copy(update={"modules": names}) for names in layers]})
    recipe = Recipe().replace(["weights.group_size=32", "weights.method=rtn", "budget.solver=sensitivity",
                               "budget.bits=5"])
    plan = make_plan(shape, sink_map_of(decoder), recipe, costs)
    forms = {plan.modules[name].form for name in experts}
    assert len(forms) == 1
    assert f"for {len(experts)} linears of experts together" in plan.modules[experts[0]].reason
    assert plan.predicted["kl"] == pytest.approx(sum(
        unit.loss(plan.modules[unit.modules[0]].form).terms.total for unit in costs.units))
    kept = make_plan(shape, sink_map_of(decoder), recipe.replace(["weights.ignore=['*.experts.*']", "budget.bits=null",
                                                                "budget.bytes=5000000"]), costs)
    assert all(kept.modules[name].bits == 16 for name in experts)


def test_a_transposed_weight_is_for_sinkquant_alone() -> None:
    decoder = Decoder.of(tiny_model("gpt2"))
    shape = decoder.shape("tiny")
    recipe = Recipe().replace(["weights.group_size=32", "weights.method=rtn", "budget.bits=6",
                               "budget.solver=sensitivity"])
    plan = make_plan(shape, sink_map_of(decoder), recipe, sensitivity_of(shape))
    assert plan.loads_in == ["sinkquant"]
    assert linear_bits(plan, shape) <= 6
    with pytest.raises(RequestError, match=r"budget\.engine vllm loads no candidate format of GPT2LMHeadModel"):
        make_plan(shape, sink_map_of(decoder), recipe.replace(["budget.engine=vllm"]), sensitivity_of(shape))


def test_columns_stand_beside_the_codes_where_that_pays() -> None:
    """Sensitivities decide whether sink columns that the recipe would split off are worth their bytes."""
    recipe = Recipe().replace(["weights.group_size=32", "weights.method=rtn", "budget.solver=sensitivity",
                               "budget.bits=4", "protect.channels=split", "protect.max_share=1"])
    for gain, kept in ((1e-3, "split"), (1.01, None)):
        costs = sensitivity_of(SHAPE, {DOWN: 100.0})
        for unit in costs.units:
            if unit.modules == [DOWN]:
                unit.losses += [loss.model_copy(update={"columns": 1, "predicted": Terms(
                    **{name: gain * value for name, value in loss.predicted.model_dump().items()})})
                    for loss in unit.losses]
        plan = make_plan(SHAPE, SINKS, recipe, costs)
        assert plan.modules[DOWN].keep == kept
        assert plan.modules[DOWN].columns == ([3] if kept else [])
        assert ("beside the codes" in plan.modules[DOWN].reason) == bool(kept)
        assert plan.loads_in[0] == ("sinkquant" if kept else "transformers")
        assert linear_bits(plan) <= 4
    untried = make_plan(SHAPE, SINKS, recipe, sensitivity_of(SHAPE))
    assert (untried.modules[DOWN].keep, untried.modules[DOWN].bits) == ("split", recipe.weights.bits)
