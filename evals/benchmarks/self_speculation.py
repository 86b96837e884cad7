"""Whether a model is decoded faster by drafts of its own: its first blocks, itself without some blocks, itself in few
bits. Outputs are those of plain greedy decoding, token for token, or the benchmark ends with an error.

    python evals/benchmarks/self_speculation.py MODEL [--exits 5 10 15 20] [--drafts 2 4] [--kept FILE.json]
                                                [--packed CHECKPOINT] [--prompts 2] [--prompt 48] [--tokens 32]
                                                [--lines FILE.jsonl]

"exit K" is transformers' own early exit (`assistant_early_exit`, LayerSkip, arXiv 2404.16710): the first K blocks, the
final norm and the head. "shorter" is the model without the blocks that a choice of `prune.blocks` drops (--kept: its
`dropped.json`), "packed" a checkpoint whose weights stay packed, "quantized, dense" the same made dense. Every draft is
tried with every number of tokens on prompts of calibration text. The one that decodes most tokens per second of
processor time there is measured on prompts of the evaluation text, beside plain decoding. "per pass" are tokens for one
forward pass of the whole model.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import sinkquant as sq
from sinkquant.blocks import drop_blocks
from sinkquant.models import Decoder, load_model, load_tokenizer, read_text, resolve, token_rows


@contextmanager
def counted(model: PreTrainedModel) -> Iterator[list[int]]:
    """Count forward passes that reach the last block."""
    passes = [0]

    def count(*_: Any) -> None:
        passes[0] += 1

    with Decoder.of(model).blocks[-1].register_forward_hook(count):
        yield passes


def decode(model: PreTrainedModel, prompts: torch.Tensor, tokens: int, draft: int = 0,
           **assisted: Any) -> tuple[torch.Tensor, float, float]:
    """Greedy decoding, one prompt after the other.

    Args:
        prompts: int64 [prompts, length]. draft: tokens of a draft. assisted: what `generate` drafts with.

    Returns:
        int64 [prompts, tokens]; tokens per second of processor time; tokens per forward pass of the whole model.
    """
    if assisted:
        for one in (model, assisted.get("assistant_model", model)):
            one.generation_config.num_assistant_tokens = draft
            one.generation_config.num_assistant_tokens_schedule = "constant"
            one.generation_config.assistant_confidence_threshold = 0.0
    found = []
    with torch.no_grad(), counted(model) as passes:
        start = time.process_time()
        for prompt in prompts.split(1):
            made = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens,
                                  min_new_tokens=tokens, do_sample=False, pad_token_id=0, **assisted)
            found.append(made[:, prompts.shape[1]:prompts.shape[1] + tokens])
        seconds = time.process_time() - start
    made = torch.cat(found)
    return made, made.numel() / seconds, made.numel() / passes[0]


def drafts(arguments: argparse.Namespace, folder: Path, blocks: int) -> dict[str, dict[str, Any]]:
    """Name -> what `generate` drafts with."""
    found: dict[str, dict[str, Any]] = {f"exit {block}": {"assistant_early_exit": block} for block in arguments.exits
                                        if block < blocks}
    if arguments.kept:
        shorter = load_model(folder, torch.float32)
        drop_blocks(shorter, json.loads(arguments.kept.read_text(encoding="utf-8"))["kept"])
        found[f"shorter, {len(Decoder.of(shorter).blocks)} blocks"] = {"assistant_model": shorter}
    if arguments.packed:
        # As its kernels compute, in bfloat16; and with the same weights made dense, in the model's float32.
        found["packed"] = {"assistant_model": sq.load(arguments.packed, packed=True)[0]}
        found["quantized, dense"] = {"assistant_model": sq.load(arguments.packed, dtype=torch.float32)[0]}
    return found


def main() -> None:
    """Measure what is not measured yet, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--exits", type=int, nargs="*", default=[5, 10, 15, 20])
    parser.add_argument("--drafts", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--kept", type=Path)
    parser.add_argument("--packed", type=Path)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--calibration", help="default: the packaged text")
    parser.add_argument("--evaluation", help="default: the packaged text")
    parser.add_argument("--lines", type=Path)
    arguments = parser.parse_args()
    folder = resolve(arguments.model)
    tokenizer, model = load_tokenizer(folder), load_model(folder, torch.float32)
    contents = {"calibration": read_text(arguments.calibration, "calibration", tokenizer),
                "evaluation": read_text(arguments.evaluation, "evaluation", tokenizer)}
    prompts = {name: token_rows(tokenizer, content, arguments.prompts, arguments.prompt)
               for name, content in contents.items()}
    there = arguments.lines is not None and arguments.lines.exists()
    kept = arguments.lines.read_text(encoding="utf-8").splitlines() if there else []
    lines: list[dict[str, Any]] = [json.loads(line) for line in kept]

    def measured(text: str, name: str, draft: int, assisted: dict[str, Any]) -> dict[str, Any]:
        known = next((one for one in lines if (one["text"], one["draft"], one["tokens"]) == (text, name, draft)), None)
        if known is not None:
            return known
        plain, speed, _ = decode(model, prompts[text], arguments.tokens)  # beside it, so that both see one machine
        made, faster, each = decode(model, prompts[text], arguments.tokens, draft, **assisted)
        if not torch.equal(made, plain):
            raise SystemExit(f"{name} with drafts of {draft} tokens decodes other tokens than plain decoding.")
        line = {"text": text, "draft": name, "tokens": draft, "ratio": faster / speed, "per_pass": each,
                "speed": faster, "plain": speed}
        lines.append(line)
        if arguments.lines:
            with arguments.lines.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        return line

    chosen = []
    for name, assisted in drafts(arguments, folder, len(Decoder.of(model).blocks)).items():
        tried = [measured("calibration", name, draft, assisted) for draft in arguments.drafts]
        best = max(tried, key=lambda line: float(line["ratio"]))
        chosen.append((best["ratio"], name, best["tokens"], assisted))
    print("| draft | tokens of a draft | text | per pass | tokens per processor second | plain | ratio |")
    print("|---|---:|---|---:|---:|---:|---:|")
    for ratio, name, draft, assisted in sorted(chosen, key=lambda one: -one[0]):
        held = measured("evaluation", name, draft, assisted)
        print(f"| {name} | {draft} | calibration | | | | {ratio:.2f} |")
        print(f"| {name} | {draft} | evaluation | {held['per_pass']:.2f} | {held['speed']:.1f} | {held['plain']:.1f} | "
              f"{held['ratio']:.2f} |")


if __name__ == "__main__":
    main()
