"""compressed-tensors' files: what vLLM and plain transformers load."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import PreTrainedModel

from sinkquant.artifacts import Plan
from sinkquant.models.decoder import ROUTER
from sinkquant.schemes import DEFAULT_BACKEND, WeightFormat, input_format, scheme_of
from sinkquant.schemes.codecs.files import Files

EXPERT = re.compile(r"\.experts\.\d+\.(\w+)$")
"""What ends the name of one projection of one expert."""
BESIDE_TOWERS = re.escape("model.language_model.")
"""What the names of a decoder beside towers begin with, in a pattern."""


class CompressedTensorsFiles(Files):
    """One group of the configuration per format, every other linear ignored by name."""

    backend = DEFAULT_BACKEND

    def settings(self, model: PreTrainedModel, plan: Plan) -> dict[str, Any]:
        """Formats may be mixed."""
        formats: dict[WeightFormat, list[str]] = {}
        for name, form in plan.stored.items():
            formats.setdefault(form, []).append(name)
        groups = {}
        # transformers takes the scheme of all experts from the first group that names any, shared ones included.
        ordered = sorted(formats.items(), key=lambda item: (not any(map(EXPERT.search, item[1])), _order(item[0])))
        for index, (form, names) in enumerate(ordered):
            scheme = scheme_of(form)
            groups[f"group_{index}"] = {"targets": _targets(names), "weights": scheme.arguments(form),
                                        "input_activations": _inputs(form), "output_activations": None,
                                        "format": scheme.layout(form)}
        packed = {name for names in formats.values() for name in names}
        # Routers are no linears in transformers, and linears in vLLM.
        ignore = [name for name, module in model.named_modules() if name not in packed and (
            isinstance(module, torch.nn.Linear) or (ROUTER.search(name) and hasattr(module, "weight")))]
        layouts = sorted({scheme_of(form).layout(form) for form in formats})
        return {"quant_method": "compressed-tensors", "format": layouts[0] if len(layouts) == 1 else "mixed-precision",
                "quantization_status": "compressed", "config_groups": groups, "ignore": ignore,
                "kv_cache_scheme": None if plan.kv_scheme is None else plan.kv_scheme.arguments()}


def _targets(names: list[str]) -> list[str]:
    """Every linear by its name, which engines rename with their modules as they would not rename a pattern; and one
    pattern for all packed experts: there are thousands, and no module has their names. It takes those of vLLM too."""
    layers: dict[str, set[str]] = {}
    for name in names:
        if found := EXPERT.search(name):
            layers.setdefault(name[:found.start()], set()).add(found[1])
    targets = [name for name in names if not EXPERT.search(name)]
    if layers:
        owners = "|".join(map(re.escape, layers)).replace(
            BESIDE_TOWERS, r"(?:model\.language_model|language_model\.model)\.")
        leaves = "|".join(sorted(set().union(*layers.values())))
        targets.append(rf"re:^(?:{owners})\.experts\.\d+\.(?:{leaves})$")
    return targets


def _order(form: WeightFormat) -> tuple[int, int, str, str, str]:
    return form.bits, form.group_size or 0, form.kind, form.inputs, form.input_scale or ""


def _inputs(form: WeightFormat) -> dict[str, Any] | None:
    """How an engine is asked to round inputs; null where it is not."""
    if form.input_scale is None:
        return None
    return input_format(form.inputs).arguments(form.input_scale)
