"""Tiny tokenizers with merges: byte-level, and SentencePiece's kind with byte fallback."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BPE_VOCABULARY = 320
SPECIALS = ("<unk>", "<s>", "</s>")
_WORDS = ("the", "and", "tion", "ing", "sink", "token", "attention")


def byte_level(split: str | None = None, digits: bool = False, bos: bool = True) -> PreTrainedTokenizerFast:
    """256 bytes and a few merges; ids of `SPECIALS` first.

    Args:
        split: the expression that text is split by, instead of GPT-2's. digits: every digit stands alone.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: index for index, text in enumerate([*SPECIALS, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary | _merged(vocabulary), merges=_merges()))
    steps: list[pre_tokenizers.PreTokenizer] = []
    if split is not None:
        steps.append(pre_tokenizers.Split(Regex(split), "isolated"))
    if digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None))
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return _finished(tokenizer, bos)


def byte_fallback() -> PreTrainedTokenizerFast:
    """Letters, a few merges, and a token for every byte; a space in front of the text."""
    pieces = [*SPECIALS, *(f"<0x{number:02X}>" for number in range(256)), "\u2581", *"abcdeghiknorstw"]
    vocabulary = {text: index for index, text in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary | _merged(vocabulary), merges=_merges(), unk_token="<unk>",
                                     byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _finished(tokenizer, True)


def _merges() -> list[tuple[str, str]]:
    found: dict[tuple[str, str], None] = {}
    for word in _WORDS:
        for end in range(1, len(word)):
            found[word[:end], word[end]] = None
    return list(found)


def _merged(vocabulary: dict[str, int]) -> dict[str, int]:
    words = [word for word in dict.fromkeys("".join(merge) for merge in _merges()) if word not in vocabulary]
    return {word: len(vocabulary) + index for index, word in enumerate(words)}


def _finished(tokenizer: Tokenizer, bos: bool) -> PreTrainedTokenizerFast:
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    made.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return made
