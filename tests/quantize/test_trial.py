"""The form of a checkpoint is tried on a tiny model of the same class before anything is computed."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate import init_empty_weights
from commands import call, one_sentence, settings
from families import FAMILIES, MIXTURES, tiny_mixture, tiny_model
from sinkmaps import sink_map_of
from small_runs import model_folder
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sinkquant.errors import RequestError
from sinkquant.models import Decoder
from sinkquant.policy import make_plan
from sinkquant.policy.choices import formats_asked
from sinkquant.quantize import quantize
from sinkquant.quantize.trial import require_loads
from sinkquant.recipe import Recipe


def tried(model: PreTrainedModel, *assignments: str) -> str:
    decoder = Decoder.of(model)
    shape = decoder.shape("")
    return require_loads(decoder, shape, formats_asked(shape, Recipe().replace(list(assignments))))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_loads_or_has_a_format_of_its_own(family: str) -> None:
    expected = "not tried: it is in sinkquant's own format" if family == "gpt2" else "yes"
    assert tried(tiny_model(family), "weights.group_size=32").startswith(expected)


@pytest.mark.parametrize("family", sorted(MIXTURES))
def test_so_does_every_mixture(family: str) -> None:
    assert tried(tiny_mixture(family), "weights.bits=8", "weights.group_size=-1") == "yes"


def test_layers_that_the_configuration_names_by_number_keep_their_kind() -> None:
    assert tried(tiny_mixture("qwen3_moe", num_hidden_layers=4, mlp_only_layers=[3]), "weights.group_size=32") == "yes"


def test_a_rotation_unties_the_head_of_a_packed_embedding() -> None:
    """The tiny model is not rotated, but its head is tied to nothing either."""
    model = tiny_model("llama", tie_word_embeddings=True)
    plan = make_plan(Decoder.of(model).shape(""), sink_map_of(Decoder.of(model)), Recipe().replace([
        "weights.rotate=full", "weights.embeddings=8", "weights.method=rtn", "weights.group_size=32"]))
    assert [end.bits for end in plan.ends.values()] == [8]
    quantize(model, plan)


def test_a_model_of_any_size_is_tried_in_no_memory() -> None:
    """Gemma 3 with its vision tower as published: 62 layers, sliding and full ones."""
    config = AutoConfig.for_model("gemma3", text_config={"num_hidden_layers": 62, "hidden_size": 5376})
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config)
    assert tried(model, "weights.group_size=128") == "yes"


def test_what_transformers_cannot_load_is_refused_by_name_before_any_compute(tmp_path: Path, text_file: Path) -> None:
    """transformers (5.23) asks ModernBERT's packed linears for the dense weight that they no longer have."""
    tiny = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3,
            "num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "cls_token_id": 1,
            "sep_token_id": 2}
    config = AutoConfig.for_model("modernbert-decoder", **tiny)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(RequestError, match=r"ModernBertDecoderForCausalLM cannot be quantized to integer weights"):
        tried(model, "weights.group_size=32")
    folder = model_folder(tmp_path / "model")
    model.save_pretrained(folder)
    failed = call("run", "w4a16-sink", "--model", folder, "--output", tmp_path / "out", *settings(text_file))
    assert failed.code == 2
    assert "ModernBertDecoder" in one_sentence(failed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    audit = call("doctor", folder, "--text", text_file)
    assert "checkpoint loads again" in audit.out
    assert "cannot be quantized" in audit.out
