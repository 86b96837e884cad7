"""Sink rate, head and module statistics against direct computations from full attention matrices in float64."""

from __future__ import annotations

import pytest
import torch
from families import tiny_model
from transformers import PreTrainedModel

from sinkquant.detect.heads import describe_heads
from sinkquant.detect.modules import InputRecorder
from sinkquant.detect.table import AttentionTable, attention_of
from sinkquant.detect.tokens import first_occurrences, group_mass
from sinkquant.models import Decoder, Walk
from sinkquant.recipe import Detection

ROWS, LENGTH = 6, 48


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Random, with attention far from even."""
    return tiny_model("llama", initializer_range=0.4)


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    return torch.randint(4, 24, (ROWS, LENGTH), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def table(model: PreTrainedModel, rows: torch.Tensor) -> AttentionTable:
    return attention_of(Walk(Decoder.of(model), rows, 4))


@pytest.fixture(scope="module")
def attention(model: PreTrainedModel, rows: torch.Tensor) -> list[torch.Tensor]:
    """Every layer's attention, float64 [rows, heads, length, length], from transformers' eager implementation."""
    twin = tiny_model("llama", initializer_range=0.4)
    twin.set_attn_implementation("eager")
    with torch.no_grad():
        return [layer.double() for layer in twin(rows, use_cache=False, output_attentions=True).attentions]


@pytest.mark.parametrize("threshold", [0.05, 0.1, 0.3])
def test_sink_rate_is_that_of_gu_et_al(table: AttentionTable, attention: list[torch.Tensor], threshold: float) -> None:
    over, total = 0, 0
    for layer in attention:
        for sample in layer:
            for head in sample:
                alpha = sum(float(head[i, 0]) for i in range(LENGTH)) / LENGTH
                over, total = over + (alpha > threshold), total + 1
    assert total == 3 * 4 * ROWS
    assert table.sink_rate(threshold) == pytest.approx(over / total)


def test_attention_received_by_a_token_id(table: AttentionTable, attention: list[torch.Tensor],
                                          rows: torch.Tensor) -> None:
    """All copies of an id in a row together, by the queries from its first copy on; positions 0 and 9 are taken."""
    first = first_occurrences(rows, {9})
    for layer, seen in enumerate(table.layers):
        mass, even = group_mass(seen.received, seen.visible, seen.uniform, first)
        for row in range(ROWS):
            for identity in rows[row].unique().tolist():
                copies = [p for p in range(LENGTH) if rows[row, p] == identity and p not in (0, 9)]
                if not copies:
                    continue
                expected = attention[layer][row][:, copies[0]:, copies].sum(-1).mean(-1)
                assert torch.allclose(mass[row, :, copies[0]].double(), expected, atol=1e-5)
                fair = sum(sum(p <= q for p in copies) / (q + 1) for q in range(copies[0], LENGTH))
                assert float(even[row, copies[0]]) == pytest.approx(fair / (LENGTH - copies[0]), abs=1e-5)


def test_heads(model: PreTrainedModel, table: AttentionTable, attention: list[torch.Tensor],
               rows: torch.Tensor) -> None:
    marked = rows == 7
    assert marked.any()
    heads = describe_heads(table, marked, Detection(no_op_sink_score=0.05, no_op_output_norm=1.0))
    values: dict[int, torch.Tensor] = {}
    handles = [block.self_attn.v_proj.register_forward_hook(
        lambda _, __, output, i=i: values.update({i: output.double().view(ROWS, LENGTH, 2, 16).transpose(1, 2)}))
        for i, block in enumerate(model.model.layers)]
    with torch.no_grad():
        model(rows, use_cache=False)
    for handle in handles:
        handle.remove()
    no_ops = set()
    for layer, found in enumerate(heads):
        outputs = attention[layer] @ values[layer].repeat_interleave(2, 1)
        norms = outputs.norm(dim=-1).mean(dim=(0, 2))
        for index, head in enumerate(found):
            scores = []
            for row in range(ROWS):
                places = marked[row].nonzero().flatten().tolist()
                if places:
                    scores.append(float(attention[layer][row, index, places[0]:, places].sum(-1).mean()))
            assert head.sink_score == pytest.approx(sum(scores) / len(scores), abs=1e-5)
            sizes = values[layer][:, index // 2].norm(dim=-1)
            others = sizes[~marked].sort().values
            assert head.value_drain == pytest.approx(
                float(sizes[marked].mean() / others[(len(others) - 1) // 2]), rel=1e-4)
            relative = float(norms[index] / norms.mean())
            assert head.output_norm == pytest.approx(relative, rel=1e-4)
            assert head.no_op == (head.sink_score >= 0.05 and head.output_norm <= 1.0)
            no_ops.add(head.no_op)
    assert no_ops == {True, False}


def test_modules(model: PreTrainedModel, rows: torch.Tensor) -> None:
    marked = rows == 7
    decoder = Decoder.of(model)
    inputs: dict[str, torch.Tensor] = {}
    handles = [linear.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].double()}))
               for name, linear in decoder.linears.items()]
    with torch.no_grad():
        model(rows, use_cache=False)
    for handle in handles:
        handle.remove()
    recorder = InputRecorder(decoder, 1.05)
    for step in Walk(decoder, rows, 4).steps():
        with recorder.watching(step):
            step.run()
    found = recorder.summary(marked)
    assert set(found) == set(inputs)
    for name, statistics in found.items():
        x = inputs[name]
        assert statistics.input_max == pytest.approx(float(x.abs().max()), rel=1e-4)
        assert statistics.input_max_without_sinks == pytest.approx(float(x[~marked].abs().max()), rel=1e-4)
        traces = [float((part.T @ part).trace()) for part in (x[marked], x.flatten(0, 1))]
        assert statistics.sink_energy == pytest.approx(traces[0] / traces[1], rel=1e-4)
        energies = x[~marked].square().mean(-1).sort().values
        assert statistics.input_typical == pytest.approx(float(energies[(len(energies) - 1) // 2]) ** 0.5, rel=1e-4)
        over = x[marked].abs().amax(0) > 1.05 * x[~marked].abs().max()
        assert statistics.sink_columns == over.nonzero().flatten().tolist()
