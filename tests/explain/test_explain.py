"""Causes outside one module: rounding that is spread, configuration, numbers that overflow, rounded inputs, nothing at
all; what a change is verified to do; and the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import quantized
from commands import call
from families import tiny_mixture, tiny_model
from gguf_files import write_gguf
from tiny_tokenizer import tiny_tokenizer
from transformers import PreTrainedModel

import sinkquant as sq
from sinkquant.artifacts.explanation import Cause
from sinkquant.errors import RequestError
from sinkquant.explain.parts import different_parts, first_block, put_back
from sinkquant.explain.probe import Probe
from sinkquant.explain.remedies import appended, remedy
from sinkquant.explain.settings import changes, finite_cause
from sinkquant.explain.stream import from_block, recorded
from sinkquant.explain.verify import verified
from sinkquant.models import load_model, read_text, token_rows
from sinkquant.recipe import Recipe
from sinkquant.report.explained import markdown

SMALL = ["detect.rows=8", "detect.long_rows=1"]


def explained(folder: Path, baseline: Path, text: Path, **more: object) -> sq.Explanation:
    return sq.explain(folder, baseline, text=text, rows=2, length=32, **{"sinks": False, **more})


def written(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """Every linear of the blocks rounded to 2 bits, with the recipe beside it."""
    folder = tmp_path_factory.mktemp("rounded") / "w2"
    model, _, sink_map = quantized(text_file, bits=2)
    recipe = sq.Recipe().replace(["weights.method=rtn", "weights.bits=2", "weights.group_size=32",
                                  "calibration.rows=4", "calibration.length=16", f"calibration.text={text_file}"])
    return sq.save(model, tiny_tokenizer(), folder, sink_map, recipe)


def test_loss_that_is_spread_is_told_by_role_and_the_change_is_verified(rounded, tiny_folder, text_file):
    found = explained(rounded, tiny_folder, text_file, sinks=True, verify=True)
    assert sum(one.first_order for one in found.modules) == pytest.approx(found.kl, rel=0.05)
    assert sum(one.first_order for one in found.layers) == pytest.approx(sum(one.first_order for one in found.roles))
    assert found.facts["removed by the largest together"] > max(one.removes or 0 for one in found.modules)
    assert all(one.kl_after == pytest.approx(found.kl * (1 - one.removes)) for one in found.causes)
    shares = [one.removes for one in found.causes]
    assert shares == sorted(shares, reverse=True)
    role = next(one for one in found.causes if one.kind == "role")
    assert role.where in found.sentence or found.causes[0] is not role
    assert f"--set 'weights.overrides=[{{pattern: \"*.{role.where}\", bits: 8}}]'" in markdown(found)
    assert role.recipe == [f"weights.overrides=[{{pattern: '*.{role.where}', bits: 8}}]"]
    assert role.verified is not None
    assert 0 < role.verified.removes < 1
    assert role.verified.kl == pytest.approx(found.kl * (1 - role.verified.removes))
    assert found.sinks in ("kept", "changed", "destroyed", "no sinks")


def test_the_recipe_s_own_lists_stay_in_a_change() -> None:
    recipe = Recipe().replace(["weights.overrides=[{pattern: '*.o_proj', bits: 8}]",
                               r"weights.ignore=['re:.*\.q_proj']"])
    changed = recipe.replace(appended(["weights.overrides=[{pattern: '*.down_proj', bits: 8}]",
                                       "weights.ignore=['*.k_proj', '*.v_proj']", "weights.bits=5"], recipe))
    assert [one.pattern for one in changed.weights.overrides] == ["*.o_proj", "*.down_proj"]
    assert changed.weights.ignore == [r"re:.*\.q_proj", "*.k_proj", "*.v_proj"]
    assert changed.weights.bits == 5


@pytest.mark.parametrize(("kind", "settings", "expected"), [
    ("module", [], ["weights.overrides=[{pattern: 'a.up_proj', bits: 8}]"]),
    ("role", ["weights.overrides=[{pattern: '*.up_proj', bits: 8}]"],
     ['weights.overrides=[{"pattern": "*.up_proj", "bits": 8}, {"pattern": "a.up_proj", "bits": 16}]']),
    ("columns", [r"weights.ignore=['re:.*\.q']"], [r'weights.ignore=["re:.*\\.q", "a.up_proj"]']),
    ("module", ["backend=gptq"], ["weights.overrides=[{pattern: 'a.up_proj', bits: 16}]"]),
    ("super weight", ["backend=gptq"], ["weights.overrides=[{pattern: 'a.up_proj', bits: 16}]"]),
    ("super weight", [], ["protect.channels=split", "protect.modules=['a.up_proj']"]),
    *[("super weight", [one], ["weights.overrides=[{pattern: 'a.up_proj', bits: 8}]"]) for one in (
        "weights.lm_head=8", "weights.embeddings=8", "kv_cache_scheme={}", "engine=vllm-cuda")],
    ("sink columns", ["activations.format=int8"], ["weights.overrides=[{pattern: 'a.up_proj', bits: 8}]"]),
    ("module", ["weights.format=nvfp4"], ["weights.overrides=[{pattern: 'a.up_proj', bits: 16}]"]),
    ("module", ["protect.modules=['re:up']", "protect.bits=16"], []), ("columns", ["weights.ignore=['*.up_proj']"], []),
    ("super weight", ["protect.channels=split"], ["protect.modules=['a.up_proj']"]),
    ("outlier scale", [], ["weights.group_size=32"]), ("outlier scale", ["weights.group_size=32"], []),
    ("outlier scale", ["weights.group_size=-1"], ["weights.group_size=32"]),
    ("embedding", ["weights.embeddings=8"], ["weights.embeddings=16"]), ("embedding", ["weights.lm_head=8"], []),
    ("both ends", ["weights.lm_head=8"], ["weights.lm_head=16"]),
    ("both ends", ["backend=gguf", "weights.format=iq4_nl", "weights.ends=q8_0"], ["weights.ends=16-bit"]),
    ("kv cache", ["kv_cache.key_bits=8"], ["kv_cache.key_bits=16", "kv_cache.value_bits=3"]),
    ("kv cache", ["kv_cache.bits=3.5"], ["kv_cache.bits=4"]),
    ("inputs", ["activations.format=int8", "activations.bits=9"],
     ["activations.bits=null", "activations.format=16-bit"]),
    ("sinks", [], []), ("sinks", ["protect.tokens=false"], ["protect.tokens=true"])])
def test_a_change_is_one_of_the_recipe_at_hand(kind: str, settings: list[str], expected: list[str]) -> None:
    recipe = Recipe().replace(settings)
    assert remedy(kind, "a.up_proj", recipe)["recipe"] == expected
    assert not expected or recipe.replace(expected) != recipe


def test_columns_stand_beside_the_codes_where_experts_are_in_16_bits() -> None:
    recipe, experts = Recipe(), ["a.experts.0.up_proj"]
    assert remedy("super weight", "a.o_proj", recipe, experts)["recipe"][0].startswith("weights.overrides=")
    recipe = recipe.replace(["weights.ignore=['*.experts.*']"])
    assert remedy("super weight", "a.o_proj", recipe, experts)["recipe"][0] == "protect.channels=split"


def test_the_change_of_a_mixture_is_carried_out(text_file, tmp_path):
    """Its parts are the parameters of all experts; a plan names every expert's."""
    model = tiny_mixture("qwen3_moe")
    base = written(model, tmp_path / "base")
    with torch.no_grad():
        for name, one in model.named_parameters():
            if ".experts." in name:
                one.copy_((one / 0.02).round() * 0.02)
    recipe = Recipe().replace(["weights.method=rtn", "weights.group_size=32", *SMALL])
    found = explained(written(model, tmp_path / "other"), base, text_file, verify=True, recipe=recipe)
    changed = [one for one in found.causes if ".experts." in one.where and one.recipe]
    assert changed
    assert all(".experts.*'" in one.recipe[0] and one.verified for one in changed)


