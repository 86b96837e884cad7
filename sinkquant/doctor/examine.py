"""doctor: where `<bos>` stands in every path that text takes to a model, and what of the model is supported."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jinja2
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkquant.artifacts import ModelShape
from sinkquant.artifacts.sizes import own_format
from sinkquant.cache.read_native import native_or_why
from sinkquant.detect.table import AttentionTable
from sinkquant.errors import RequestError, first_line
from sinkquant.models import Decoder, Walk, adds_bos, read_text, starts_with_bos, together, token_rows
from sinkquant.models.text import leading, left_out
from sinkquant.policy.choices import formats_asked
from sinkquant.policy.engines import loads_in
from sinkquant.quantize import is_quantized
from sinkquant.quantize.trial import require_loads
from sinkquant.recipe import Recipe
from sinkquant.schemes.gguf import GGUF
from sinkquant.schemes.table import instructions_asked, out_of_reach

SAMPLE = "The attention sink."
MESSAGES = [{"role": "user", "content": SAMPLE}]
ALREADY = "no: it is quantized already"
LOSS_MATTERS = 0.05
ROWS, LENGTH = 4, 64
"""Of the text that is run with `<bos>` in front and without: the same tokens, so that few rows tell."""
CHARACTERS = 1 << 15
"""As much of the text is tokenized for them."""


@dataclass
class Audit:
    """What the doctor found: `tokenization` path -> what stands in front; `support` fact -> value; `warnings`."""

    tokenization: dict[str, str] = field(default_factory=dict)
    support: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def sentence(self) -> str:
        """What it means for this model."""
        if self.support["detection"] == "no":
            return "For this model: nothing can be done with it as it is; the warnings say why."
        quantized = self.support["quantization"]
        done = "its sinks can be found, " + (
            "but nothing of it can be quantized" if quantized == "no" else
            "but it is quantized already" if quantized == ALREADY else f"and {quantized} quantized")
        if not self.warnings:
            return f"For this model: {done}; nothing to complain about."
        return f"For this model: {done}; see to the warnings first ({len(self.warnings)})."


def examine(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str | list[str] | None = None) -> Audit:
    """Audit the tokenization of calibration, evaluation, chat and serving, and measure what `<bos>` is worth.

    Args:
        text: a file of natural text; None for the packaged one.
    """
    audit = Audit()
    content = None if tokenizer.bos_token_id is None else read_text(text, "evaluation", tokenizer)[:CHARACTERS]
    _tokenization(model, tokenizer, audit)
    try:
        decoder = Decoder.of(model)
        compared, not_compared = _compared(decoder, tokenizer, content)
        _walk(decoder, list(compared.values()))
    except RequestError as error:
        audit.support["detection"] = "no"
        audit.warnings.append(str(error))
        return audit
    _support(decoder, audit)
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= decoder.vocabulary:
        audit.warnings.append(f"the tokenizer has ids up to {largest}, but the model's embedding has only "
                              f"{decoder.vocabulary} rows; texts with the ids between cannot be run.")
    if not_compared:
        audit.warnings.append(f"the worth of <bos> was not measured: {not_compared}")
    if compared:
        _worth_of_bos(compared, tokenizer, audit)
    return audit


def _compared(decoder: Decoder, tokenizer: PreTrainedTokenizerBase,
              content: str | None) -> tuple[dict[str, Walk], str]:
    """The same tokens of a text with `<bos>` in front ("always") and without ("never"), or why there are none."""
    if content is None:
        return {}, ""
    length = min(LENGTH, decoder.max_length)
    try:
        rows = token_rows(tokenizer, content, ROWS, length, "always", decoder.vocabulary)
    except RequestError as error:
        return {}, str(error)
    return {"always": Walk(decoder, rows, ROWS), "never": Walk(decoder, rows[:, 1:], ROWS)}, ""


def _walk(decoder: Decoder, walks: list[Walk]) -> None:
    """Run these and one short row, and refuse what can only be seen on the way.

    Raises:
        RequestError: the model does not compute causal attention once in every layer.
    """
    table = AttentionTable()
    short = Walk(decoder, torch.arange(16)[None] % decoder.vocabulary, 1, observers=[table])
    for step, *_ in together([short, *walks]):
        step.run()
        if step.index not in decoder.quiet:
            table.require_causal(1, type(decoder.model).__name__)
        table.close_layer(short.rows)


def _tokenization(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, audit: Audit) -> None:
    bos = tokenizer.bos_token_id
    found = audit.tokenization
    found["tokenizer"] = f"<bos> is {tokenizer.bos_token!r}, id {bos}" if bos is not None else "has no <bos>"
    configured = getattr(model.config.get_text_config(decoder=True), "bos_token_id", None)
    if bos is not None and configured is not None and configured != bos:
        audit.warnings.append(f"config.json says bos_token_id {configured}, the tokenizer {bos}; make them agree.")
    added = adds_bos(tokenizer)
    front = "once" if starts_with_bos(tokenizer, "auto") else "none"
    found["calibration"] = f"<bos> in front: {front}"
    found["evaluation"] = f"<bos> in front of every window: {front}"
    found["serving (plain text)"] = f"<bos> in front: {added}"
    if added == "twice":
        audit.warnings.append("the tokenizer puts two <bos> in front of plain text; serving will see both.")
    if unsaid := left_out(tokenizer):
        audit.warnings.append(f"{unsaid}.")
    if tokenizer.chat_template is None:
        found["chat template"] = "there is none"
        return
    try:
        rendered = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
        direct = leading(_ids(tokenizer.apply_chat_template(MESSAGES, tokenize=True)), bos)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        found["chat template"] = f"does not render one user message ({first_line(error)})"
        audit.warnings.append("the chat template does not render a single user message; check how chats are served.")
        return
    again = leading(list(tokenizer(rendered)["input_ids"]), bos)
    found["chat template"] = f"<bos> in front: {direct}; rendered to text and tokenized again: {again}"
    if direct > 1:
        audit.warnings.append("the chat template itself puts two <bos> in front of a chat; mend the template.")
    elif again > 1:
        audit.warnings.append("a chat rendered to text and tokenized again has two <bos>; "
                              "tokenize it with add_special_tokens=False.")


def _ids(encoded: Any) -> list[int]:
    return list(encoded["input_ids"] if hasattr(encoded, "keys") else encoded)


def _support(decoder: Decoder, audit: Audit) -> None:
    shape = decoder.shape("")
    audit.support["detection"] = f"yes: {len(decoder.blocks)} blocks of {shape.architecture}"
    if is_quantized(decoder.model):
        audit.support["quantization"] = ALREADY
        return
    free = [linear for linear in shape.linears.values() if not linear.fixed]
    audit.support["quantization"] = (f"{len(free)} of {len(shape.linears)} weight matrices of the blocks"
                                     if free else "no")
    for reason in sorted({linear.fixed for linear in shape.linears.values() if linear.fixed}):
        audit.support[f"left in 16 bits ({sum(x.fixed == reason for x in shape.linears.values())})"] = reason
    sizes = [size for size in (32, 64, 128) if all(linear.columns % size == 0 for linear in free)]
    has = instructions()
    audit.support["instructions that engines ask of this processor"] = ", ".join(
        f"{one}: {'yes' if one in has else 'no'}" for one in instructions_asked())
    for index, sentence in enumerate(out_of_reach(has)):
        audit.support[f"engines on this processor ({index + 1})"] = sentence
    audit.support["packed KV cache on this processor"] = _cache_reads()
    asked = formats_asked(shape, Recipe()) if free else {}
    if asked:
        audit.support["4 bits run in"] = ", ".join(loads_in(shape, asked, own_format(shape, asked)))
    audit.support["one GGUF file for llama.cpp"] = _gguf(shape, list(asked))
    for note in shape.notes:
        audit.support["files"] = f"{audit.support['files']}; {note}" if "files" in audit.support else note
    try:
        audit.support["checkpoint loads again"] = require_loads(decoder, shape, formats_asked(shape, Recipe()))
    except RequestError as error:
        audit.support["checkpoint loads again"] = "no"
        audit.warnings.append(str(error))
    audit.support["group sizes that fit all"] = ", ".join(map(str, [*sizes, "-1 (per output channel)"]))


def _gguf(shape: ModelShape, packed: list[str]) -> str:
    """Whether sinkquant can write one of the model, or the sentence that a run would be refused with."""
    try:
        GGUF[0].check_model(shape.architecture, shape.folder, {name: shape.linears[name].columns for name in packed})
    except RequestError as error:
        return f"no: {error}"
    return "yes (backend=gguf)"


def _cache_reads() -> str:
    """What decoding reads packed blocks with."""
    found = native_or_why()
    return (f"read with torch, which takes two to three times as long: {found}" if isinstance(found, str) else
            f"read by a library made by {found.made_by}")


def _worth_of_bos(walks: dict[str, Walk], tokenizer: PreTrainedTokenizerBase, audit: Audit) -> None:
    """The measured worth of `<bos>`: next-token loss of the same tokens with it in front, and without."""
    losses = {"always": walks["always"].losses()[:, 1:], "never": walks["never"].losses()}
    found = {policy: float(loss.double().mean()) for policy, loss in losses.items()}
    worth = found["never"] - found["always"]
    audit.tokenization["measured"] = (f"loss {found['always']:.3f} with <bos> in front, {found['never']:.3f} "
                                      "without it (nats per token)")
    if worth > LOSS_MATTERS and adds_bos(tokenizer) == "none":
        audit.warnings.append(f"the model is {worth:.2f} nats better with <bos> in front, but the tokenizer adds none; "
                              "set calibration.bos=always and check how it is served.")
    if not torch.isfinite(torch.tensor(worth)):
        audit.warnings.append("the loss is not finite.")


def instructions() -> frozenset[str]:
    """As `Loads.instructions` names them."""
    has = {"AVX-512": torch.cpu._is_avx512_supported(), "VNNI": torch.cpu._is_vnni_supported()}
    return frozenset(name for name, there in has.items() if there)
