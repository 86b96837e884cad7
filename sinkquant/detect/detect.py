"""model + text -> SinkMap."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkquant.artifacts import Channel, SinkMap, SinkToken
from sinkquant.detect.heads import describe_heads
from sinkquant.detect.modules import module_statistics
from sinkquant.detect.residual import MassiveChannel, ResidualStream, massive_channels
from sinkquant.detect.super_weights import SpikeWatcher, confirm
from sinkquant.detect.table import AttentionTable
from sinkquant.detect.tokens import Candidate, find_sinks
from sinkquant.errors import RequestError
from sinkquant.models import (
    Decoder,
    Walk,
    check_finite,
    pick_device,
    read_text,
    starts_with_bos,
    token_rows,
    tokenization_facts,
)
from sinkquant.recipe import Recipe

PUBLISHED_THRESHOLDS = ("0.1", "0.3", "0.8")
REPEATED_ROWS = 20

Progress = Callable[[int, int, str], None]


def detect(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str | None = None,
           recipe: Recipe | None = None, name: str | None = None, progress: Progress | None = None) -> SinkMap:
    """Find the sink tokens, heads, massive channels and super weights of a model.

    Args:
        model: any decoder whose attention goes through transformers' attention interface, in any dtype. Its weights
            are not changed.
        text: a file of natural text; None for the recipe's calibration text, or the packaged prose.
        recipe: thresholds, rows, seed, device and compute dtype; None for the defaults.
        name: what the sink map calls the model; None for the model's own name.
        progress: called as progress(done, total, label).

    Raises:
        RequestError: the architecture is not supported, the text is too short, or weights are not finite.
    """
    recipe = recipe or Recipe()
    settings = recipe.detect
    decoder = Decoder.of(model)
    check_finite(model)
    survey = _Surveyor(decoder, recipe, progress)
    content = read_text(text or recipe.calibration.text, "calibration")
    rows = survey.rows(tokenizer, content, settings.rows, settings.length)
    table, stream, spikes = survey.run(rows, "reading attention")
    found, channels = find_sinks(table, rows, settings), massive_channels(stream, settings)
    carriers = {c.channel: _carriers(c, rows) for c in channels}
    notes = []

    long_rows = survey.long_rows(tokenizer, content)
    if long_rows is None:
        notes.append(f"the text holds no row of {settings.long_length} tokens: sinks were looked for in rows of "
                     f"{rows.shape[1]} tokens only")
    else:
        long_table, long_stream, long_spikes = survey.run(long_rows, "reading long rows")
        known = {(c.token_id, c.position) for c in found}
        found += [c for c in find_sinks(long_table, long_rows, settings) if (c.token_id, c.position) not in known
                  and (None, c.position) not in known]
        for channel in massive_channels(long_stream, settings):
            if channel.channel not in carriers:
                channels.append(channel)
            carriers.setdefault(channel.channel, set()).update(_carriers(channel, long_rows))
        for module, spike in long_spikes.spikes.items():
            spikes.spikes.setdefault(module, spike)

    repeated = _repeated_rows(rows, recipe.seed)
    repeated_table, _, _ = survey.run(repeated, "reading repeated tokens")
    without_bos = None
    facts = tokenization_facts(tokenizer, rows)
    if facts.rows_start_with_bos:
        bare = token_rows(tokenizer, content, settings.rows, rows.shape[1], "never", decoder.vocabulary)
        without_bos = survey.run(bare, "reading without <bos>")[0]

    statistics_rows = rows if long_rows is None else long_rows
    modules = module_statistics(decoder, statistics_rows, sink_positions(statistics_rows, found), settings,
                                survey.device, survey.dtype)
    super_weights = []
    if settings.super_weights:
        super_weights = confirm(decoder, spikes, rows, settings, survey.device, survey.dtype, recipe.seed)

    tokens = [_named(candidate, tokenizer, carriers) for candidate in found]
    learned = _learned_sink(table, settings.threshold)
    if learned is not None:
        tokens.append(learned)
    return SinkMap(
        model=decoder.facts(name or model.config.name_or_path or type(model).__name__), tokenization=facts,
        sink_rate={t: table.sink_rate(float(t)) for t in PUBLISHED_THRESHOLDS},
        sink_rate_repeated_token={t: repeated_table.sink_rate(float(t)) for t in PUBLISHED_THRESHOLDS},
        sink_rate_without_bos=None if without_bos is None else {
            t: without_bos.sink_rate(float(t)) for t in PUBLISHED_THRESHOLDS},
        thresholds={"sink_score": settings.threshold, "massive_ratio": settings.massive_ratio,
                    "column_ratio": settings.column_ratio, "no_op_sink_score": settings.no_op_sink_score,
                    "no_op_output_norm": settings.no_op_output_norm, "super_weight_loss": settings.super_weight_loss},
        tokens=tokens, heads=describe_heads(table, sink_positions(rows, found), settings),
        channels=[Channel(channel=c.channel, peak=c.peak, ratio=c.ratio, born=c.born, ended=c.ended,
                          tokens=_labels(carriers[c.channel], tokenizer), profile=c.profile) for c in channels],
        depth=stream.names, super_weights=super_weights, modules=modules, notes=notes)


def sink_positions(rows: torch.Tensor, sinks: list[Candidate]) -> torch.Tensor:
    """bool [rows, length]: where these rows hold a sink token."""
    marked = torch.zeros_like(rows, dtype=torch.bool)
    for sink in sinks:
        here = torch.ones_like(marked) if sink.token_id is None else rows == sink.token_id
        if sink.position is not None:
            place = torch.zeros_like(marked)
            if sink.position < rows.shape[1]:
                place[:, sink.position] = True
            here &= place
        marked |= here
    return marked


class _Surveyor:
    """Runs rows through the decoder with everything watching that detection needs."""

    def __init__(self, decoder: Decoder, recipe: Recipe, progress: Progress | None) -> None:
        self.decoder, self.recipe, self.progress = decoder, recipe, progress
        self.device = pick_device(recipe.compute.device)
        self.dtype = getattr(torch, recipe.compute.dtype)

    def rows(self, tokenizer: PreTrainedTokenizerBase, content: str, count: int, length: int) -> torch.Tensor:
        if length > self.decoder.max_length:
            raise RequestError(f"detect.length is {length}, but the model has positions for {self.decoder.max_length} "
                               "tokens only; set it lower.")
        return token_rows(tokenizer, content, count, length, self.recipe.calibration.bos, self.decoder.vocabulary)

    def long_rows(self, tokenizer: PreTrainedTokenizerBase, content: str) -> torch.Tensor | None:
        """Rows for sinks further back, as long as the model and the text allow; None where they allow no more than
        the short ones have."""
        settings = self.recipe.detect
        length = min(settings.long_length, self.decoder.max_length)
        if settings.long_rows == 0 or length <= settings.length:
            return None
        try:
            return self.rows(tokenizer, content, settings.long_rows, length)
        except RequestError:
            return None

    def run(self, rows: torch.Tensor, label: str) -> tuple[AttentionTable, ResidualStream, SpikeWatcher]:
        table, stream = AttentionTable(), ResidualStream()
        spikes = SpikeWatcher(self.decoder, self.recipe.detect.massive_ratio)
        batch = max(1, self.recipe.detect.batch_size * 64 // rows.shape[1])
        walk = Walk(self.decoder, rows, batch, self.device, self.dtype, [table])
        for step in walk.steps():
            handles = spikes.handles(step.index)
            try:
                stream.run(step)
            finally:
                for handle in handles:
                    handle.remove()
            table.close_layer()
            if self.progress:
                self.progress(step.index + 1, len(self.decoder.blocks), label)
        return table, stream, spikes


def _repeated_rows(rows: torch.Tensor, seed: int) -> torch.Tensor:
    """The negative control of Gu et al.: rows in which one token of the text repeats, without any <bos>."""
    ids = rows[:, 1:].unique()
    generator = torch.Generator().manual_seed(seed)
    picked = ids[torch.randperm(len(ids), generator=generator)[:REPEATED_ROWS]]
    return picked[:, None].expand(-1, rows.shape[1]).clone()


def _carriers(channel: MassiveChannel, rows: torch.Tensor) -> set[tuple[int | None, int | None]]:
    """(token id, position) of the tokens that carry a channel: position 0 apart, other tokens by id."""
    carried: set[tuple[int | None, int | None]] = set()
    if channel.carriers[:, 0].any():
        ids = rows[channel.carriers[:, 0], 0].unique()
        carried.add((int(ids[0]) if len(ids) == 1 else None, 0))
    later = channel.carriers.clone()
    later[:, 0] = False
    carried.update((int(i), None) for i in rows[later].unique())
    return carried


def _labels(carried: set[tuple[int | None, int | None]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Carriers as a person reads them: "<s>", "first position", "'.'"; at most ten."""
    ordered = sorted(carried, key=lambda c: (c[1] is None, -1 if c[0] is None else c[0]))
    return [_text(i, tokenizer) or "first position" for i, _ in ordered[:10]]