@pytest.mark.parametrize(("rotate", "stored", "measured"), [
    ("none", torch.bfloat16, torch.float32), ("full", torch.bfloat16, torch.float32),
    ("none", torch.float32, torch.float16)])
def test_a_change_is_verified_in_the_dtype_of_the_measurement(rotate, stored, measured, text_file, tmp_path):
    """A recipe that is not changed gives back the loss of the checkpoint that was made with it, its prefix too."""
    base = written(tiny_model("llama", dtype=stored), tmp_path / "base")
    model, tokenizer = sq.load(base)
    recipe = Recipe().replace(["weights.method=rtn", "weights.bits=4", "weights.group_size=32",
                               f"weights.rotate={rotate}", "kv_cache.prefix=bos", "kv_cache.group_size=32", *SMALL])
    known = sq.detect(model, tokenizer, text=str(text_file), recipe=recipe)
    sq.quantize(model, sq.plan(model, known, recipe), tokenizer)
    folder = sq.save(model, tokenizer, tmp_path / "w8", known, recipe)
    original, made = load_model(base, measured), sq.load(folder, measured)[0]
    rows = token_rows(tokenizer, read_text(text_file, "evaluation"), 2, 32, "never")
    probe = Probe.of(original, rows, (1,), (1,), sq.plan(sq.load(base)[0], known, recipe).kv_cache)
    cause = Cause(kind="module", where="", sentence="", removes=0.1, kl_after=0.1, recipe=["seed=0"])
    loss = probe.loss(made)
    found = verified(cause, recipe, lambda: load_model(base, "auto"), tokenizer, known, probe, loss).verified
    assert found is not None
    assert found.kl == pytest.approx(loss, rel=0.2)


