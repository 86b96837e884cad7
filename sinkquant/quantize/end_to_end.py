"""The last stage of a plan: what `Distill` needs from before and from during quantization, and its run at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from sinkquant.artifacts import Plan
from sinkquant.models import ActivationStore, Decoder, Walk
from sinkquant.models.hooks import compute_in
from sinkquant.models.steps import Progress
from sinkquant.quantize.refine import Distill, Offsets, Scales, TeacherTargets, Tuned, decompressed
from sinkquant.quantize.rows import calibration_rows
from sinkquant.quantize.transforms.parameters import read
from sinkquant.schemes.codecs.packed import PackedWeight


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
        module name -> packed weight, in main memory.

    Raises:
        SinkquantError: the divergence is not finite.
    """
    model, stored = decoder.model, decoder.model.dtype
    was_training = model.training
    model.eval()
    try:
        with decoder.present([model]), compute_in([model], device, dtype):
            tuned = {name: start.on(device) for name, start in starts.items()}
            method = Distill(plan.calibration.distill, plan.seed)
            weights = method.run(decoder, tuned, teacher, device, stored, progress)
    finally:
        model.train(was_training)
    return {name: packed.to("cpu") for name, packed in weights.items()}