def _named(candidate: Candidate, tokenizer: PreTrainedTokenizerBase,
           carriers: dict[int, set[tuple[int | None, int | None]]]) -> SinkToken:
    """Give a candidate its kind and say whether it carries a massive activation."""
    identity, position = candidate.token_id, candidate.position
    text = _text(identity, tokenizer)
    if identity is not None and identity == tokenizer.bos_token_id:
        kind = "bos"
    elif position == 0:
        kind = "first_position"
    elif text is not None and not any(character.isalnum() for character in text):
        kind = "delimiter"
    else:
        kind = "token"
    carried = set().union(*carriers.values()) if carriers else set()
    massive = (identity, position) in carried or (position == 0 and any(p == 0 for _, p in carried)) or (
        position is None and (identity, None) in carried)
    return SinkToken(token_id=identity, text=text, position=position, kind=kind,
                     attention=candidate.attention, heads=candidate.heads, massive=massive)


def _text(identity: int | None, tokenizer: PreTrainedTokenizerBase) -> str | None:
    return None if identity is None else str(tokenizer.decode([identity]))


def _learned_sink(table: AttentionTable, threshold: float) -> SinkToken | None:
    """The virtual column of a learned sink (gpt-oss), where it draws attention in at least one head."""
    if not table.has_learned_sink:
        return None
    mass = torch.stack(table.learned)
    if not bool((mass.mean(1) > threshold).any()):
        return None
    return SinkToken(token_id=None, text=None, position=None, kind="learned", attention=float(mass.mean()),
                     heads=float((mass > threshold).float().mean()), massive=False)