def test_a_value_of_the_configuration_is_named(tiny_folder, text_file, tmp_path):
    model = tiny_model("llama")
    model.config.rope_parameters["rope_theta"] = 100.0
    model.config.rms_norm_eps = 0.5
    found = explained(written(model, tmp_path / "other"), tiny_folder, text_file)
    assert [one.name for one in found.settings] == ["rms_norm_eps", "rope_parameters"]
    assert {one.where for one in found.causes} == {"config.json: rms_norm_eps", "config.json: rope_parameters"}
    assert found.causes[0].where == "config.json: rms_norm_eps"
    assert found.causes[0].removes > 0.5 > found.causes[1].removes


def test_what_a_folder_calls_its_weights_is_no_value_of_the_model() -> None:
    named = tiny_model("llama").config
    named.transformers_weights = "mine.safetensors"
    assert changes(named, tiny_model("llama").config) == []


def test_numbers_of_heads_are_put_right_together(tiny_folder, text_file, tmp_path):
    """No weight fits one of them alone."""
    model = tiny_model("llama")
    model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim = 2, 1, 32
    found = explained(written(model, tmp_path / "other"), tiny_folder, text_file, sinks=True)
    assert "the checkpoint has other numbers of heads, so that sinks were not compared" in found.notes
    (cause,) = found.causes
    assert cause.where == "config.json: head_dim, num_attention_heads, num_key_value_heads"
    assert "num_attention_heads 2, num_key_value_heads 1 where the baseline says 16, 4, 2" in cause.sentence
    assert cause.removes == pytest.approx(1)


def test_a_value_is_put_right_beside_a_packed_cache_with_its_prefix(text_file, tmp_path):
    base = written(tiny_model("llama"), tmp_path / "base")
    model, tokenizer = sq.load(base)
    recipe = Recipe().replace(["weights.method=rtn", "weights.bits=8", "weights.group_size=32", "kv_cache.prefix=bos",
                               "kv_cache.group_size=32", *SMALL])
    known = sq.detect(model, tokenizer, text=str(text_file), recipe=recipe)
    sq.quantize(model, sq.plan(model, known, recipe), tokenizer)
    folder = Path(sq.save(model, tokenizer, tmp_path / "w8", known, recipe))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rope = config["rope_parameters"] | {"rope_theta": 100.0}  # by which a prefix knows its model
    wrong = {"rms_norm_eps": 0.5, "rope_parameters": rope}
    (folder / "config.json").write_text(json.dumps(config | wrong), encoding="utf-8")
    found = explained(folder, base, text_file)
    assert found.causes[0].where == "config.json: rms_norm_eps"
    assert found.causes[0].removes > 0.5


def test_a_value_that_changes_nothing_removes_nothing_where_inputs_are_rounded(tiny_folder, text_file, tmp_path):
    model, _, sink_map = quantized(text_file, bits=8, group=-1, more=("activations.format=int8",))
    model.config.attention_dropout = 0.25
    folder = sq.save(model, tiny_tokenizer(), tmp_path / "w8a8", sink_map)
    found = explained(folder, tiny_folder, text_file)
    (cause,) = [one for one in found.causes if one.kind == "configuration"]
    assert cause.where == "config.json: attention_dropout"
    assert cause.removes == pytest.approx(0, abs=1e-6)
    assert cause.kl_after == pytest.approx(found.kl)


def test_a_packed_checkpoint_in_float16_is_tried_in_it(text_file, tmp_path):
    base = written(tiny_model("llama", dtype=torch.float16), tmp_path / "base")
    model, _, sink_map = quantized(text_file, bits=2, dtype=torch.float16)
    found = explained(sq.save(model, tiny_tokenizer(), tmp_path / "w2", sink_map), base, text_file)
    assert found.kl > 0
    assert all(one.kind != "not finite" for one in found.causes)


def test_blocks_that_give_a_tuple_and_a_short_text(text_file, tmp_path):
    model, short = tiny_model("falcon_h1"), tmp_path / "short.txt"
    base = written(model, tmp_path / "base")
    with torch.no_grad():
        for name, one in model.named_parameters():
            if "feed_forward" in name:
                one.copy_((one / 0.02).round() * 0.02)
    short.write_text(" ".join(text_file.read_text(encoding="utf-8").split()[:90]), encoding="utf-8")
    recipe = Recipe().replace([*SMALL, f"calibration.text={text_file}"])
    found = explained(written(model, tmp_path / "other"), base, short, sinks=True, recipe=recipe)
    assert found.causes[0].removes > 0
    assert found.sinks is not None


