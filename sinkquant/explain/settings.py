"""What of configuration and tokenizer is another than the baseline's, and the loss with the baseline's."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from sinkquant.artifacts.explanation import Cause, SettingChange
from sinkquant.cache import Bases, Prefix, prepare
from sinkquant.explain.diagnose import Measuring, percent
from sinkquant.explain.probe import Probe
from sinkquant.models import adds_bos, encode
from sinkquant.models.folder import DERIVED
from sinkquant.models.head import keep_head
from sinkquant.models.hooks import hooked
from sinkquant.models.inputs import share_rounding

OWN = (*DERIVED, "use_cache", "initializer_range", "tie_word_embeddings", "pretraining_tp", "_attn_implementation",
       "return_dict", "output_attentions", "output_hidden_states", "chunk_size_feed_forward", "problem_type",
       "id2label", "label2id", "max_position_embeddings", "is_encoder_decoder", "model_type")
"""Values of a configuration that a checkpoint may have of its own, or that no prediction depends on."""
TIMES = {"none": 0, "once": 1, "twice": 2}
WORDS = ("no <bos>", "one <bos>", "two <bos>")


def front_of(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What a tokenizer puts in front of a text: `<bos>` no times, once or twice."""
    count = TIMES[adds_bos(tokenizer)]
    return (int(tokenizer.bos_token_id),) * count if count else ()


def tokenization_cause(probe: Probe, model: PreTrainedModel, measuring: Measuring) -> Cause | None:
    """`<bos>` missing or doubled."""
    if probe.served == probe.front:
        return None
    after = probe.loss(model, as_baseline=True)
    removes = 1 - after / measuring.loss
    return Cause(kind="tokenization", where="tokenizer", kl_after=after, removes=removes,
                 sentence=f"The checkpoint's tokenizer puts {WORDS[len(probe.served)]} in front of a text and the "
                          f"baseline's {WORDS[len(probe.front)]}: reading what the baseline reads removes "
                          f"{percent(removes)} of the loss.",
                 advice="copy the baseline's tokenizer files into the checkpoint")


def configuration_causes(original: PreTrainedModel, model: PreTrainedModel, measuring: Measuring, probe: Probe,
                         prefix: Prefix | None, bases: Bases | None) -> list[Cause]:
    """Every value of config.json that is another, put right by itself; those that the weights do not fit one by one,
    such as numbers of heads and their width, all together.

    Args:
        prefix, bases: those of the checkpoint's cache.
    """
    def cause(some: Sequence[SettingChange]) -> Cause | None:
        mended = rebuilt(model, [one.name for one in some], original.config)
        if mended is None:
            return None
        after = probe.loss(mended if probe.kv is None else prepare(mended, prefix, bases, own=True))
        removes = 1 - after / measuring.loss
        return _configured(some, f"the baseline's {'value removes' if len(some) == 1 else 'values remove'} "
                                 f"{percent(removes)} of the loss", removes, after)

    alone = [(one, cause([one])) for one in changes(original.config, model.config)]
    rest = [one for one, found in alone if found is None]
    together = [cause(rest) or _configured(rest, "the weights do not fit that, so that what it costs is not known")
                ] if rest else []
    return [found for _, found in alone if found is not None] + together


def _configured(some: Sequence[SettingChange], result: str, removes: float | None = None,
                after: float | None = None) -> Cause:
    said, before = ", ".join(f"{one.name} {one.after}" for one in some), ", ".join(one.before for one in some)
    return Cause(kind="configuration", where=f"config.json: {', '.join(one.name for one in some)}", kl_after=after,
                 removes=removes, sentence=f"config.json says {said} where the baseline says {before}: {result}.",
                 advice=f"copy {'that value' if len(some) == 1 else 'these values'} from the baseline's config.json")


def changes(before: Any, after: Any) -> list[SettingChange]:
    """Values of two configurations that differ and that predictions depend on."""
    one, two = (config.get_text_config(decoder=True).to_dict() for config in (before, after))
    names = sorted(name for name in {*one, *two} - {*OWN}
                   if not name.endswith("token_id") and not name.startswith("_"))
    return [SettingChange(name=name, before=str(one.get(name)), after=str(two.get(name))) for name in names
            if not _same(one.get(name), two.get(name))]


