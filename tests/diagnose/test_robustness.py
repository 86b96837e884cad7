"""Attacks on a planted sink have the known effect; defences undo them; searches keep to their budget."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from families import FAMILIES, tiny_model
from planter import MARKER, Plant, plant
from tiny_tokenizer import tiny_tokenizer
from tokenizers import AddedToken
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sinkquant.artifacts import SinkToken
from sinkquant.artifacts.diagnosis import Check
from sinkquant.cache import make_prefix, prepare
from sinkquant.detect import detect
from sinkquant.diagnose import cache_defences as cache_module
from sinkquant.diagnose import robustness as module
from sinkquant.diagnose.cache_defences import cache_defences
from sinkquant.diagnose.robustness import (
    break_sink,
    fake_sink,
    has_learned_positions,
    past_the_context,
    robustness,
    run,
)
from sinkquant.diagnose.rows import with_bos
from sinkquant.diagnose.specials import special_token_paths
from sinkquant.diagnose.survey import WalkSettings
from sinkquant.errors import RequestError
from sinkquant.models import Decoder
from sinkquant.recipe import Recipe

COMPUTE = WalkSettings()
RIVAL = 60
"""A token that carries the marker of the sink too, stronger."""


def sink(token_id: int) -> SinkToken:
    return SinkToken(token_id=token_id, text=None, position=None, kind="token", attention=0.5, heads=0.5, share=0.1,
                     massive=True)


@pytest.fixture(scope="module")
def planted() -> PreTrainedModel:
    model = plant(tiny_model("llama", max_position_embeddings=64), Plant(1, None, frozenset({0, 1, 2, 3}), 20, 0))
    model.model.embed_tokens.weight.data[RIVAL, MARKER] = 0.6
    return model


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    return torch.randint(8, RIVAL, (4, 48), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def checks(planted: PreTrainedModel, text: torch.Tensor) -> list[Check]:
    return robustness(Decoder.of(planted), text, 1, [sink(1), sink(RIVAL)], COMPUTE, str)


def one(checks: list[Check], name: str, defended: bool = False) -> Check:
    return next(check for check in checks if check.name == name and (check.defence is not None) == defended)


def test_attacks_take_the_first_position_its_sink(checks: list[Check]) -> None:
    assert all(check.reference_sink_rate == pytest.approx(2 / 3) and check.finite for check in checks)
    assert one(checks, "omitted").sink_rate == 0
    assert one(checks, "moved").sink_rate == 0
    assert one(checks, "repeated").sink_rate == 0  # eight share what one had
    assert one(checks, "first position hidden").sink_rate == 0
    assert one(checks, "sink token injected").sink_rate == 0


def test_defences_give_back_the_untouched_run(checks: list[Check]) -> None:
    for name in ("omitted", "injected"):
        attacked, defended = one(checks, name), one(checks, name, defended=True)
        assert defended.loss == defended.reference_loss != attacked.loss
        assert defended.sink_rate == defended.reference_sink_rate


def test_a_hidden_first_position_is_read_by_nobody(planted: PreTrainedModel, text: torch.Tensor,
                                                   checks: list[Check]) -> None:
    rows = with_bos(text, 1, [0])
    length = rows.shape[1]
    mask = torch.ones(length, length).tril()
    mask[1:, 0] = 0
    with torch.no_grad():
        bias = torch.zeros(1, 1, length, length).masked_fill(mask == 0, torch.finfo(torch.float32).min)
        logits = planted(rows, attention_mask=bias, use_cache=False).logits.double()
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), rows[:, 1:], reduction="none")
    assert one(checks, "first position hidden").loss == pytest.approx(float(losses[:, -24:].mean()), rel=1e-5)


def test_loss_is_over_the_same_tokens(planted: PreTrainedModel, text: torch.Tensor, checks: list[Check]) -> None:
    with torch.no_grad():
        logits = planted(text, use_cache=False).logits.double()
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), text[:, 1:], reduction="none")
    assert one(checks, "omitted").loss == pytest.approx(float(losses[:, -24:].mean()), rel=1e-5)


def test_searches_find_the_planted_rival(planted: PreTrainedModel, text: torch.Tensor,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    rows = with_bos(text, 1, [0])
    rows[1:, 5] = RIVAL  # among the ids that may be tried
    runs: list[int] = []

    def counted(decoder: Decoder, tried: torch.Tensor, *rest: object, **options: bool) -> module.Outcome:
        runs.append(len(tried))
        return run(decoder, tried, *rest, **options)

    monkeypatch.setattr(module, "run", counted)
    monkeypatch.setattr(module, "CANDIDATES", 64)
    decoder = Decoder.of(planted)
    assert fake_sink(decoder, rows, 12, COMPUTE) == RIVAL
    assert RIVAL in break_sink(decoder, rows, 1, COMPUTE)
    assert len(runs) == 1 + module.SEARCHED_POSITIONS
    assert max(runs) <= 64


def test_outputs_that_are_not_finite_are_reported(planted: PreTrainedModel, text: torch.Tensor) -> None:
    def overflow(step: object) -> None:
        step.walk.hidden = step.walk.hidden * float("inf")

    outcome = run(Decoder.of(planted), text, COMPUTE, overflow)
    assert (outcome.losses, outcome.first, outcome.loss(slice(None))) == (None, None, None)


def test_past_the_context(planted: PreTrainedModel) -> None:
    long = torch.randint(8, RIVAL, (2, 128), generator=torch.Generator().manual_seed(3))
    past, without, kept = past_the_context(Decoder.of(planted), long, 1, COMPUTE)
    assert past.reference_loss == kept.loss == kept.reference_loss
    assert without.sink_rate == 0
    assert past.sink_rate > 0.5


def test_what_defends_in_a_packed_cache(text_file: Path) -> None:
    """The sink's key is one huge value among small ones: packed with the others it spoils their groups."""
    planted = plant(tiny_model("llama"), Plant(1, None, frozenset({0, 1, 2, 3}), 20, 0))
    text = torch.randint(8, 128, (4, 200), generator=torch.Generator().manual_seed(0))
    planted.lm_head.weight.data *= 40  # so that a change of what heads read changes the loss
    sink_map = detect(planted, tiny_tokenizer(), str(text_file), Recipe().replace(["detect.super_weights=false"]))
    attention = planted.config._attn_implementation
    notes: list[str] = []
    found = cache_defences(planted, text, 1, sink_map, planted, notes)
    assert [check.what for check in found] == ["the text"] * 3 + ["4 more <bos> in the first half"] * 3
    assert planted.config._attn_implementation == attention
    assert not planted._forward_pre_hooks
    undefended, pinned, prefix = (abs(check.loss - check.reference_loss) for check in found[:3])
    assert pinned < undefended
    assert prefix < undefended
    assert all(check.finite and check.sink_rate is None for check in found)
    original = copy.deepcopy(planted)
    held = prepare(copy.deepcopy(planted), make_prefix(planted, [1]))
    assert cache_defences(held, text[:1, :100], 1, sink_map, original, notes)[2].loss == cache_defences(
        planted, text[:1, :100], 1, sink_map, original, notes)[2].loss
    assert notes == []
    planted.model.embed_tokens.weight.data[1] *= 1.01  # what rounding does to it
    for other, why in ((planted, "token embedding or blocks"), (
            prepare(copy.deepcopy(original), make_prefix(original, [9, 1])), "KV prefix is of other tokens")):
        found = cache_defences(other, text[:1, :100], 1, sink_map, original, notes)
        assert [check.defence for check in found[:3]] == [None, "detected sinks pinned in the cache", None]
        assert f"this checkpoint's {why}" in notes[-1]


