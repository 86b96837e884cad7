"""model + text -> SinkMap."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkquant.artifacts import Channel, Head, SinkKind, SinkMap, SinkToken
from sinkquant.detect.ablation import HeadAblator
from sinkquant.detect.heads import describe_heads
from sinkquant.detect.massive import EXCEPTION, MassiveChannel, massive_channels, outlier_channels
from sinkquant.detect.outliers import outlier_prefix
from sinkquant.detect.sinks import Sink, decide
from sinkquant.detect.super_weights import candidates, confirm
from sinkquant.detect.survey import Progress, Survey, Surveyor
from sinkquant.detect.table import AttentionTable
from sinkquant.detect.tokens import Candidate
from sinkquant.models import (
    Decoder,
    check_finite,
    read_text,
    require_dense,
    token_rows,
    tokenization_facts,
)
from sinkquant.models.gguf import source_notes
from sinkquant.models.source import folder_of
from sinkquant.recipe import Detection, Recipe
from sinkquant.sinks import SinkSelector

PUBLISHED_THRESHOLDS = ("0.1", "0.3", "0.8")
REPEATED_ROWS = 20
REPEATS_ONE_TOKEN = 0.95
CARRIERS_SHOWN = 10


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
        RequestError: the architecture is not supported, the text is too short, or weights are not finite or packed.
    """
    recipe = recipe or Recipe()
    settings = recipe.detect
    decoder = Decoder.of(model)
    require_dense(model)
    check_finite(model)
    surveyor = Surveyor(decoder, recipe, progress)
    content = read_text(text or recipe.calibration.text, "calibration", tokenizer)
    rows = surveyor.rows(tokenizer, content, settings.rows, settings.length)
    long_rows = surveyor.long_rows(tokenizer, content)
    notes = source_notes(folder_of(model))
    ids, counts = rows[:, 1:].unique(return_counts=True)
    if float(counts.max()) / rows[:, 1:].numel() > REPEATS_ONE_TOKEN:
        # Gu et al.'s negative control repeats the token from the first position on; a <bos> would be its sink.
        rows, long_rows = ids[counts.argmax()].expand(len(rows), rows.shape[1]).clone(), None
        notes.append("the text repeats one token: its rows are the published negative control, without <bos>")
    if long_rows is None:
        notes.append(f"the text holds no row of {settings.long_length} tokens: sinks were looked for in rows of "
                     f"{rows.shape[1]} tokens only")
    facts = tokenization_facts(tokenizer, rows)
    bare = None
    if facts.rows_start_with_bos:
        bare = token_rows(tokenizer, content, settings.rows, rows.shape[1], "never", decoder.vocabulary)
    first, long, repeated, without_bos = surveyor.run(
        [rows, long_rows], [_repeated_rows(rows, recipe.seed), bare], recorded=0 if long_rows is None else 1)
    assert first is not None
    assert repeated is not None
    surveys = [survey for survey in (first, long) if survey is not None]
    massive = [massive_channels(survey.stream, survey.rows, settings) for survey in surveys]
    sinks, secondary = decide(surveys, massive, without_bos, settings)
    found = [sink.candidate for sink in sinks]
    channels = _channels(surveys, massive, found, tokenizer)
    outlying = {c.channel: c for survey in surveys[::-1]
                for c in outlier_channels(survey.stream, {channel.channel for channel in channels}, settings)}
    table = surveys[0].table

    modules = surveyor.inputs.summary(SinkSelector.of(found).mask(surveys[-1].rows))
    experts = surveyor.experts.summary(SinkSelector.of(found).mask(surveys[-1].rows))
    outliers = outlier_prefix(decoder, surveyor.inputs, surveys[-1].rows, settings.outlier_ratio,
                              facts.bos_token_id if facts.rows_start_with_bos else None, tokenizer)
    if outliers is None:
        notes.append("outlier tokens were not looked for: no block has one down projection that sees every token")
    super_weights = []
    if settings.super_weights:
        super_weights = confirm(decoder, candidates([(survey.spikes, survey.stream) for survey in surveys]), rows,
                                settings, surveyor.device, surveyor.dtype, recipe.seed, progress)

    heads, ablations = _heads(surveys, found, settings), None
    if recipe.prune.heads != "none":
        evaluation = token_rows(tokenizer, read_text(recipe.evaluate.text, "evaluation", tokenizer), len(rows),
                                rows.shape[1], recipe.calibration.bos, decoder.vocabulary, "evaluation text")
        ablations = HeadAblator(decoder, settings, surveyor.device, surveyor.dtype, progress).run(
            heads, {"calibration": rows, "evaluation": evaluation}, SinkSelector.of(found).mask)

    tokens = [_named(sink, tokenizer) for sink in sinks]
    learned = _learned_sink(table, settings.threshold)
    if learned is not None:
        tokens.append(learned)
    return SinkMap(
        model=decoder.facts(name or model.config.name_or_path or type(model).__name__), tokenization=facts,
        sink_rate={t: table.sink_rate(float(t)) for t in PUBLISHED_THRESHOLDS},
        sink_rate_repeated_token={t: repeated.table.sink_rate(float(t)) for t in PUBLISHED_THRESHOLDS},
        sink_rate_without_bos=None if without_bos is None else {
            t: without_bos.table.sink_rate(float(t)) for t in PUBLISHED_THRESHOLDS},
        thresholds={"sink_score": settings.threshold, "massive_ratio": settings.massive_ratio,
                    "column_ratio": settings.column_ratio, "no_op_sink_score": settings.no_op_sink_score,
                    "no_op_output_norm": settings.no_op_output_norm, "super_weight_loss": settings.super_weight_loss,
                    "outlier_ratio": settings.outlier_ratio, "massive_exception": EXCEPTION},
        tokens=tokens, secondary=[_named(sink, tokenizer) for sink in secondary], heads=heads, channels=channels,
        outlier_channels=sorted(outlying.values(), key=lambda c: (-c.share, c.channel)),
        depth=surveys[0].stream.names, super_weights=super_weights, modules=modules, experts=experts,
        outlier_prefix=outliers, head_ablations=ablations, notes=notes)


