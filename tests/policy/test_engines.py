"""The engine that a recipe names: plans that it runs, and refusals with what the engine table says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import tiny_mixture, tiny_model
from safetensors import safe_open
from sinkmaps import sink_map_of
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from sinkquant.artifacts import Plan
from sinkquant.errors import RequestError
from sinkquant.formats import load, quantize_to
from sinkquant.models import Decoder, open_model
from sinkquant.policy import accept_edited, make_control, make_plan, require_plannable
from sinkquant.policy.engines import engine_loads
from sinkquant.recipe import Recipe
from sinkquant.schemes import WeightFormat


def plan_of(model: PreTrainedModel, *settings: str) -> Plan:
    decoder = Decoder.of(model)
    recipe = Recipe().replace(["weights.group_size=32", *settings])
    require_plannable(decoder.shape("tiny"), recipe)
    return make_plan(decoder.shape("tiny"), sink_map_of(decoder, {"model.layers.1.mlp.down_proj": 0.9}), recipe)


@pytest.mark.parametrize(("engine", "settings"), [
    ("vllm-cuda", ()), ("vllm-cuda", ("weights.bits=3",)), ("vllm-cuda", ("activations.format=int8",)),
    ("vllm-cpu", ()), ("vllm-cpu", ("weights.bits=8", "weights.group_size=-1", "activations.format=int8")),
    ("transformers", ("weights.bits=3", "weights.group_size=16")), ("transformers", ("backend=bitsandbytes",
     "weights.format=nf4", "weights.group_size=64", "weights.method=rtn", "weights.descent=0"))])
def test_what_an_engine_runs_is_planned(engine: str, settings: tuple[str, ...], tiny: PreTrainedModel) -> None:
    plan = plan_of(tiny, f"engine={engine}", *settings)
    assert any(one.startswith(engine.partition("-")[0]) for one in plan.loads_in)
    assert accept_edited(plan, Decoder.of(tiny).shape("tiny")).modules == plan.modules


@pytest.mark.parametrize(("settings", "message"), [
    (("engine=vllm-cpu", "weights.bits=3"), r"vllm-cpu does not run integer weights of 3 bits in groups of 32 with "
     r"16-bit inputs \(model\.layers\.0\.self_attn\.q_proj\); of these it runs 4 bits, groups of 32, 64 or 128 or per "
     r"channel, 16-bit inputs; 8 bits, per channel, int8 inputs; 2 to 7 bits, per channel, int8 inputs: ask for one"),
    (("engine=vllm-cpu", "activations.format=int8"), "vllm-cpu does not run integer weights of 4 bits .* int8 inputs"),
    (("engine=vllm-cuda", "weights.group_size=16"), "vllm-cuda does not run integer weights of 4 bits in groups of 16"),
    (("engine=llama.cpp",), r"llama\.cpp does not run integer .* it runs blocks of a GGUF file \(backend=gguf\)"),
    (("engine=transformers", "backend=gptq"), "transformers does not run weights in GPTQ's format"),
    (("engine=transformers", "activations.format=int4"), "inputs in int4 are rounded by sinkquant alone"),
    (("engine=vllm-cuda", "protect.channels=split"), "vllm-cuda does not load columns beside the codes"),
    (("engine=vllm-cuda", "kv_cache.key_bits=2"), r"keeps its KV cache in 16 bits .* set kv_cache=null, or leave"),
    (("engine=vllm",), "engine")])
def test_what_it_does_not_run_is_refused(settings: tuple[str, ...], message: str, tiny: PreTrainedModel) -> None:
    with pytest.raises(RequestError, match=message):
        plan_of(tiny, *settings)


@pytest.mark.parametrize(("bits", "held"), [(8, 7), (4, 4)])
def test_on_a_cpu_int8_inputs_are_multiplied_with_bytes_that_none_saturates(
        bits: int, held: int, tiny: PreTrainedModel, tiny_folder: Path, tokenizer: PreTrainedTokenizerFast,
        tmp_path: Path) -> None:
    decoder = Decoder.of(tiny)
    shape, sink_map = decoder.shape("tiny"), sink_map_of(decoder, {"model.layers.1.mlp.down_proj": 0.9})
    recipe = Recipe().replace(["engine=vllm-cpu", f"weights.bits={bits}", "weights.group_size=-1", "weights.method=rtn",
                               "activations.format=int8", "protect.channels=module"])
    plan = make_plan(shape, sink_map, recipe)
    assert {one.bits for one in plan.modules.values()} == {held, 7}
    assert "vllm" in plan.loads_in  # on CUDA too
    control = make_control(shape, sink_map, recipe, plan)
    assert control.weight_bytes == plan.weight_bytes
    assert {one.bits for one in control.modules.values()} == {held}
    assert accept_edited(plan, shape).modules == plan.modules
    quantize_to(tmp_path / "out", open_model(tiny_folder), plan, tokenizer)
    assert sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")) == plan.weight_bytes
    name = "model.layers.0.mlp.up_proj"
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        codes = file.get_tensor(f"{name}.weight").int()
    assert codes.min() >= -2 ** (held - 1)
    assert codes.max() < 2 ** (held - 1)
    assert codes.abs().max() > 2 ** (held - 2)
    ours, plain = load(tmp_path / "out")[0], AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    groups = plain.config.quantization_config.quantization_config.config_groups.values()
    assert {(one.weights.num_bits, one.format, one.input_activations.num_bits) for one in groups} == {
        (8, "int-quantized", 8)}
    rows = torch.arange(16)[None]
    with torch.no_grad():
        assert torch.allclose(plain(rows).logits, ours(rows).logits, atol=1e-5)
    assert torch.equal(ours.get_submodule(name).weight,
                       load(tmp_path / "out", dtype=torch.float32)[0].get_submodule(name).weight)


def test_elsewhere_all_bits_of_the_byte_are_used(tiny: PreTrainedModel) -> None:
    plan = plan_of(tiny, "weights.bits=8", "weights.group_size=-1", "activations.format=int8")
    assert {one.bits for one in plan.modules.values()} == {8}
    assert "vllm" in plan.loads_in


def test_experts_go_by_the_names_that_vllm_asks_for() -> None:
    mixture = tiny_mixture("qwen3_moe")
    assert "vllm" in plan_of(mixture, "engine=vllm-cuda").loads_in
    with pytest.raises(RequestError, match="under names that end in _proj"):
        plan_of(mixture, "engine=vllm-cuda", "weights.ignore=['*.experts.*']")
    assert plan_of(mixture, "backend=gptq").loads_in == ["sinkquant"]  # its experts stay in 16 bits, stacked


def test_vllm_has_experts_of_4_and_8_bits() -> None:
    mixture = tiny_mixture("qwen3_moe")
    assert plan_of(mixture, "weights.bits=3").loads_in == ["transformers"]
    with pytest.raises(RequestError, match="integers in 4 or 8 bits, and this plan's are not"):
        plan_of(mixture, "engine=vllm-cuda", "weights.bits=3")
    spent = plan_of(mixture, "engine=vllm-cuda", "budget.bits=6.5", "budget.solver=even")
    assert spent.bits_per_weight > 5
    assert {one.bits for name, one in spent.modules.items() if ".experts." in name} == {4}


def test_a_budget_for_an_engine_takes_those_formats_alone() -> None:
    shape = Decoder.of(tiny_mixture("qwen3_moe")).shape("tiny")
    expert, linear = (shape.linears[f"model.layers.0.{name}"]
                      for name in ("mlp.experts.0.up_proj", "self_attn.q_proj"))
    assert [bits for bits in range(2, 9) if engine_loads("vllm-cuda", WeightFormat(bits, 32), expert)] == [4, 8]
    assert all(engine_loads("vllm-cuda", WeightFormat(bits, 32), linear) for bits in range(2, 9))
    assert engine_loads("transformers", WeightFormat(3, 32), expert)


@pytest.mark.parametrize("model", [tiny_model("gpt_neox"), tiny_mixture("mixtral")])
def test_tensors_that_vllm_has_other_names_for_load_elsewhere(model: PreTrainedModel) -> None:
    assert plan_of(model).loads_in == ["transformers"]
    for engine in ("engine=vllm-cuda", "budget.engine=vllm-cpu"):
        with pytest.raises(RequestError, match=rf"knows tensors of {type(model).__name__} by other names than trans"):
            require_plannable(Decoder.of(model).shape("tiny"), Recipe().replace([engine, "budget.bits=5"]))


def test_an_edited_plan_is_held_to_its_engine(tiny: PreTrainedModel) -> None:
    plan = plan_of(tiny, "engine=vllm-cpu")
    plan.modules["model.layers.0.mlp.down_proj"].bits = 5
    with pytest.raises(RequestError, match=r"vllm-cpu does not run integer weights of 5 bits .*0\.mlp\.down_proj"):
        accept_edited(plan, Decoder.of(tiny).shape("tiny"))


def test_the_control_need_not_run_in_it() -> None:
    model = tiny_model("llama", num_hidden_layers=6)
    decoder = Decoder.of(model)
    recipe = Recipe().replace(["weights.group_size=64", "engine=vllm-cuda", "protect.channels=module"])
    sink_map = sink_map_of(decoder, {"model.layers.3.mlp.down_proj": 0.9})
    aware = make_plan(decoder.shape("tiny"), sink_map, recipe)
    assert aware.modules["model.layers.3.mlp.down_proj"].bits == 8
    assert make_control(decoder.shape("tiny"), sink_map, recipe, aware).weight_bytes


def test_a_budget_that_is_spent_evenly_raises_to_what_the_engine_runs(tiny: PreTrainedModel) -> None:
    even = ("engine=vllm-cpu", "budget.solver=even", "weights.group_size=64")
    assert {one.group_size for one in plan_of(tiny, *even, "budget.bits=4.4").modules.values()} == {32, 64}
    plan = plan_of(tiny, *even, "budget.bits=9")
    assert {one.bits for one in plan.modules.values()} == {4, 16}
    assert plan.bits_per_weight > 7


def test_a_budget_is_solved_for_the_engine() -> None:
    assert Recipe().replace(["engine=vllm-cpu", "budget.bits=6"]).budget.engine == "vllm-cpu"
    assert Recipe().replace(["engine=vllm-cpu", "budget.bits=6"]).budget.solved
    assert not Recipe().replace(["engine=vllm-cpu", "budget.bits=6", "budget.solver=even"]).budget.solved
    assert Recipe().replace(["engine=vllm-cpu"]).budget.engine == "any"
