"""The tokenizer of a model's folder in the words of llama.cpp, from tokenizer.json: byte-level BPE ("gpt2") and
SentencePiece's BPE with byte fallback ("llama")."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sinkquant.errors import RequestError
from sinkquant.schemes.json_object import read_object

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""llama.cpp's types of tokens."""
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
           r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
           r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
SPLITS = {rf"{_LETTERS}|\p{{N}}{{1,3}}|{_REST}": "llama-bpe", rf"{_LETTERS}|\p{{N}}|{_REST}": "qwen2",
          _TEKKEN: "tekken"}
"""The expression that a tokenizer splits text by before its merges -> what llama.cpp calls it."""
IGNORE_MERGES = ("llama-bpe", "tekken")
"""Those with which llama.cpp takes a whole word that is a token as it stands."""


def tokenizer_metadata(folder: Path, rows: int) -> dict[str, tuple[str, Any]]:
    """The keys of the tokenizer and the chat template.

    Args:
        rows: of the token embedding; ids that the tokenizer does not give are filled up.

    Raises:
        RequestError: the folder has no tokenizer.json, or one that llama.cpp cannot be told.
    """
    path, more, advice = folder / "tokenizer.json", folder / "tokenizer_config.json", "copy the model folder again"
    if not path.is_file():
        raise RequestError(f"{folder} has no tokenizer.json, and a GGUF file holds the tokenizer; put it beside "
                           "config.json.")
    content, settings = read_object(path, advice), read_object(more, advice) if more.is_file() else {}
    model = content.get("model") or {}
    if model.get("type") != "BPE":
        raise RequestError(f"the tokenizer of {folder} is a {model.get('type')}, and GGUF files are written with BPE "
                           "alone; use another backend.")
    _require_plain(content, bool(model.get("byte_fallback")), folder)
    ids: dict[str, int] = dict(model["vocab"])
    added = {int(one["id"]): one for one in content.get("added_tokens") or []}
    ids |= {one["content"]: number for number, one in added.items()}
    needed = {*model["vocab"], *(_text(settings.get(f"{kind}_token")) for kind in ("bos", "eos")), *_around(content)}
    # What else is added behind the last row cannot be looked up: the image token of Gemma 3, say, in its text models.
    ids = {text: number for text, number in ids.items() if number < rows or text in needed}
    if max(ids.values()) >= rows:
        raise RequestError(f"the tokenizer of {folder} gives the id {max(ids.values())}, and the model has {rows} "
                           "embeddings; they do not belong together.")
    unknown = _text(settings.get("unk_token")) or model.get("unk_token")
    tokens = [f"[PAD{number}]" for number in range(rows)]
    types = [UNUSED] * rows
    for text, number in ids.items():
        tokens[number] = text
        types[number] = _type(text, added.get(number), unknown, bool(model.get("byte_fallback")))
    found: dict[str, tuple[str, Any]] = {}
    merges = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
    if model.get("byte_fallback"):
        found |= {"tokenizer.ggml.model": ("str", "llama"), "tokenizer.ggml.pre": ("str", "default"),
                  "tokenizer.ggml.tokens": ("[str]", _as_written(tokens, types)),
                  "tokenizer.ggml.scores": ("[f32]", _scores(tokens, types, model["merges"])),
                  "tokenizer.ggml.token_type": ("[i32]", types),
                  "tokenizer.ggml.add_space_prefix": ("bool", _adds_space(content))}
    else:
        found |= {"tokenizer.ggml.model": ("str", "gpt2"),
                  "tokenizer.ggml.pre": ("str", split_of(content, bool(model.get("ignore_merges")), folder)),
                  "tokenizer.ggml.tokens": ("[str]", tokens), "tokenizer.ggml.token_type": ("[i32]", types),
                  "tokenizer.ggml.merges": ("[str]", merges)}
    return found | _specials(folder, content, settings, ids)


def _as_written(tokens: list[str], types: list[int]) -> list[str]:
    """Tokens as llama.cpp reads them: it makes spaces of the mark of sentencepiece in normal ones alone."""
    return [token.replace("\u2581", " ") if kind == USER else token for token, kind in zip(tokens, types, strict=True)]


def _steps(content: dict[str, Any], part: str, several: str) -> list[dict[str, Any]]:
    """What a part of tokenizer.json does, one after the other; sequences may hold sequences.

    Args:
        several: the key of a sequence's steps.
    """
    given = content.get(part) or {}
    if several in given:
        return [step for one in given[several] for step in _steps({part: one}, part, several)]
    return [given] if given else []


def _require_plain(content: dict[str, Any], marks: bool, folder: Path) -> None:
    """Refuse a tokenizer that changes text before it splits it in ways that llama.cpp does not know. Unicode's NFC, as
    Qwen has it, is let through: llama.cpp leaves it out, and nearly all text is in that form.

    Args:
        marks: whether llama.cpp writes SentencePiece's mark for spaces; then it splits text nowhere else.
    """
    mark = "\u2581"
    for step in _steps(content, "normalizer", "normalizers"):
        kind = step.get("type")
        known = [{"type": "Prepend", "prepend": mark}, {"type": "Replace", "pattern": {"String": " "}, "content": mark}]
        if kind != "NFC" and not (marks and step in known):
            raise RequestError(f"the tokenizer of {folder} changes text by {kind} before it splits it, which a GGUF "
                               "file cannot say; use another backend.")
    spaces = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    for step in _steps(content, "pre_tokenizer", "pretokenizers") if marks else ():
        if step != spaces and (step.get("type"), step.get("replacement")) != ("Metaspace", mark):
            raise _unnamed_split(folder, "at spaces alone")


