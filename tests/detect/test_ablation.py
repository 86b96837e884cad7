"""No-op heads are found where they were planted, on every text, and confirmed by taking them out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detect_helpers import small_recipe, write_text
from families import FAMILIES, tiny_model
from planter import Plant, _views, plant
from tiny_tokenizer import tiny_tokenizer
from transformers import PreTrainedModel

from sinkquant import Recipe, SinkMap
from sinkquant.detect import detect
from sinkquant.detect.ablation import HeadAblator, no_ops
from sinkquant.errors import RequestError
from sinkquant.models import Decoder, Walk, head_columns, weight_matrix
from sinkquant.policy import make_control, make_plan

HEADS = frozenset({0, 2})


def resting(family: str = "llama") -> PreTrainedModel:
    """Heads 0 and 2 of the layers after the first rest on `<s>`, and write next to nothing."""
    model = plant(tiny_model(family, **({} if family in ("gpt2", "opt", "gpt_neox") else {"num_key_value_heads": 4})),
                  Plant(1, None, HEADS, 20, 0))
    for block in Decoder.of(model).blocks[1:]:
        values(model, block)[[0, 2]] *= 0.01
    return model


def values(model: PreTrainedModel, block: torch.nn.Module) -> torch.Tensor:
    """Writable value rows of a block, [heads, head_dim, hidden]."""
    heads, hidden = model.config.num_attention_heads, model.config.hidden_size
    if model.config.model_type == "gpt2":
        return block.attn.c_attn.weight.data.T.view(3, heads, -1, hidden)[2]
    if model.config.model_type == "gpt_neox":
        return block.attention.query_key_value.weight.data.view(heads, 3, -1, hidden)[:, 2]
    if model.config.model_type == "phi3":
        return block.self_attn.qkv_proj.weight.data.chunk(3)[2].view(heads, -1, hidden)
    return block.self_attn.v_proj.weight.data.view(heads, -1, hidden)


def recipe(tmp_path: Path, *more: str) -> Recipe:
    text = write_text(tmp_path)
    return small_recipe("prune.heads=no-op", "detect.no_op_sink_score=0.6", "weights.group_size=32",
                        f"calibration.text={text}", f"evaluate.text={text}", *more)


def look(tmp_path: Path, model: PreTrainedModel) -> tuple[SinkMap, Recipe]:
    asked = recipe(tmp_path)
    return detect(model, tiny_tokenizer(), recipe=asked, name="tiny"), asked


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_exactly_the_planted_heads_are_found(family: str, tmp_path: Path) -> None:
    model = resting(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found, _ = look(tmp_path, model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert found.head_ablations is not None
    assert found.head_ablations.texts == ["calibration", "evaluation"]
    assert {(one.layer, one.head) for one in found.head_ablations.heads} == {
        (layer, head) for layer in (1, 2) for head in HEADS}
    changes = [one.loss_change for one in found.head_ablations.heads]
    assert changes == sorted(changes)
    assert all(0 < one.loss_change <= one.together + 1e-6 < 0.05 for one in found.head_ablations.heads)
    assert len(found.head_ablations.weights) == 3
    assert found.head_ablations.rows == 12


def test_what_an_ablation_changes_is_what_zeroed_weights_change(tmp_path: Path) -> None:
    model = resting()
    decoder, settings = Decoder.of(model), recipe(tmp_path).detect
    rows = torch.randint(8, 128, (4, 20), generator=torch.Generator().manual_seed(0))
    places = [(0, 1), (2, 3)]
    found = HeadAblator(decoder, settings, "cpu", torch.float32).trials(rows, [[places[0]], [places[1]], places])

    def losses() -> torch.Tensor:
        with torch.no_grad():
            logits = model(rows).logits.double()
        return torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), rows[:, 1:], reduction="none")

    base = losses()
    for trial, (change, _) in zip([[places[0]], [places[1]], places], found, strict=True):
        for layer, head in trial:
            name, parts = head_columns(decoder, layer)
            weight_matrix(decoder.linears[name])[:, parts[head]] = 0
        assert change == pytest.approx(float((losses() - base).abs().mean()), rel=1e-3)
        model.load_state_dict(resting().state_dict())


def test_a_head_that_wakes_on_one_text_stays(tmp_path: Path) -> None:
    model = resting()
    found, asked = look(tmp_path, model)
    decoder = Decoder.of(model)
    # The second text holds no <s>: nothing there rests.
    texts = {"calibration": torch.cat([torch.ones(8, 1), torch.randint(8, 128, (8, 31))], 1).long(),
             "evaluation": torch.randint(8, 128, (8, 32))}
    ablator = HeadAblator(decoder, asked.detect, "cpu", torch.float32)
    assert no_ops(found.heads)
    assert ablator.run(found.heads, texts, lambda rows: rows == 1).heads == []


def test_a_head_that_makes_a_massive_activation_stays_unless_told(tmp_path: Path) -> None:
    """A no-op by what it gives to the output projection, whose columns make it large in one channel."""
    model, channel = resting(), 33
    found, asked = look(tmp_path, model)
    decoder = Decoder.of(model)
    weight = model.model.layers[1].self_attn.o_proj.weight.data
    weight[channel, :16] *= 1e5
    texts = {"calibration": torch.cat([torch.ones(8, 1), torch.randint(8, 128, (8, 31))], 1).long()}
    ablators = [HeadAblator(decoder, asked.detect, "cpu", torch.float32, channel=channel, massive=massive)
                for massive in (False, True)]
    guarded, told = (one.run(found.heads, texts, lambda rows: rows == 1) for one in ablators)
    assert [(one.layer, one.head) for one in guarded.spared] == [(1, 0)]
    assert guarded.spared[0].massive_left < 0.5
    assert (1, 0) not in {(one.layer, one.head) for one in guarded.heads}
    assert (1, 0) in {(one.layer, one.head) for one in told.heads}
    assert told.spared == []
    assert all(one.massive_left == pytest.approx(1, abs=0.1) for one in guarded.heads)
    plan = make_plan(decoder.shape("tiny"), found.model_copy(update={"head_ablations": guarded}), asked)
    assert "head 0 of layer 1" in plan.notes[-1]
    assert "prune.massive=true takes them out" in plan.notes[-1]


def test_the_plan_takes_out_what_stays_under_the_bound(tmp_path: Path) -> None:
    model = resting()
    found, asked = look(tmp_path, model)
    assert found.head_ablations is not None
    shape = Decoder.of(model).shape("tiny")
    plan = make_plan(shape, found, asked)
    assert len(plan.silenced_heads) == 4
    assert "a no-op on every text (calibration, evaluation)" in plan.silenced_heads[0].reason
    assert plan.modules["model.layers.1.self_attn.o_proj"].reason.endswith("the columns of its heads 0, 2 are zero")
    bound = found.head_ablations.heads[1].together
    two = make_plan(shape, found, asked.replace([f"prune.head_loss={bound}"]))
    assert len(two.silenced_heads) == 2
    none = make_plan(shape, found, asked.replace(["prune.head_loss=1e-12"]))
    assert none.silenced_heads == []
    assert "over prune.head_loss 1e-12" in none.notes[-1]
    control = make_control(shape, found, asked, plan)
    assert [head.layer for head in control.silenced_heads] == [1, 1, 2, 2]
    weights = found.head_ablations.weights
    for head in control.silenced_heads:
        assert weights[head.layer][head.head] <= sorted(weights[head.layer])[1]
    with pytest.raises(RequestError, match="run detect with --set"):
        make_plan(shape, found.model_copy(update={"head_ablations": None}), asked)


def test_heads_that_cannot_be_told_apart_are_refused_before_anything_is_read(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = resting(), recipe(tmp_path)
    model.config.num_attention_heads = 5
    monkeypatch.setattr(Walk, "steps", lambda _: pytest.fail("began"))
    with pytest.raises(RequestError, match="no output projection that reads its heads side by side"):
        detect(model, tiny_tokenizer(), recipe=asked)


def test_a_short_evaluation_text_is_refused_before_anything_is_read(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked, short = resting(), recipe(tmp_path), tmp_path / "short.txt"
    short.write_text("w9 w10 w11", encoding="utf-8")
    monkeypatch.setattr(Walk, "steps", lambda _: pytest.fail("began"))
    with pytest.raises(RequestError, match="evaluation text is shorter than one row"):
        detect(model, tiny_tokenizer(), recipe=asked.replace([f"evaluate.text={short}"]))


def test_every_family_has_columns_for_its_heads() -> None:
    for family in FAMILIES:
        model = tiny_model(family)
        decoder = Decoder.of(model)
        for layer, block in enumerate(decoder.blocks):
            name, parts = head_columns(decoder, layer)
            assert weight_matrix(decoder.linears[name]).data_ptr() == _views(model, block).attention_out.data_ptr()
            assert [part.start for part in parts] == [0, 16, 32, 48]
