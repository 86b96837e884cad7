"""Robustness: sink tokens are a target. Inputs that omit, move, repeat, inject, break or fake them, and what defends.

Every check compares the loss over the same tokens of the same text, with and without the attack.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from sinkquant.artifacts import SinkToken
from sinkquant.artifacts.diagnosis import Check
from sinkquant.detect.table import AttentionTable
from sinkquant.diagnose.rows import with_bos
from sinkquant.diagnose.survey import WalkSettings
from sinkquant.errors import SinkquantError
from sinkquant.models import Decoder, Step

SINK = 0.3
REPEATS, INJECTED_SINKS = 8, 3
CANDIDATES, SEARCHED_POSITIONS = 48, 3
"""The budget of the greedy searches: candidates tried at each of so many positions."""
NOISE = (0.1, 0.5)
"""Standard deviation of the noise on the embeddings, in units of their root mean square."""
LONGEST_EXCEEDED = 2048
"""Models with a longer context are not run past it here: the rows would be twice as long."""

Change = Callable[[Step], None]


@dataclass(frozen=True)
class Outcome:
    """One run of some rows. losses: [rows, length - 1]; received: mean attention on every position over layers and
    heads, [rows, length]; first: share of (row, layer, head) whose first position is over `SINK`. None: not finite,
    or not asked for."""

    losses: torch.Tensor | None
    received: torch.Tensor | None
    first: float | None

    def loss(self, targets: slice) -> float | None:
        """Mean over the losses of these targets; `losses[:, t]` is that of token t + 1."""
        return None if self.losses is None else float(self.losses[:, targets].double().mean())


def run(decoder: Decoder, rows: torch.Tensor, compute: WalkSettings, change: Change | None = None,
        losses: bool = True) -> Outcome:
    """Walk over rows; `change` may edit hidden states and masks before every block. Without `losses`, which take all
    logits, an outcome has none."""
    table = AttentionTable()
    walk = compute.walk(decoder, rows, [table])
    try:
        for step in walk.steps():
            if change is not None:
                change(step)
            step.run()
            table.close_layer(rows)
        found = walk.losses() if losses else None
    except SinkquantError as error:
        if "not finite" not in str(error):
            raise
        return Outcome(None, None, None)
    layers = table.of_heads().layers
    if found is not None and not torch.isfinite(found).all():
        return Outcome(None, None, None)
    return Outcome(found, torch.stack([layer.mass.mean(1) for layer in layers]).mean(0),
                   float(torch.stack([(layer.mass[:, :, 0] > SINK).float().mean() if layer.visible[0] > 1
                                      else torch.zeros(()) for layer in layers]).mean()))


def robustness(decoder: Decoder, text: torch.Tensor, bos: int | None, sinks: Sequence[SinkToken], compute: WalkSettings,
               name_of: Callable[[int], str]) -> list[Check]:
    """All checks that the model and its tokenizer allow.

    Args:
        text: int64 [rows, length] without any `<bos>`; the model has positions for at least `REPEATS` more.
        bos: the id that rows start with, None where they start with none.
        name_of: token id -> text.
    """
    half = text.shape[1] // 2
    front = [] if bos is None else [0]
    base_rows = with_bos(text, 0 if bos is None else bos, front)
    base = run(decoder, base_rows, compute)
    tail = text.shape[1] - half  # the second half of the text is scored: nothing is put in after its start
    found = []

    def add(name: str, what: str, rows: torch.Tensor, change: Change | None = None, defence: str | None = None) -> None:
        found.append(_check(name, what, base, run(decoder, rows, compute, change), tail, defence))

    if bos is not None:
        add("omitted", "<bos> is left out", text)
        add("omitted", "<bos> is left out and put back before the text is run", with_bos(text, bos, [0]),
            defence="<bos> re-inserted")
        add("moved", "<bos> stands in the middle only", with_bos(text, bos, [half]))
        add("repeated", f"{REPEATS} <bos> in front", with_bos(text, bos, [0] * REPEATS))
        add("injected", f"{REPEATS // 2} more <bos> in the first half",
            with_bos(text, bos, [0, *range(half // 5, half, half // 5)][:1 + REPEATS // 2]))
        add("injected", "the same, every <bos> but the first removed before the text is run", base_rows,
            defence="specials stripped from the text")
    others = [sink.token_id for sink in sinks if sink.token_id not in (None, bos)][:INJECTED_SINKS]
    for token in others:
        assert token is not None
        rows = base_rows.clone()
        rows[:, len(front) + 1:len(front) + half:4] = token
        add("sink token injected", f"every fourth token of the first half is {name_of(token)!r}", rows)
    add("first position hidden", "no later token may read the first position", base_rows, hide_first)
    for strength in NOISE:
        add("embeddings perturbed", f"noise of {strength:g} of their size", base_rows, _noise(strength, compute.seed))
    broken = break_sink(decoder, base_rows, len(front), compute)
    add("sink broken by search", f"the first {SEARCHED_POSITIONS} tokens, {CANDIDATES} tried at each, chosen to draw "
        f"attention off the first position: {[name_of(t) for t in broken]}",
        _replaced(base_rows, len(front), broken))
    token = fake_sink(decoder, base_rows, half // 2, compute)
    add("sink faked by search", f"one token in the first half, {CANDIDATES} tried, chosen to draw attention: "
        f"{name_of(token)!r}", _replaced(base_rows, half // 2, [token]))
    return found


def break_sink(decoder: Decoder, rows: torch.Tensor, start: int, compute: WalkSettings) -> list[int]:
    """Greedy search for the tokens after the first position that draw the most attention off it, on one row.

    `CANDIDATES` ids of the text are tried at each of `SEARCHED_POSITIONS` positions: that is the whole budget.
    """
    chosen: list[int] = []
    for place in range(start, start + SEARCHED_POSITIONS):
        candidates = _candidates(rows, compute.seed + place)
        tried = _replaced(rows[:1], start, chosen).expand(len(candidates), -1).clone()
        tried[:, place] = candidates
        outcome = run(decoder, tried, compute, losses=False)
        if outcome.received is None:
            return [*chosen, int(candidates[0])]
        chosen.append(int(candidates[outcome.received[:, 0].argmin()]))
    return chosen


def fake_sink(decoder: Decoder, rows: torch.Tensor, place: int, compute: WalkSettings) -> int:
    """The one of `CANDIDATES` ids of the text that draws the most attention at a position of the first row."""
    candidates = _candidates(rows, compute.seed)
    tried = rows[:1].expand(len(candidates), -1).clone()
    tried[:, place] = candidates
    outcome = run(decoder, tried, compute, losses=False)
    return int(candidates[0 if outcome.received is None else outcome.received[:, place].argmax()])


def past_the_context(decoder: Decoder, text: torch.Tensor, bos: int, compute: WalkSettings) -> list[Check]:
    """Twice the trained context, and what a window of the trained length does with and without its sink.

    The last quarter of a context is scored. The reference keeps `<bos>` in front of the window, which is also the
    defence (StreamingLLM, 2309.17453, keeps the sinks for the same reason).

    Args:
        decoder: one whose positions are not learned one by one.
        text: int64 [rows, 2 * context] without any `<bos>`.
    """
    context = text.shape[1] // 2
    scored = context // 4
    window = text[:, -(context - 1):]
    kept = run(decoder, with_bos(window, bos, [0]), compute)
    return [_check("past the context", f"{text.shape[1]} tokens where the model was trained for {context}", kept,
                   run(decoder, with_bos(text[:, 1:], bos, [0]), compute), scored),
            _check("window without its sink", f"the last {context - 1} tokens without <bos>", kept,
                   run(decoder, window, compute), scored),
            _check("window with its sink", f"the last {context - 1} tokens with <bos> in front", kept, kept, scored,
                   "<bos> re-inserted")]


def has_learned_positions(decoder: Decoder) -> bool:
    """Whether the model looks positions up in a table, which has no entry past its end."""
    tokens = decoder.model.get_input_embeddings()
    return any(isinstance(module, nn.Embedding) and module is not tokens
               and 0 <= module.num_embeddings - decoder.max_length < 8 for module in decoder.model.modules())


def _check(name: str, what: str, base: Outcome, attacked: Outcome, tail: int, defence: str | None = None) -> Check:
    scored = slice(-tail, None)
    reference = base.loss(scored)
    if reference is None or base.first is None:
        raise SinkquantError("the untouched text already gives outputs that are not finite.")
    return Check(name=name, what=what, defence=defence, loss=attacked.loss(scored), reference_loss=reference,
                 sink_rate=attacked.first, reference_sink_rate=base.first, finite=attacked.losses is not None)


def _candidates(rows: torch.Tensor, seed: int) -> torch.Tensor:
    ids = rows[:, 1:].unique()
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))[:CANDIDATES]]


def _replaced(rows: torch.Tensor, start: int, tokens: Sequence[int]) -> torch.Tensor:
    changed = rows.clone()
    changed[:, start:start + len(tokens)] = torch.tensor(tokens, dtype=torch.long)
    return changed


def hide_first(step: Step) -> None:
    """Take the first position out of the mask of every later query of a block: what a sliding window does that keeps no
    sink (StreamingLLM, 2309.17453)."""
    if step.index in step.walk.decoder.quiet:
        return
    given = step.walk.arguments[step.index]
    mask, length = given.get("attention_mask"), step.walk.rows.shape[1]
    if mask is None:
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=step.walk.device).tril()
    mask = mask.clone()
    mask[..., 1:, 0] = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    step.walk.arguments[step.index] = {**given, "attention_mask": mask}


def _noise(strength: float, seed: int) -> Change:
    def change(step: Step) -> None:
        if step.index > 0:
            return
        hidden = step.walk.hidden
        noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(seed))
        size = hidden.float().square().mean().sqrt()
        step.walk.hidden = hidden + (strength * size * noise).to(hidden.dtype)

    return change
