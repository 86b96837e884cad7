"""What no checkpoint can ask an engine for: inputs rounded to fewer than 8 bits. sinkquant does it itself when it
loads such a checkpoint to evaluate it, and so does nobody else."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from sinkquant.artifacts import Plan
from sinkquant.errors import RequestError
from sinkquant.models.inputs import input_args, round_inputs

SCALES = "simulated/input_scales.safetensors"
"""In a folder of its own: some engines load every safetensors file beside config.json as weights."""


def save_simulated(folder: Path, plan: Plan, scales: dict[str, torch.Tensor]) -> None:
    """Write the static scales of simulated inputs beside a checkpoint; nothing where there are none."""
    mine = {f"{name}.input_scale": scale for name, scale in sorted(scales.items()) if plan.modules[name].simulated}
    if mine:
        (folder / SCALES).parent.mkdir(exist_ok=True)
        save_file(mine, folder / SCALES, {"format": "pt"})


def simulate(model: PreTrainedModel, plan: Plan, folder: Path) -> PreTrainedModel:
    """Round the inputs of a loaded checkpoint's linears to what its plan simulates. Returns the model itself.

    Raises:
        RequestError: the static scales are missing.
    """
    args = {name: input_args(decision.activations, decision.activation_scale)
            for name, decision in plan.modules.items() if decision.simulated and decision.activation_scale}
    static = [name for name in args if not args[name].dynamic]
    scales: dict[str, torch.Tensor] = {}
    if static:
        found = load_file(folder / SCALES) if (folder / SCALES).is_file() else {}
        missing = [name for name in static if f"{name}.input_scale" not in found]
        if missing:
            raise RequestError(f"{folder} lacks the scale of the simulated inputs of {missing[0]} in {SCALES}; make "
                               "the checkpoint again.")
        scales = {name: found[f"{name}.input_scale"] for name in static}
    if args:
        round_inputs(model, dict(model.named_modules()), args, scales)
    return model
