"""The sections about what is looked at and how: computation, texts, detection, evaluation, the quality gate."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sinkquant.recipe.section import FilePath, Section


class Compute(Section):
    """Where and in which precision statistics, Hessians and evaluation are computed.

    `memory_limit`: gigabytes (10^9 bytes) of memory that a run may take; null: what is free on the machine.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    memory_limit: float | None = Field(default=None, gt=0)


class CalibrationText(Section):
    """The rows that the quantizer sees: `rows` x `length` tokens of `text`: a file, a pattern,
    `hub:` and a data set, or a list of them, each with its weight (`chats.jsonl@3`) where one has any (null: the
    packaged prose).

    `bos` "auto" puts `<bos>` in front exactly once where the tokenizer adds it at all. An expert that fewer than
    `min_expert_tokens` tokens go to is named, and quantized as if all tokens of its layer went to it.
    """

    text: FilePath | list[FilePath] | None = None
    rows: int = Field(default=64, ge=1)
    length: int = Field(default=512, ge=2)
    bos: Literal["auto", "always", "never"] = "auto"
    batch_size: int = Field(default=8, ge=1)
    min_expert_tokens: int = Field(default=256, ge=0)


class Detection(Section):
    """Thresholds of detection, each set against models and texts that hold no sink.

    `rows` x `length` tokens for the published sink rate, `long_rows` x `long_length` for sinks further back.
    """

    rows: int = Field(default=100, ge=1)
    length: int = Field(default=64, ge=32)
    long_rows: int = Field(default=8, ge=0)
    long_length: int = Field(default=512, ge=64)
    batch_size: int = Field(default=20, ge=1)
    threshold: float = Field(default=0.3, gt=0, lt=1)
    occurrence_share: float = Field(default=0.5, gt=0, le=1)
    min_occurrences: int = Field(default=4, ge=1)
    min_head_share: float = Field(default=0.05, ge=0, le=1)
    massive_ratio: float = Field(default=50.0, gt=1)
    massive_token_share: float = Field(default=0.1, gt=0, le=1)
    outlier_ratio: float = Field(default=64.0, gt=1)
    column_ratio: float = Field(default=2.0, gt=1)
    no_op_sink_score: float = Field(default=0.8, gt=0, le=1)
    no_op_output_norm: float = Field(default=0.5, gt=0)
    super_weights: bool = True
    super_weight_loss: float = Field(default=0.02, gt=0)


class Evaluation(Section):
    """How the result is measured. `tasks` are names of packaged lm-eval tasks, of those in `task_folder`, a folder of
    lm-eval task files, or of any task lm-eval can reach; where none is in the folder, all in the folder are added.
    `limit` scores the first documents of each task, `sample` as many drawn by the seed; null: all, which is what
    `quantize-model eval` takes. `window`: tokens of a context, or a window of rolling perplexity, at most.
    Divergence is measured on `divergence_rows` rows, or fewer once every verdict is certain or its difference known to
    `precision` times the divergence; null: all of them, as in `quantize-model eval`.
    `generation_rows` continuations of `generation_tokens` tokens after a prompt of `generation_prompt` go through every
    packed KV cache token by token, beside one in bfloat16; 0: none do.
    `fidelity` compares the sinks of every quantized row with the unquantized model's. With `skip` a run ends with its
    checkpoint, for models that do not fit into memory as a whole."""

    skip: bool = False
    text: FilePath | list[FilePath] | None = None
    tasks: list[str] = Field(default_factory=lambda: ["sink_perplexity", "sink_cloze", "sink_recall"])
    task_folder: str | None = None
    limit: int | None = Field(default=None, ge=1)
    sample: int | None = Field(default=16, ge=2)
    window: int = Field(default=2048, ge=16)
    control: bool = True
    fidelity: bool = True
    divergence_rows: int = Field(default=64, ge=2)
    divergence_length: int = Field(default=512, ge=16)
    precision: float | None = Field(default=0.05, gt=0, lt=1)
    generation_rows: int = Field(default=0, ge=0)
    generation_prompt: int = Field(default=256, ge=1)
    generation_tokens: int = Field(default=256, ge=1)
    bootstrap: int = Field(default=2000, ge=100)
    batch_size: int = Field(default=8, ge=1)


class Gate(Section):
    """Bounds on the sink-aware row; breaking one ends the run with exit code 3. Null: not checked.

    `sinks`: the worst verdict of sink fidelity that passes; "changed" refuses only sinks that were destroyed.
    """

    max_divergence: float | None = Field(default=None, gt=0)
    min_recovery: float | None = Field(default=None, gt=0)
    max_sink_rate_change: float | None = Field(default=None, gt=0)
    max_head_divergence: float | None = Field(default=None, gt=0)
    min_massive_overlap: float | None = Field(default=None, gt=0, le=1)
    sinks: Literal["kept", "changed"] | None = None
