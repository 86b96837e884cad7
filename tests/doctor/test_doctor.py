"""The tokenization audit, and what the doctor says of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from families import tiny_model
from planter import Plant, plant
from tiny_tokenizer import tiny_tokenizer, with_mask_in_front
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sinkquant.doctor import Audit, examine
from sinkquant.errors import RequestError

PLAIN = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
WITH_BOS = "<s> " + PLAIN


def audit(model: PreTrainedModel, text_file: Path, bos: Literal["none", "once", "twice"] = "once",
          has_bos: bool = True, template: str | None = None) -> Audit:
    tokenizer = tiny_tokenizer(bos, has_bos)
    tokenizer.chat_template = template
    return examine(model, tokenizer, str(text_file))


def test_a_sound_model_has_nothing_to_complain_about(tiny: PreTrainedModel, text_file: Path) -> None:
    found = audit(tiny, text_file)
    assert found.warnings == []
    assert found.tokenization["tokenizer"] == "<bos> is '<s>', id 1"
    assert found.tokenization["chat template"] == "there is none"
    assert found.support["detection"] == "yes: 3 blocks of LlamaForCausalLM"
    assert found.support["quantization"] == "21 of 21 weight matrices of the blocks"
    assert found.support["group sizes that fit all"] == "32, 64, -1 (per output channel)"
    assert found.support["4 bits run in"] == "transformers, vllm"
    assert found.support["one GGUF file for llama.cpp"].startswith("no: a GGUF file holds the tokenizer and the")
    other = audit(tiny_model("gpt2"), text_file).support
    assert other["4 bits run in"] == "sinkquant"
    assert "cannot be written of GPT2LMHeadModel" in other["one GGUF file for llama.cpp"]


@pytest.mark.parametrize(("added", "rows"), [("none", "none"), ("once", "once"), ("twice", "once")])
def test_bos_in_every_path(tiny: PreTrainedModel, text_file: Path, added: Literal["none", "once", "twice"],
                           rows: str) -> None:
    found = audit(tiny, text_file, added)
    assert found.tokenization["calibration"] == f"<bos> in front: {rows}"
    assert found.tokenization["evaluation"] == f"<bos> in front of every window: {rows}"
    assert found.tokenization["serving (plain text)"] == f"<bos> in front: {added}"
    assert any("two <bos> in front of plain text" in warning for warning in found.warnings) == (added == "twice")


def test_other_tokens_that_a_tokenizer_puts_in_front_are_named(tiny: PreTrainedModel, text_file: Path) -> None:
    (warning,) = examine(tiny, with_mask_in_front(), str(text_file)).warnings
    assert warning.startswith("the tokenizer puts <pad> </s> in front of a text, as serving does; rows of detection")
    assert warning.endswith("begin without it.")


@pytest.mark.parametrize(("added", "template", "direct", "again"), [
    ("once", PLAIN, 0, 1), ("once", WITH_BOS, 1, 2), ("none", WITH_BOS, 1, 1), ("none", PLAIN, 0, 0),
    ("none", "<s> " + WITH_BOS, 2, 2)])
def test_chat_templates(tiny: PreTrainedModel, text_file: Path, added: Literal["none", "once"], template: str,
                        direct: int, again: int) -> None:
    found = audit(tiny, text_file, added, template=template)
    assert found.tokenization["chat template"] == (
        f"<bos> in front: {direct}; rendered to text and tokenized again: {again}")
    assert any("tokenized again has two <bos>" in w for w in found.warnings) == (again > 1 and direct < 2)
    assert any("the chat template itself puts two <bos>" in w for w in found.warnings) == (direct > 1)


def test_a_chat_template_that_does_not_render(tiny: PreTrainedModel, text_file: Path) -> None:
    for template in ("{{ raise_exception('no') }}", "{% for %}"):
        found = audit(tiny, text_file, template=template)
        assert "does not render" in found.tokenization["chat template"]
        assert any("chat template" in warning for warning in found.warnings)


def test_a_tokenizer_without_bos(tiny: PreTrainedModel, text_file: Path) -> None:
    found = audit(tiny, text_file, "none", has_bos=False, template=PLAIN)
    assert found.tokenization["tokenizer"] == "has no <bos>"
    assert found.tokenization["chat template"].startswith("<bos> in front: 0")
    assert "measured" not in found.tokenization
    assert found.warnings == []


def test_config_and_tokenizer_that_disagree(text_file: Path) -> None:
    found = audit(tiny_model("llama", bos_token_id=7), text_file)
    assert any("config.json says bos_token_id 7, the tokenizer 1" in warning for warning in found.warnings)


def test_a_configuration_without_bos(text_file: Path) -> None:
    model = tiny_model("llama")
    del model.config.bos_token_id
    assert audit(model, text_file).warnings == []


def test_ids_beyond_the_embedding(text_file: Path) -> None:
    found = audit(tiny_model("llama", vocab_size=100), text_file)
    assert any("ids up to 127, but the model's embedding has only 100 rows" in w for w in found.warnings)
    assert "measured" not in found.tokenization


def test_the_worth_of_bos_is_measured(text_file: Path) -> None:
    """A model that needs its sink loses without <bos>; the doctor says so where the tokenizer adds none."""
    model = plant(tiny_model("llama"), Plant(1, None, frozenset({0, 1, 2, 3}), 20, 0))
    found = audit(model, text_file, "none")
    assert found.tokenization["measured"].startswith("loss ")
    assert "with <bos> in front" in found.tokenization["measured"]


def test_models_that_are_not_supported(text_file: Path) -> None:
    bloom = AutoConfig.for_model("bloom", vocab_size=128, hidden_size=64, n_layer=2, n_head=4)
    found = audit(AutoModelForCausalLM.from_config(bloom), text_file)
    assert found.support == {"detection": "no"}
    assert any("BloomForCausalLM is not supported" in warning for warning in found.warnings)
    assert found.tokenization["calibration"] == "<bos> in front: once"


def test_what_stays_in_16_bits_is_said(text_file: Path) -> None:
    assert audit(tiny_model("gpt2"), text_file).support["quantization"] == "12 of 12 weight matrices of the blocks"
    found = audit(tiny_model("gpt_oss"), text_file)
    assert found.support["quantization"].endswith("weight matrices of the blocks")
    assert not found.support["quantization"].startswith("12 of 12")
    assert any(key.startswith("left in 16 bits") for key in found.support)


def test_a_text_that_cannot_be_read_is_the_users_error(tiny: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot read the evaluation text"):
        examine(tiny, tiny_tokenizer(), str(tmp_path / "none.txt"))
