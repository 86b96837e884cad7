"""The last stage of a plan: what distillation needs from before and from during quantization, and its run at the end.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedTokenizerBase

from sinkquant.artifacts import Plan
from sinkquant.models import ActivationStore, Decoder, Walk
from sinkquant.models.hooks import compute_in, evaluating, learning
from sinkquant.models.steps import Progress
from sinkquant.quantize.refine import Offsets, Scales, TeacherDivergence, TeacherTargets, Tuned, decompressed, refine
from sinkquant.quantize.rows import calibration_rows
from sinkquant.quantize.transforms.parameters import read
from sinkquant.schemes.codecs.packed import PackedWeight

LOG = logging.getLogger("sinkquant")


@dataclass(frozen=True)
class TuningStart:
    """Where tuning starts from in one linear: what was packed, and how far its weights lie from their codes, int8
    [rows, columns] as `compressed` has it; None where codes are not tuned."""

    packed: PackedWeight
    offsets: torch.Tensor | None

    def on(self, device: str) -> Tuned:
        """What gradients change."""
        if self.offsets is None:
            return Scales.of(self.packed, device)
        return Offsets.of(self.packed, decompressed(self.offsets, device))


def teacher_targets(decoder: Decoder, plan: Plan, tokenizer: PreTrainedTokenizerBase | None, device: str,
                    dtype: torch.dtype, store: ActivationStore | None = None) -> TeacherTargets | None:
    """Walk through the model before anything is quantized, rotated as the plan says; None where the plan does not
    distill.

    Raises:
        RequestError: no tokenizer, or too little text.
    """
    if not plan.calibration.distill:
        return None
    rows = calibration_rows(decoder, plan, tokenizer)
    walk = Walk(decoder, rows, plan.calibration.batch_size, device, dtype, store=store)
    for _ in walk.steps():
        pass
    output = decoder.model.get_output_embeddings()
    packed = [name for name in plan.ends if decoder.model.get_submodule(name) is output]
    return TeacherTargets(rows, walk.hidden, read(decoder, f"{packed[0]}.weight") if packed else None)


def distilled(decoder: Decoder, plan: Plan, teacher: TeacherTargets, starts: Mapping[str, TuningStart], device: str,
              dtype: torch.dtype, progress: Progress | None = None) -> dict[str, PackedWeight]:
    """Tune all quantized linears of a model whose blocks are done, in memory as a whole.

    Returns:
        module name -> packed weight, in main memory; those that came where tuning does not lower the divergence over
        all rows.

    Raises:
        SinkquantError: the divergence is not finite.
    """
    model, stored, iterations = decoder.model, decoder.model.dtype, plan.calibration.distill
    linears = {name: decoder.linears[name] for name in starts}

    def tell(done: int) -> None:
        if progress:
            progress(done, iterations, "tuning end to end")

    # Gradients of the caller's, in the dtype that weights are stored in, are put back once they are in it again.
    with evaluating(model), decoder.present([model]), learning(model), compute_in([model], device, dtype):
        tuned = {name: start.on(device) for name, start in starts.items()}
        if teacher.head is not None:  # once, in what the model computes in
            teacher = replace(teacher, head=teacher.head.to(model.get_output_embeddings().weight.data))
        objective = TeacherDivergence(decoder, linears, teacher, device, stored)
        weights = [model.get_parameter(f"{name}.weight") for name in starts]
        with learning(model, weights), torch.enable_grad():
            refined = refine(tuned, objective, iterations, plan.seed, tell)
    LOG.info("divergence on the calibration rows: %.5f, and %.5f after %d iterations end to end%s", refined.before,
             refined.after, iterations, "" if refined.better else ", which are not kept")
    return {name: packed.to("cpu") for name, packed in refined.weights.items()}