def rebuilt(model: PreTrainedModel, names: Sequence[str], config: Any) -> PreTrainedModel | None:
    """The model with some values of its configuration taken from another, None where its weights do not fit these;
    weights and the rounding of inputs are shared."""
    mended = copy.deepcopy(model.config)
    inner, right = mended.get_text_config(decoder=True), config.get_text_config(decoder=True)
    for name in names:
        setattr(inner, name, copy.deepcopy(getattr(right, name, None)))
    keep_head(model, mended)
    try:
        with init_empty_weights(include_buffers=False), no_init_weights():
            made = type(model)._from_config(mended, dtype=model.dtype)
        made.load_state_dict(model.state_dict(), strict=False, assign=True)
        share_rounding(model, made)
    except Exception:  # every architecture has its own way to say that numbers do not go together
        return None
    made.tie_weights()
    lacking = any(parameter.is_meta for parameter in made.parameters())
    return None if lacking else made.to(model.device).eval()


def text_changes(before: PreTrainedTokenizerBase, after: PreTrainedTokenizerBase,
                 documents: Sequence[str]) -> list[SettingChange]:
    """What else of two tokenizers differs: ids, the chat template, special tokens."""
    found = []
    sample = "\n".join(documents)[:20_000]
    one, two = encode(before, sample), encode(after, sample)
    if one != two:
        place = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
        found.append(SettingChange(name="token ids of the text", before=f"{len(one)} tokens",
                                   after=f"{len(two)} tokens, the first other one at {place}"))
    if (before.chat_template or "") != (after.chat_template or ""):
        found.append(SettingChange(name="chat template", before=_short(before.chat_template),
                                   after=_short(after.chat_template)))
    for name in ("bos_token", "eos_token", "pad_token"):
        if str(getattr(before, name)) != str(getattr(after, name)):
            found.append(SettingChange(name=name, before=str(getattr(before, name)), after=str(getattr(after, name))))
    return found


def _short(template: Any) -> str:
    text = " ".join(str(template).split()) if template else "none"
    return text if len(text) <= 60 else f"{text[:60]}... ({len(text)} characters)"


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, float | int) and isinstance(two, float | int) and not isinstance(one, bool):
        return math.isclose(one, two, rel_tol=1e-6)
    if isinstance(one, dict) and isinstance(two, dict):
        return all(_same(one.get(key), two.get(key)) for key in {*one, *two})
    return bool(one == two)


def finite_cause(model: PreTrainedModel, probe: Probe, tokens: torch.Tensor,
                 stored: torch.dtype | None) -> Cause | None:
    """Numbers that are not finite: in `tokens`, the KL of every one, or in float16 where the checkpoint is stored in
    that."""
    with torch.no_grad():
        if not torch.isfinite(tokens).all():
            broken = ~torch.isfinite(tokens).all(-1)
            where = first_broken(model, probe.rows[broken][:1])
            return Cause(kind="not finite", where=where, removes=None, kl_after=None,
                         sentence=f"What {where} gives is not finite, so that nothing is predicted.",
                         advice="look at that module's weights and scales; convert the model again")
        if stored != torch.float16:
            return None
        # Halved one by one: a copy of the whole in float32 would take twice the memory.
        halves = {id(one): torch.nn.Parameter(one.half(), requires_grad=False) for one in model.parameters()}
        # transformers' own method refuses where the checkpoint was packed.
        half = torch.nn.Module.half(copy.deepcopy(model, halves))
        logits = half(probe.rows[:2].to(half.device), use_cache=False).logits
        broken = ~torch.isfinite(logits).all(-1)
    if not broken.any():
        return None
    where = first_broken(half, probe.rows[:2])
    share = float(broken.float().mean())
    return Cause(kind="not finite", where=where, removes=1.0, kl_after=None,
                 sentence=f"In float16, in which the checkpoint is stored, {where} overflows and {share:.0%} of the "
                          "predictions are not finite; computed in float32 all of them are.",
                 advice="store and serve the model in bfloat16")


def first_broken(model: PreTrainedModel, rows: torch.Tensor) -> str:
    """The first module whose output is not finite."""
    seen: list[str] = []

    def watch(name: str) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            given = output[0] if isinstance(output, tuple) else output
            if isinstance(given, torch.Tensor) and not torch.isfinite(given).all():
                seen.append(name)

        return hook

    leaves = [(name, module) for name, module in model.named_modules() if not any(True for _ in module.children())]
    with hooked(module.register_forward_hook(watch(name)) for name, module in leaves):
        model(rows.to(model.device), use_cache=False)
    return seen[0] if seen else "the output head"
