"""Scales of channels: the model computes the same, and the scales are those of the papers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from exact_norms import exact_norms, jolt
from families import FAMILIES, tiny_mixture, tiny_model
from sinkmaps import sink_map_of
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sinkquant.artifacts import Plan
from sinkquant.errors import RequestError, SinkquantError
from sinkquant.models import Decoder, Step, Walk
from sinkquant.policy import make_plan
from sinkquant.quantize import ranks
from sinkquant.quantize.statistics import TokenWeights
from sinkquant.quantize.transforms import scale_block
from sinkquant.quantize.transforms.places import InputStatistics, Place, places, watch
from sinkquant.quantize.transforms.search import Reader
from sinkquant.quantize.transforms.smooth import STRENGTHS, awq, searched_smoothquant, sink_scale, smoothquant
from sinkquant.recipe import Recipe
from sinkquant.schemes import WeightFormat
from sinkquant.schemes.codecs.grid import to_integers

ROWS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))
CALIBRATION = torch.randint(3, 128, (4, 24), generator=torch.Generator().manual_seed(1))
CALIBRATION[:, 0] = 1
SETTINGS = ["weights.group_size=32", "weights.bits=3", "weights.scale_search=false"]


def planned(decoder: Decoder, *changes: str) -> Plan:
    found = sink_map_of(decoder, dict.fromkeys(decoder.linears, 0.5))
    return make_plan(decoder.shape("tiny"), found, Recipe().replace([*SETTINGS, *changes]))


def walked(decoder: Decoder, plan: Plan) -> Iterator[tuple[Step, TokenWeights]]:
    weights = TokenWeights(CALIBRATION, plan.calibration)
    for step in Walk(decoder, CALIBRATION, 2, dtype=decoder.model.dtype).steps():
        yield step, weights


def scaled(model: PreTrainedModel, *changes: str) -> set[str]:
    """Scale a model in place. Returns the parameters that have changed; those that are not packed are all written."""
    decoder = Decoder.of(model)
    plan = planned(decoder, *changes)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    written: set[str] = set()
    shape = decoder.shape("")
    for step, weights in walked(decoder, plan):
        written |= set(scale_block(decoder, step, plan, weights, shape))
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {name for name in changed if name.removesuffix(".weight") not in plan.formats} <= written
    return changed


def test_experts_that_are_packed_one_by_one_are_not_written_as_a_whole() -> None:
    decoder = Decoder.of(tiny_mixture("deepseek_v3"))
    plan, shape = planned(decoder, "weights.smooth=awq"), decoder.shape("")
    written = {name for step, weights in walked(decoder, plan)
               for name in scale_block(decoder, step, plan, weights, shape)}
    assert any(name.endswith("post_attention_layernorm.weight") for name in written)
    assert not [name for name in written if "experts." in name and "shared" not in name]


CASES = [(family, "weights.smooth=smoothquant") for family in FAMILIES if family != "gpt2"]
CASES += [(family, change) for family in ("llama", "gemma2", "opt", "mixtral")
          for change in ("weights.smooth=awq", "weights.smooth=searched", "protect.channels=scale")]


@pytest.mark.parametrize(("family", "change"), CASES)
def test_the_logits_are_the_same_in_float64(family: str, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = jolt(tiny_model(family, dtype=torch.float64))
    exact_norms(model, monkeypatch)
    with torch.no_grad():
        expected = model(ROWS).logits
    assert scaled(model, change, "weights.ignore=['*.1.*.q_proj']" if family == "qwen2" else "seed=0")
    with torch.no_grad():
        torch.testing.assert_close(model(ROWS).logits, expected, rtol=0, atol=1e-9)


def test_a_gain_is_rounded_as_it_is_stored_and_the_weights_take_the_rest() -> None:
    model = jolt(tiny_model("llama", dtype=torch.bfloat16))
    norm, reader = model.model.layers[0].input_layernorm, model.model.layers[0].self_attn.q_proj
    gain, weight = norm.weight.double(), reader.weight.double()
    decoder = Decoder.of(model)
    plan = planned(decoder, "weights.smooth=awq")
    weights = TokenWeights(CALIBRATION, plan.calibration)
    steps, shape = Walk(decoder, CALIBRATION, 2).steps(), decoder.shape("")
    scale_block(decoder, next(steps), plan, weights, shape)  # in float32
    assert torch.equal(norm.weight, norm.weight.bfloat16().float())
    assert not torch.equal(norm.weight.double(), gain)
    torch.testing.assert_close(norm.weight.double() * reader.weight.double(), gain * weight, rtol=1e-6, atol=1e-9)
    steps.close()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def seen(tiny: PreTrainedModel) -> tuple[list[Place], list[InputStatistics]]:
    """The places of the first block, and what goes through them with all tokens alike."""
    decoder = Decoder.of(tiny)
    plan = planned(decoder, "protect.statistics=all", "weights.smooth=awq")
    found = list(places(decoder.structure.blocks[0], values=True))
    walk = walked(decoder, plan)
    step, weights = next(walk)
    inputs = watch(decoder, step, found, weights, sampled=True)
    walk.close()  # type: ignore[attr-defined]
    assert all(one is not None for one in inputs)
    return found, [one for one in inputs if one is not None]


def test_what_goes_through_a_place_is_what_its_readers_get(tiny: PreTrainedModel,
                                                           seen: tuple[list[Place], list[InputStatistics]]) -> None:
    for place, inputs in zip(*seen, strict=True):
        got: list[torch.Tensor] = []
        handle = tiny.get_submodule(place.readers[0].module).register_forward_pre_hook(
            lambda _, args, got=got: got.append(args[0].flatten(0, -2).double()))
        with torch.no_grad():
            tiny(CALIBRATION)
        handle.remove()
        torch.testing.assert_close(inputs.mean.double(), got[0].abs().mean(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(inputs.largest.double(), got[0].abs().amax(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(inputs.hessian.mean(), got[0].T @ got[0] / len(got[0]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_smoothquant_is_equation_four(strength: float, seen: tuple[list[Place], list[InputStatistics]]) -> None:
    place, inputs = seen[0][1], seen[1][1]
    weights = [torch.randn(40, 64), torch.randn(24, 64)]
    found = smoothquant(place, inputs, weights, strength)
    reach = torch.cat(weights).abs().amax(0)
    torch.testing.assert_close(found, inputs.largest**strength / reach ** (1 - strength))


def test_heads_that_share_values_share_a_scale(seen: tuple[list[Place], list[InputStatistics]]) -> None:
    place, inputs = seen[0][0], seen[1][0]
    assert place.reads is not None
    weights = [torch.randn(64, 64)]
    found = smoothquant(place, inputs, weights, 1.0)
    assert found.shape == (32,)
    heads = inputs.largest.reshape(2, 2, 16)  # [kv heads, heads of each, head_dim]
    torch.testing.assert_close(found, heads.amax(1).flatten())
    torch.testing.assert_close(place.columns(found).reshape(2, 2, 16), heads.amax(1, keepdim=True).expand(-1, 2, -1))


def error(weight: torch.Tensor, scale: torch.Tensor, hessian: torch.Tensor) -> float:
    rounded = to_integers(3, 32, scale_search=False).quantize(weight * scale).dequantized().double() / scale
    return float(((rounded - weight) @ hessian @ (rounded - weight).T).trace())


def test_awq_takes_the_power_with_the_least_error(seen: tuple[list[Place], list[InputStatistics]]) -> None:
    place, inputs = seen[0][2], seen[1][2]
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(2))
    inputs = outlying(inputs)
    found = awq(place, inputs, [Reader(weight, WeightFormat(3, 32))], scale_search=False)
    errors = []
    for step in range(20):
        scale = inputs.mean ** (step / 20)
        scale = scale / (scale.max() * scale.min()).sqrt()
        errors.append(error(weight, scale, inputs.hessian.mean()))
    assert error(weight, found, inputs.hessian.mean()) == pytest.approx(min(errors), rel=1e-6)
    assert min(errors) < 0.9 * errors[0]


def test_the_searched_strength_leaves_the_least_error_of_rounded_inputs_and_weights(
        seen: tuple[list[Place], list[InputStatistics]]) -> None:
    place, inputs = seen[0][2], outlying(seen[1][2])
    weight, tokens = torch.randn(48, 64, generator=torch.Generator().manual_seed(2)), inputs.tokens()
    form = WeightFormat(8, -1, inputs="int8", input_scale="token")
    found = searched_smoothquant(place, inputs, [weight], [Reader(weight, form)], scale_search=False)

    def off(scale: torch.Tensor) -> float:
        given = (tokens / scale).double()
        step = given.abs().amax(1, keepdim=True) / 127.5
        rounded = to_integers(8, -1, scale_search=False).quantize(weight * scale).dequantized().double()
        wanted = tokens.double() @ weight.double().T
        left = ((given / step).round().clamp(-128, 127) * step) @ rounded.T - wanted
        return float((left.square().sum(1) / wanted.square().sum(1)).mean())

    scales = [torch.ones(64), *(smoothquant(place, inputs, [weight], strength) for strength in STRENGTHS)]
    errors = [off(scale) for scale in scales]
    assert off(found) == pytest.approx(min(errors), rel=0.02)
    assert min(errors) < 0.95 * errors[0]
    assert len({round(error, 9) for error in errors}) == len(errors)


def outlying(inputs: InputStatistics) -> InputStatistics:
    """The same with a channel that is fifty times as large."""
    other = InputStatistics(64, torch.device("cpu"), sampled=True)
    rows = torch.linalg.cholesky(inputs.hessian.mean() + 1e-9 * torch.eye(64, dtype=torch.float64)).T.float() * 8
    rows[:, 9] *= 50
    other.add(rows, torch.ones(len(rows)))
    return other


def test_sink_columns_alone_are_scaled_and_their_error_falls(seen: tuple[list[Place], list[InputStatistics]]) -> None:
    place, inputs = seen[0][2], outlying(seen[1][2])
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(2))
    found = sink_scale(place, inputs, [Reader(weight, WeightFormat(3, 32))], {9}, scale_search=False)
    assert found[9] > 1.5
    assert (torch.cat([found[:9], found[10:]]) == 1).all()
    assert error(weight, found, inputs.hessian.mean()) < 0.9 * error(weight, torch.ones(64), inputs.hessian.mean())


def test_where_scales_are_searched_the_error_is_that_of_clipped_ranges(
        seen: tuple[list[Place], list[InputStatistics]]) -> None:
    place, inputs = seen[0][2], outlying(seen[1][2])
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(2)) ** 3
    reader = Reader(weight, WeightFormat(2, 32))
    plain, searched = (awq(place, inputs, [reader], search) for search in (False, True))
    assert not torch.equal(plain, searched)


@pytest.mark.parametrize("massive", [0, 30, 300])
def test_a_block_that_computes_something_else_than_its_names_say_is_noticed(massive: float) -> None:
    """Beside a massive activation too, which the error of every other token is small against."""
    model = jolt(tiny_model("llama"))
    model.get_input_embeddings().weight.data[CALIBRATION[0, 0], 7] += massive
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: mlp.down_proj((mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)).sign())
    with pytest.raises(SinkquantError, match=r"model.layers.0 does not compute the same"):
        scaled(model, "weights.smooth=smoothquant")
    mlp.ffn_sub_norm = torch.nn.LayerNorm(128)
    assert not Decoder.of(model).structure.blocks[0].inner


def test_what_sinks_weigh_moves_the_scales() -> None:
    def weights(policy: str) -> torch.Tensor:
        model = tiny_model("llama")
        model.get_input_embeddings().weight.data[1] *= 30
        scaled(model, "weights.smooth=awq", f"protect.statistics={policy}")
        return model.model.layers[0].mlp.down_proj.weight

    every = weights("all")
    assert torch.equal(every, weights("all"))
    assert not torch.allclose(every, weights("boost"))


def test_scales_are_refused_under_several_processes(monkeypatch: pytest.MonkeyPatch, tiny: PreTrainedModel) -> None:
    monkeypatch.setattr(ranks, "this_rank", lambda: (0, 2))
    decoder = Decoder.of(tiny)
    ranks.my_rows(CALIBRATION, planned(decoder, "weights.rotate=full"))
    with pytest.raises(RequestError, match=r"weights\.smooth and protect\.channels=scale"):
        ranks.my_rows(CALIBRATION, planned(decoder, "weights.smooth=awq"))


def test_values_that_something_else_reads_are_left_alone() -> None:
    """Doge makes a mask of its values."""
    config = AutoConfig.for_model("doge", **FAMILIES["llama"])
    blocks = Decoder.of(AutoModelForCausalLM.from_config(config)).structure.blocks
    assert all(block.values is None for block in blocks)


def test_experts_of_llama_4_are_read_the_way_they_are_stored() -> None:
    settings = FAMILIES["mixtral"] | {"head_dim": 16, "intermediate_size_mlp": 128, "interleave_moe_layer_step": 1}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama4_text", **settings))
    experts = [matrix for block in Decoder.of(model).structure.blocks for matrix in block.writes
               if ".experts." in matrix.weight]
    assert experts
    assert all(matrix.transposed for matrix in experts)