def _repeated_rows(rows: torch.Tensor, seed: int) -> torch.Tensor:
    """The negative control of Gu et al.: rows in which one token of the text repeats, without any <bos>."""
    ids = rows[:, 1:].unique()
    generator = torch.Generator().manual_seed(seed)
    picked = ids[torch.randperm(len(ids), generator=generator)[:REPEATED_ROWS]]
    return picked[:, None].expand(-1, rows.shape[1]).clone()


def _heads(surveys: list[Survey], sinks: list[Candidate], settings: Detection) -> list[list[Head]]:
    """The heads, as seen in the first rows that show as many of the sinks as any."""
    marked = [SinkSelector.of(sinks).mask(survey.rows) for survey in surveys]
    shown = [sum(bool(SinkSelector.of([sink]).mask(survey.rows).any()) for sink in sinks) for survey in surveys]
    best = shown.index(max(shown))
    return describe_heads(surveys[best].table, marked[best], settings)


def _channels(surveys: list[Survey], massive: list[list[MassiveChannel]], sinks: list[Candidate],
              tokenizer: PreTrainedTokenizerBase) -> list[Channel]:
    """The massive channels of all surveys, each once, with the labels of the tokens that carry it."""
    channels: dict[int, MassiveChannel] = {}
    labels: dict[int, list[str]] = {}
    for survey, carried in zip(surveys, massive, strict=True):
        for channel in carried:
            channels.setdefault(channel.channel, channel)
            known = labels.setdefault(channel.channel, [])
            known += [label for label in _labels(channel, survey.rows, sinks, tokenizer) if label not in known]
    return [Channel(channel=c.channel, peak=c.peak, ratio=c.ratio, born=c.born, ended=c.ended,
                    tokens=labels[c.channel][:CARRIERS_SHOWN], profile=c.profile) for c in channels.values()]


def _labels(channel: MassiveChannel, rows: torch.Tensor, sinks: list[Candidate],
            tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tokens that carry a channel: sinks first, the first position whatever stands there, then ids."""
    rest, labels = channel.carriers.clone(), []
    for sink in sinks:
        here = SinkSelector.of([sink]).mask(rows)
        if (rest & here).any():
            labels.append(_text(sink.token_id, tokenizer) or f"position {sink.position}")
            rest &= ~here
    if rest[:, 0].any():
        labels.append("position 0")
        rest[:, 0] = False
    ids, counts = rows[rest].unique(return_counts=True)
    return labels + [str(_text(int(ids[i]), tokenizer)) for i in counts.argsort(descending=True, stable=True)]


def _named(sink: Sink, tokenizer: PreTrainedTokenizerBase) -> SinkToken:
    """Give a sink its kind."""
    candidate = sink.candidate
    text = _text(candidate.token_id, tokenizer)
    kind: SinkKind = "token"
    if candidate.token_id is not None and candidate.token_id == tokenizer.bos_token_id:
        kind = "bos"
    elif candidate.position == 0:
        kind = "first_position"
    elif text is not None and not any(character.isalnum() for character in text):
        kind = "delimiter"
    return SinkToken(token_id=candidate.token_id, text=text, position=candidate.position, kind=kind,
                     attention=candidate.attention, heads=candidate.heads, share=candidate.share, massive=sink.massive,
                     criteria=list(sink.criteria), layers=list(candidate.layers))


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
                     heads=float((mass > threshold).float().mean()), share=0.0, massive=False, criteria=["learned"],
                     layers=(mass.mean(1) > threshold).any(1).nonzero().flatten().tolist())
