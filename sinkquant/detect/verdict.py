"""Whether a model has sinks, in a sentence, and why."""

from __future__ import annotations

from typing import Any

from torch import nn

from sinkquant.artifacts import Channel, SinkToken, SinkVerdict
from sinkquant.detect.detector import Detector, Found
from sinkquant.models import Decoder


class WhetherSinks(Detector):
    """The answer that everything else rests on. "No sinks" is one: gated attention (2505.06708), softpick (2504.20966)
    and some optimizers (2506.19697) train models without any."""

    fields = ("verdict",)
    null = "over five random models of each of thirteen families none has a sink"

    def result(self, found: Found) -> dict[str, Any]:
        """The verdict; None where the text is a negative control, which says nothing of the model."""
        rows = found.surveys[0].rows
        if bool((rows == rows[:, :1]).all()):
            return {"verdict": None}
        tokens = found.fields["tokens"]
        reason = _why(tokens, found) if tokens else _why_not(found)
        if not tokens:
            sentence = "This model has no sinks: nothing needs to be kept exact for them."
        elif len(tokens) == 1:
            sentence = f"This model has one sink: {_name(tokens[0])}."
        else:
            sentence = f"This model has {len(tokens)} sinks: {', '.join(map(_name, tokens))}."
        return {"verdict": SinkVerdict(sinks=bool(tokens), sentence=sentence, reason=reason)}


def has_gated_attention(decoder: Decoder) -> bool:
    """Whether what its attention reads passes a gate that a linear of its own computes from the input."""
    return any(
        "gate" in name.rpartition(".")[2] and isinstance(linear, nn.Linear)
        and "attention" in type(decoder.model.get_submodule(name.rpartition(".")[0])).__name__.lower()
        for name, linear in decoder.linears.items())


def _why(tokens: list[SinkToken], found: Found) -> str:
    threshold = found.recipe.detect.threshold
    strongest = max(tokens, key=lambda token: token.heads)
    text = f"{_name(strongest)} receives more than {threshold:g} of the attention of {strongest.heads:.0%} of the heads"
    channels: list[Channel] = found.fields["channels"]
    if strongest.massive and channels:
        largest = max(channels, key=lambda channel: channel.peak)
        text += (f", and carries a massive activation of {largest.peak:,.0f} in channel {largest.channel}, "
                 f"{largest.ratio:,.0f} times the median, from {largest.born} on")
    return text


def _why_not(found: Found) -> str:
    settings = found.recipe.detect
    rate = found.surveys[0].table.sink_rate(settings.threshold)
    text = (f"no position and no token receives more than {settings.threshold:g} of the attention of "
            f"{settings.min_head_share:.0%} of the heads; the first position does in {rate:.1%} of them")
    if has_gated_attention(found.decoder):
        text += "; its attention passes a gate, which lets a head do nothing without a sink"
    if found.fields["channels"]:
        text += "; its massive activations draw no attention"
    return text


def _name(token: SinkToken) -> str:
    if token.kind == "learned":
        return "the learned column of every head"
    if token.text is None:
        return f"position {token.position}, whatever stands there"
    return repr(token.text) + (f" at position {token.position}" if token.position is not None else "")
