"""The bundled model: a trained Llama with real sinks. The bounds are those of its README, with room for other text."""

from __future__ import annotations

import pytest
from detect_helpers import small_recipe

from sinkquant.artifacts import SinkMap
from sinkquant.detect import detect
from sinkquant.models import load_model, load_tokenizer, read_text, resolve


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> SinkMap:
    path = tmp_path_factory.mktemp("text") / "held-out.txt"
    path.write_text(read_text(None, "evaluation")[:60_000], encoding="utf-8")
    folder = resolve("demo")
    recipe = small_recipe("detect.rows=50", "detect.super_weights=false")
    return detect(load_model(folder), load_tokenizer(folder), str(path), recipe, "demo")


def test_bos_is_the_only_sink(found: SinkMap) -> None:
    (token,) = found.tokens
    assert (token.token_id, token.text, token.position, token.kind, token.massive) == (1, "<s>", 0, "bos", True)
    assert token.heads == pytest.approx(found.sink_rate["0.3"], abs=0.01)
    assert found.tokenization.adds_bos == "once"
    assert found.tokenization.rows_start_with_bos


def test_sink_rates(found: SinkMap) -> None:
    assert found.sink_rate["0.1"] > 0.98
    assert found.sink_rate["0.3"] == pytest.approx(0.837, abs=0.03)
    assert found.sink_rate["0.8"] == pytest.approx(0.361, abs=0.05)
    assert found.sink_rate_repeated_token["0.3"] == 0
    assert found.sink_rate_without_bos is not None
    assert found.sink_rate_without_bos["0.3"] < 0.02


def test_massive_activations(found: SinkMap) -> None:
    strongest = found.channels[0]
    assert strongest.channel == 16
    assert strongest.peak == pytest.approx(722, rel=0.02)
    assert strongest.ratio == pytest.approx(186, rel=0.05)
    assert strongest.born == "layers.1.mlp"
    assert found.channels[1].channel == 75
    assert all(channel.tokens == ["<s>"] for channel in found.channels)


def test_the_input_of_a_down_projection(found: SinkMap) -> None:
    statistics = found.modules["model.layers.1.mlp.down_proj"]
    assert statistics.input_max == pytest.approx(383, rel=0.02)
    assert statistics.input_max_without_sinks < 60
    assert statistics.sink_columns != []
    assert 0 < statistics.sink_energy < 1
