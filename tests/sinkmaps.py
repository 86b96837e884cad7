"""Sink maps written by hand, for tests that need to know what was found without looking for it."""

from __future__ import annotations

from sinkquant.artifacts import Channel, Head, ModuleStatistics, SinkMap, SinkToken, SuperWeight, TokenizationFacts
from sinkquant.models import Decoder

BOS = SinkToken(token_id=1, text="<s>", position=0, kind="bos", attention=0.5, heads=0.8, share=1 / 64, massive=True)
STOP = SinkToken(token_id=4, text=".", position=None, kind="delimiter", attention=0.3, heads=0.1, share=0.1,
                 massive=False)


def sink_map_of(decoder: Decoder, energies: dict[str, float] | None = None, tokens: tuple[SinkToken, ...] = (BOS,),
                channels: tuple[Channel, ...] = (), super_weights: tuple[SuperWeight, ...] = (),
                name: str = "tiny") -> SinkMap:
    """A sink map of a model.

    Args:
        energies: module name -> share of trace(H) that sinks give; these modules get the sink column 3.
    """
    energies = energies or {}
    facts = decoder.facts(name)
    modules = {module: ModuleStatistics(
        input_max=90.0 if module in energies else 4.0, input_max_without_sinks=4.0,
        sink_energy=energies.get(module, 0.01), sink_columns=[3] if module in energies else [],
        input_typical=0.5)
        for module in decoder.linears}
    head = Head(sink_score=0.5, value_drain=0.1, output_norm=0.2, no_op=False)
    return SinkMap(
        model=facts,
        tokenization=TokenizationFacts(bos_token_id=1, bos_token="<s>", adds_bos="once", rows_start_with_bos=True,
                                       rows=100, length=64),
        sink_rate={"0.1": 0.9, "0.3": 0.8, "0.8": 0.2}, sink_rate_repeated_token={"0.1": 0.0, "0.3": 0.0, "0.8": 0.0},
        thresholds={"sink": 0.3}, tokens=list(tokens), heads=[[head] * facts.heads for _ in range(facts.layers)],
        channels=list(channels), super_weights=list(super_weights), modules=modules)