def test_matrices_that_are_stored_the_other_way_round_are_read_by_row(text_file, tmp_path):
    model = tiny_model("gpt2", n_embd=128, n_inner=512)
    base = written(model, tmp_path / "base")
    with torch.no_grad():
        for block in model.transformer.h:
            weight = block.mlp.c_proj.weight
            groups = weight.T.reshape(128, -1, 32)
            scale = groups.abs().amax(-1, keepdim=True) / 3
            weight.copy_(((groups / scale).round() * scale).reshape(128, 512).T)
    found = explained(written(model, tmp_path / "other"), base, text_file)
    assert any("mlp.c_proj is rounded to 3 bits" in one.sentence for one in found.causes)


def test_the_first_row_that_breaks_tells_the_module(tiny_folder, text_file, tmp_path):
    """One token's embedding is not finite, and the first row may lack it."""
    model = tiny_model("llama")
    rows = torch.tensor([[1, 9, 10, 11], [1, 9, 127, 11]])
    probe = Probe.of(model, rows[:, 1:], (1,), (1,))
    with torch.no_grad():
        model.model.embed_tokens.weight[127] = torch.nan
    cause = finite_cause(model, probe, probe.kl(model), None)
    assert cause is not None
    assert cause.where == "model.embed_tokens"


def test_float16_that_overflows_is_named(tiny_folder, text_file, tmp_path):
    """In float32 the model is sound, and predicts what the baseline does."""
    model = tiny_model("llama")
    for block in model.model.layers:
        block.mlp.up_proj.weight.data *= 2.0 ** 13
        block.mlp.down_proj.weight.data *= 2.0 ** 13
    base = written(model.half().float(), tmp_path / "base")
    found = explained(written(model.half(), tmp_path / "half"), base, text_file)
    assert found.kl == 0
    assert found.causes[0].kind == "not finite"
    assert "float16" in found.sentence


def test_the_same_model_loses_nothing(tiny_folder, text_file, tmp_path):
    found = explained(written(tiny_model("llama"), tmp_path / "same"), tiny_folder, text_file)
    assert found.kl == 0
    assert not found.causes
    assert found.sentence.startswith("Nothing is lost")


def test_the_command_on_a_gguf_file(tiny_folder, text_file, tmp_path):
    """Its tokenizer is another one, so that what is read differs; its weights are rounded in blocks of 32."""
    path = tmp_path / "tiny.gguf"
    write_gguf(path, "Q4_0")
    arguments = ["explain", path, "--baseline", tiny_folder, "--text", text_file, "--rows", 2, "--length", 32,
                 "--no-sinks"]
    done = call(*arguments, "-o", tmp_path / "why.md")
    assert done.code == 0, done.err
    assert "1. " in done.out
    assert "token ids of the text" in (tmp_path / "why.md").read_text(encoding="utf-8")
    found = json.loads(call(*arguments, "--json").out)
    assert found["schema"] == "sinkquant/explanation@1"
    assert found["modules"]
    found = explained(tiny_folder, path, text_file)
    assert "tiny.gguf, where they were quantized before (Q4_0)" in found.notes[0]


def test_another_model_is_refused(tiny_folder, text_file, tmp_path):
    folder = written(tiny_model("llama", num_hidden_layers=2), tmp_path / "smaller")
    done = call("explain", folder, "--baseline", tiny_folder, "--text", text_file)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "not that model quantized" in done.err


def test_a_change_is_measured_from_its_block_on_to_the_same_bits(rounded, tiny_folder, text_file):
    """The blocks before it are not run again, and nothing changes by that."""
    base, model = sq.load(tiny_folder, torch.float32)[0], sq.load(rounded, torch.float32)[0]
    rows = token_rows(tiny_tokenizer(), read_text(text_file, "evaluation"), 2, 16, "never")
    probe = Probe.of(base, rows, (), ())
    with recorded(model) as stream:
        probe.kl(model)
    assert len(stream) == len(rows)
    last = len(stream[0]) - 1
    parts = [part for part in different_parts(base, model) if part.layer == last]
    with put_back(parts):
        whole = probe.kl(model)
        with from_block(model, stream, first_block(parts)):
            assert torch.equal(probe.kl(model), whole)
    assert first_block(parts) == last > 0
    assert not torch.equal(probe.kl(model), whole)
    assert len(probe.stream) == len(rows)


def test_a_model_with_fewer_blocks_is_sent_to_compare() -> None:
    whole = tiny_model("llama")
    shorter = tiny_model("llama", num_hidden_layers=whole.config.num_hidden_layers - 1)
    with pytest.raises(RequestError, match=r"blocks and the baseline \d+: .* quantize-model compare takes it"):
        different_parts(whole, shorter)
