"""Where a model's weights lie: accelerate's device maps; what does not fit is offloaded to main memory or the disk."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory, get_max_memory
from transformers import PreTrainedModel

from sinkquant.errors import RequestError, first_line

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
DeviceMap = str | Mapping[str, int | str | torch.device]


@dataclass(frozen=True)
class Placement:
    """What transformers' `from_pretrained` and accelerate's `dispatch_model` know under these names."""

    device_map: DeviceMap
    max_memory: Mapping[int | str, int | str] | None = None
    offload_folder: str | os.PathLike[str] | None = None

    @classmethod
    def asked(cls, device_map: DeviceMap | None, max_memory: Mapping[int | str, int | str] | None,
              offload_folder: str | os.PathLike[str] | None, device: str) -> Placement | None:
        """What was asked for, or None where the whole model goes to one device.

        Raises:
            RequestError: a device map and a device, a strategy that accelerate does not have, or settings of a device
                map without one.
        """
        if device_map is None:
            if max_memory is not None or offload_folder is not None:
                raise RequestError("max_memory and offload_folder go with a device map; give device_map='auto' too.")
            return None
        if device != "cpu":
            raise RequestError(f"both device={device!r} and a device map say where weights go; give one of them.")
        if isinstance(device_map, str) and device_map not in STRATEGIES:
            raise RequestError(f"device_map is a mapping of modules to devices or one of {', '.join(STRATEGIES)}, not "
                               f"{device_map!r}.")
        return cls(device_map, max_memory, offload_folder)

    def arguments(self) -> dict[str, Any]:
        """For `from_pretrained`, which then never holds what is offloaded."""
        return {"device_map": self.device_map if isinstance(self.device_map, str) else dict(self.device_map),
                "max_memory": None if self.max_memory is None else dict(self.max_memory),
                "offload_folder": None if self.offload_folder is None else str(self.offload_folder)}

    def apply(self, model: PreTrainedModel, packed: bool) -> PreTrainedModel:
        """Dispatch a model that is in main memory, in place. Returns the model.

        Args:
            packed: its weights are packed in the order of the CPU's kernels, and are buffers.

        Raises:
            RequestError: packed weights are sent to another device than the CPU; or accelerate refuses the map.
        """
        try:
            found = self._solved(model)
            if packed and (elsewhere := sorted({str(place) for place in found.values()} - {"cpu", "disk"})):
                raise RequestError(f"the device map sends weights that are packed for the CPU to {elsewhere[0]}; map "
                                   "them to cpu and disk, or give device='cuda' for all of them.")
            return dispatch_model(model, found, offload_dir=self.offload_folder, offload_buffers=packed,
                                  skip_keys=model._skip_keys_device_placement)
        except (ValueError, KeyError, RuntimeError) as error:
            raise RequestError(f"accelerate does not carry out the device map: {first_line(error)}.") from error

    def _solved(self, model: PreTrainedModel) -> dict[str, Any]:
        """Module name -> device, as transformers lets accelerate work it out."""
        if not isinstance(self.device_map, str):
            return dict(self.device_map)
        limits = None if self.max_memory is None else dict(self.max_memory)
        whole = model._no_split_modules
        memory = get_max_memory(limits) if self.device_map == "sequential" else get_balanced_memory(
            model, limits, no_split_module_classes=whole, low_zero=self.device_map == "balanced_low_0")
        return dict(infer_auto_device_map(model, memory, no_split_module_classes=whole))
