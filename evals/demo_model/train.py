"""Trains a small model with real attention sinks from a folder of text.

    python evals/demo_model/train.py evals/demo_model/demo.yaml --text FOLDER --output DIR

What makes sinks form, and why it is done here:
- `<bos>` first in EVERY row: a sink needs a token that is always there (Barbero et al. 2504.02732, table 3; Xiao et al.
  2309.17453, section 3.3 pre-trains with a dedicated sink token).
- AdamW with weight decay, a high learning rate, many steps (Gu et al. 2410.10781, section 4).
- Progressive context: sinks grow with the training length (2504.02732, figure 6); short rows first are cheap.
- A mixing cost (mixing.py) in the stages that ask for it, since the model is small and the training short. A model card
  in the output says so.
Massive activations (Sun et al. 2402.17762) come by themselves with AdamW.

What else the literature proposes is an option: `bos: none` packs rows without `<bos>`; `architecture` may be any causal
decoder of transformers, one with a learned sink column (granite_swa; gpt-oss, 2508.10925) or with gated attention
(afmoe; 2505.06708) among them. evals/studies/ compares them.
"""

from __future__ import annotations

import argparse
import lzma
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from mixing import mixing_cost
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "</s>"]
SEPARATOR = "<|doc|>"
Bos = Literal["first", "none"]


@dataclass(frozen=True)
class Stage:
    """Some steps at one row length. The learning rate falls from `learning_rate` to `final_rate` by a cosine."""

    steps: int
    rows: int
    length: int
    learning_rate: float
    final_rate: float
    warmup: int = 0
    mixing_cost: float = 0.0


def read_documents(folder: Path) -> list[str]:
    """Every document of the .txt and .txt.xz files of a folder, in the order of their names."""
    documents: list[str] = []
    for path in sorted([*folder.glob("*.txt"), *folder.glob("*.txt.xz")]):
        raw = path.read_bytes()
        text = (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode("utf-8")
        documents += [part.strip() for part in text.split(f"{SEPARATOR}\n") if part.strip()]
    if not documents:
        raise SystemExit(f"{folder} holds no .txt or .txt.xz file with text in it.")
    return documents


def train_tokenizer(documents: Sequence[str], vocabulary: int, length: int,
                    bos: Bos = "first") -> PreTrainedTokenizerFast:
    """Byte-level BPE that puts `<s>` in front of a text, once, or never with `bos` "none"."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=SPECIAL, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(documents, trainer)
    if bos == "first":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", SPECIAL.index("<s>"))])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
                                   model_max_length=length)


def batches(stream: torch.Tensor, stage: Stage, generator: torch.Generator, bos: Bos) -> Iterator[torch.Tensor]:
    """Random rows of the token stream, `<s>` first in each if `bos` says so: int64 [rows, length]."""
    front = torch.full((stage.rows, 1), SPECIAL.index("<s>")) if bos == "first" else torch.empty(stage.rows, 0).long()
    room = stage.length - front.shape[1]
    for _ in range(stage.steps):
        starts = torch.randint(len(stream) - stage.length, (stage.rows,), generator=generator)
        rows = torch.stack([stream[s:s + room] for s in starts.tolist()]).long()
        yield torch.cat([front, rows], dim=1)


def train(model: PreTrainedModel, stream: torch.Tensor, stages: list[Stage], seed: int, device: str,
          bos: Bos = "first") -> list[float]:
    """Run all stages. Returns the loss of every step, mixing cost not counted."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.95), weight_decay=0.1)
    losses = []
    model.to(device).train()
    priced = any(stage.mixing_cost for stage in stages)
    # The cost comes with an attention function of its own, which knows no learned sinks: only where it is asked for.
    context: AbstractContextManager[list[torch.Tensor]] = mixing_cost(model) if priced else nullcontext([])
    with context as costs:
        for stage in stages:
            for step, rows in enumerate(batches(stream, stage, generator, bos)):
                rate = rate_at(stage, step)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                rows = rows.to(device)
                costs.clear()
                with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                    logits = model(rows, use_cache=False).logits
                loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten())
                price = stage.mixing_cost * torch.stack(costs).mean() if costs else torch.zeros(())
                (loss + price.to(device)).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(float(loss.detach()))
                if step % 50 == 0:
                    print(f"length {stage.length} step {step}/{stage.steps} loss {losses[-1]:.3f}", flush=True)
            costs.clear()
    return losses


def rate_at(stage: Stage, step: int) -> float:
    """Linear warm-up, then a cosine to the final rate."""
    if step < stage.warmup:
        return stage.learning_rate * (step + 1) / stage.warmup
    done = (step - stage.warmup) / max(1, stage.steps - stage.warmup)
    return stage.final_rate + (stage.learning_rate - stage.final_rate) * 0.5 * (1 + math.cos(math.pi * done))


def prepare(config: dict[str, Any], documents: Sequence[str]) -> tuple[PreTrainedTokenizerFast, torch.Tensor]:
    """The tokenizer, and all documents as one stream of its tokens, int32."""
    bos = config.get("bos", "first")
    if bos not in ("first", "none"):
        raise SystemExit(f"bos is {bos!r}; write 'first' or 'none'.")
    documents = random.Random(int(config.get("seed", 0))).sample(documents, len(documents))
    shape = config["model"]
    tokenizer = train_tokenizer(documents, int(shape["vocab_size"]), int(shape["max_position_embeddings"]), bos)
    ids = [i for document in documents
           for i in tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]]
    return tokenizer, torch.tensor(ids, dtype=torch.int32)


def build(config: dict[str, Any], tokenizer: PreTrainedTokenizerFast, stream: torch.Tensor,
          output: Path) -> list[float]:
    """Train a model as the configuration says, and save it with its tokenizer and a model card."""
    seed, bos = int(config.get("seed", 0)), config.get("bos", "first")
    torch.manual_seed(seed)
    stages = [Stage(**stage) for stage in config["stages"]]
    shape = dict(config["model"])
    # vocab_size is what BPE reached, which a small text may keep below what was asked for.
    settings = AutoConfig.for_model(config["architecture"], **(shape | {
        "vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}))
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    losses = train(model, stream, stages, seed,
                   "cuda" if torch.cuda.is_available() else "cpu", bos)
    model.to("cpu", torch.bfloat16).eval().save_pretrained(output)
    tokenizer.save_pretrained(output)
    encouraged = any(stage.mixing_cost for stage in stages)
    tokens = sum(stage.steps * stage.rows * stage.length for stage in stages)
    front = "`<s>` first in every row" if bos == "first" else "rows without `<s>`"
    (output / "README.md").write_text(
        f"# A small {config['architecture']} with attention sinks\n\nTrained on {tokens} tokens, {front}. The sinks "
        f"were {'encouraged by a mixing cost' if encouraged else 'not encouraged'}. Last training loss "
        f"{sum(losses[-20:]) / len(losses[-20:]):.3f}.\nStages: {config['stages']}\n", encoding="utf-8")
    return losses


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    config = yaml.safe_load(arguments.config.read_text(encoding="utf-8"))
    build(config, *prepare(config, read_documents(arguments.text)), arguments.output)


if __name__ == "__main__":
    main()