def _unnamed_split(folder: Path, known: str) -> RequestError:
    return RequestError(f"the tokenizer of {folder} splits text in a way that has no name in GGUF files here (known: "
                        f"{known}); use another backend.")


def split_of(content: dict[str, Any], ignore_merges: bool, folder: Path) -> str:
    """What llama.cpp calls the way in which text is split before the merges of a byte-level BPE (`tokenizer.ggml.pre`).

    Args:
        content: of tokenizer.json.

    Raises:
        RequestError: it has no name for it that is known here.
    """
    steps = _steps(content, "pre_tokenizer", "pretokenizers")
    kinds = [step.get("type") for step in steps]
    name = ""
    if kinds and kinds[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space"):
        own = bool(steps[-1].get("use_regex", True))
        if kinds == ["ByteLevel"] and own:
            name = "gpt-2"
        elif kinds == ["Digits", "ByteLevel"] and own and steps[0].get("individual_digits"):
            name = "smollm"
        elif kinds == ["Split", "ByteLevel"] and not own:
            name = SPLITS.get((steps[0].get("pattern") or {}).get("Regex", ""), "")
    if not name or ignore_merges != (name in IGNORE_MERGES):
        raise _unnamed_split(folder, f"gpt-2, smollm, {', '.join(SPLITS.values())}")
    return name


def _scores(tokens: list[str], types: list[int], merges: list[Any]) -> list[float]:
    """SentencePiece merges the pair with the highest score first: a token scores by the first merge that makes it."""
    rank: dict[str, int] = {}
    for index, merge in enumerate(merges):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        rank.setdefault(left + right, index)
    return [float(-rank.get(token, len(merges))) if kind == NORMAL else 0.0
            for token, kind in zip(tokens, types, strict=True)]


def _specials(folder: Path, content: dict[str, Any], settings: dict[str, Any],
              ids: dict[str, int]) -> dict[str, tuple[str, Any]]:
    found: dict[str, tuple[str, Any]] = {}
    for key, name in (("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")):
        text = _text(settings.get(key))
        if text is not None and text in ids:
            found[f"tokenizer.ggml.{name}_token_id"] = ("u32", ids[text])
    front, back = _around(content)
    if front is not None and front in ids and "tokenizer.ggml.bos_token_id" not in found:
        found["tokenizer.ggml.bos_token_id"] = ("u32", ids[front])
    last = ids.get(back or "")
    if last is not None and found.get("tokenizer.ggml.eos_token_id") != ("u32", last):
        # llama.cpp puts this one behind every row; what ends a turn gets a key of its own, as its converter has it.
        if "tokenizer.ggml.eos_token_id" in found:
            found["tokenizer.ggml.eot_token_id"] = found["tokenizer.ggml.eos_token_id"]
        found["tokenizer.ggml.eos_token_id"] = ("u32", last)
    found["tokenizer.ggml.add_bos_token"] = ("bool", front is not None)
    found["tokenizer.ggml.add_eos_token"] = ("bool", last is not None)
    template = _template(folder, settings)
    return found | ({"tokenizer.chat_template": ("str", template)} if template else {})


def _around(content: dict[str, Any]) -> tuple[str | None, str | None]:
    """The special token that every row begins with, and the one that it ends with, or None."""
    for step in _steps(content, "post_processor", "processors"):
        if step.get("type") == "TemplateProcessing" and step.get("single"):
            first, last = (step["single"][place].get("SpecialToken") for place in (0, -1))
            return None if first is None else str(first["id"]), None if last is None else str(last["id"])
    return None, None


def _template(folder: Path, settings: dict[str, Any]) -> str:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    given = settings.get("chat_template")
    if isinstance(given, list):
        given = next((one["template"] for one in given if one.get("name") == "default"), None)
    return given if isinstance(given, str) else ""


def _type(text: str, added: dict[str, Any] | None, unknown: str | None, bytes_too: bool) -> int:
    if text == unknown and bytes_too:
        return UNKNOWN
    if added is not None:
        return CONTROL if added.get("special") else USER
    return BYTE if bytes_too and len(text) == 6 and text.startswith("<0x") and text.endswith(">") else NORMAL


def _adds_space(content: dict[str, Any]) -> bool:
    """Whether text gets a space in front, as SentencePiece does unless it is told not to."""
    return any(step.get("type") == "Prepend" for step in _steps(content, "normalizer", "normalizers")) or any(
        step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never"
        for step in _steps(content, "pre_tokenizer", "pretokenizers"))


def _text(token: Any) -> str | None:
    """A special token of tokenizer_config.json, which is a string or an object with one."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None
