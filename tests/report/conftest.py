"""Artifacts of a model that has everything: a sink with massive activations, no-op heads, several formats, a gate."""

from __future__ import annotations

import pytest

from sinkquant import Plan, Report, SinkMap

HEADS = [[{"sink_score": 0.9, "value_drain": 0.1, "output_norm": 0.2, "no_op": True},
          {"sink_score": 0.2, "value_drain": 0.9, "output_norm": 1.8, "no_op": False}]] * 2


@pytest.fixture
def sink_map() -> SinkMap:
    """Two layers of two heads, one sink token whose text needs escaping, one massive channel."""
    rates = {"0.1": 0.9, "0.3": 0.5, "0.8": 0.25}
    return SinkMap.parse({
        "schema": "sinkquant/sinkmap@1",
        "model": {"name": "m", "architecture": "XForCausalLM", "layers": 2, "heads": 2, "kv_heads": 2,
                  "hidden_size": 8, "parameters": 1234, "dtype": "float32"},
        "tokenization": {"bos_token_id": 1, "bos_token": "<s>", "adds_bos": "once", "rows_start_with_bos": True,
                         "rows": 8, "length": 64},
        "sink_rate": rates, "sink_rate_repeated_token": dict.fromkeys(rates, 0.0), "thresholds": {},
        "tokens": [{"token_id": 1, "text": "<script>alert(1)</script>", "position": 0, "kind": "bos", "attention": 0.55,
                    "heads": 0.5, "share": 0.015, "massive": True}],
        "heads": HEADS, "depth": ["embedding", "layers.0.attention", "layers.0.mlp"], "super_weights": [],
        "channels": [{"channel": 5, "peak": 700.0, "ratio": 90.0, "born": "layers.0.mlp", "ended": None,
                      "tokens": ["<s>"], "profile": [0.5, 0.6, 700.0]}],
        "modules": {}, "notes": ["a note of detection"]}, "the fixture")


@pytest.fixture
def plan() -> Plan:
    """Four modules in three formats."""
    formats = {"layers.0.a": (4, 32, "gptq"), "layers.0.b": (8, -1, "rtn"), "layers.1.a": (4, 32, "gptq"),
               "layers.1.b": (16, None, "none")}
    return Plan.parse({
        "schema": "sinkquant/plan@1", "name": "sink_aware", "bits_per_weight": 4.5, "bits_per_parameter": 6.0,
        "weight_bytes": 1000, "unquantized_bytes": 4000, "seed": 0, "predicted": {}, "loads_in": ["transformers"],
        "modules": {name: {"bits": bits, "group_size": size, "method": method, "bytes": 250,
                           "reason": "because a|b <i>so</i>"} for name, (bits, size, method) in formats.items()},
        "calibration": {"text": None, "rows": 4, "length": 64, "bos": "auto", "batch_size": 4, "sinks": [],
                        "damping": 0.01, "act_order": True}}, "the fixture")


@pytest.fixture
def report() -> Report:
    """Three rows; protection pays; the gate failed."""
    def row(name: str, size: int, perplexity: float, kl: float | None) -> dict[str, object]:
        tasks = {"sink_perplexity": {"byte_perplexity": {"value": perplexity, "stderr": 0.1}}}
        if kl is not None:
            tasks["divergence"] = {"kl": {"value": kl, "stderr": 0.01}}
        return {"name": name, "path": name, "weight_bytes": size, "bits_per_weight": 4.5, "tasks": tasks}

    def pair(a: str, b: str, low: float, high: float) -> dict[str, object]:
        return {"task": "divergence", "metric": "kl", "a": a, "b": b, "difference": (low + high) / 2, "low": low,
                "high": high, "documents": 4}

    rates = {name: {"0.1": 0.9, "0.3": 0.5, "0.8": 0.25} for name in ("unquantized", "sink_aware", "control")}
    return Report.parse({
        "schema": "sinkquant/report@1", "model": "m & m", "recipe": "w4", "rows": [
            row("unquantized", 4000, 3.0, None), row("sink_aware", 1000, 3.1, 0.25), row("control", 1000, 3.2, 0.5)],
        "paired": [pair("control", "sink_aware", 0.1, 0.4), pair("sink_aware", "unquantized", -0.1, 0.2)],
        "recovery": {"sink_aware": {"sink_perplexity": {"byte_perplexity": 0.968}}},
        "fidelity": {"sink_rate": rates, "massive_peak": dict.fromkeys(rates, 700.0),
                     "massive_ratio": dict.fromkeys(rates, 90.0)},
        "verdict": {"answer": "pays", "sentence": "Protection pays on this model: it does.", "gate": "failed",
                    "failures": ["KL divergence 0.25 is over 0.1"]},
        "forecasts": [
            {"row": "sink_aware", "quantity": "weight_bytes", "predicted": 1000, "measured": 1000},
            {"row": "sink_aware", "quantity": "kl", "predicted": 0.2, "measured": 0.25, "note": "no cache & no inputs"},
            {"row": "control", "quantity": "kl", "predicted": None, "measured": 0.5}],
        "evaluation": {"rows": 4, "limit": None}, "resources": {"seconds: detect": 1.5, "peak resident bytes": 2.0**30},
        "versions": {"torch": "2.13.0"}, "notes": ["a note of the run"]}, "the fixture")