def test_too_large_a_model_is_not_copied(planted: PreTrainedModel, text: torch.Tensor,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="too short"):
        cache_defences(planted, text, 1, None, planted, [])
    monkeypatch.setattr(cache_module, "LARGEST", 10)
    with pytest.raises(RequestError, match="at most 10 parameters"):
        cache_defences(planted, text, 1, None, planted, [])


@pytest.mark.parametrize(("family", "learned"), [("gpt2", True), ("opt", True), ("llama", False), ("gemma2", False)])
def test_learned_positions_are_known(family: str, learned: bool) -> None:
    assert has_learned_positions(Decoder.of(tiny_model(family))) is learned


def test_a_model_without_bos_is_still_attacked(text: torch.Tensor) -> None:
    names = {check.name for check in robustness(Decoder.of(tiny_model("gpt2")), text, None, [], COMPUTE, str)}
    assert names == {"first position hidden", "embeddings perturbed", "sink broken by search", "sink faked by search"}


def test_special_tokens_in_user_text() -> None:
    tokenizer = tiny_tokenizer()
    found = special_token_paths(tokenizer)
    assert "<s>" in found["plain text"]
    assert found["plain text, split_special_tokens=True"] == "stay text"
    assert found["chat template"] == "there is none"
    tokenizer.chat_template = "{% for m in messages %}<s> {{ m['content'] }} </s>{% endfor %}"
    assert "<s>, </s>" in special_token_paths(tokenizer)["chat template"]
    # A template that cuts the strings out is safe.
    tokenizer.chat_template = ("{% for m in messages %}<s> {{ m['content'] | replace('<s>', '') | replace('</s>', '') "
                               "| replace('<unk>', '') | replace('<pad>', '') }}{% endfor %}")
    assert special_token_paths(tokenizer)["chat template"] == "stay text"
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|end|>", special=True)]})
    assert "<|end|>" in special_token_paths(tokenizer)["chat template"]


@pytest.mark.filterwarnings("ignore")  # transformers names kernels that are not installed
def test_blocks_without_attention_are_left_alone(text: torch.Tensor) -> None:
    """A convolution takes a mask of padding, not one of attention."""
    config = AutoConfig.for_model("lfm2", **FAMILIES["qwen3"] | {"layer_types": ["conv", "full_attention", "conv"]})
    found = robustness(Decoder.of(AutoModelForCausalLM.from_config(config).eval()), text, 1, [sink(1)], COMPUTE, str)
    assert all(check.finite for check in found)
    assert found


def test_a_template_that_refuses_a_lone_message_is_said() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('') if messages | length < 2 else '' }}"
    said = special_token_paths(tokenizer)
    assert said["chat template"].startswith("does not render one user message")
