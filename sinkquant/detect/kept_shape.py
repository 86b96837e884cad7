"""The shape of a model, into its sink map."""

from __future__ import annotations

from transformers import PreTrainedModel

from sinkquant.artifacts import SinkMap
from sinkquant.models import Decoder, source_of
from sinkquant.models.on_record import keep_shape


def with_shape(sink_map: SinkMap, model: PreTrainedModel) -> SinkMap:
    """The sink map with the shape that plans from it start from, where the model's files alone tell it.

    Args:
        model: as `open_model` gave it, of a folder.
    """
    source = source_of(model)
    if source is None or source.compared:
        return sink_map
    found = keep_shape(Decoder.of(model).shape(""), source.folder)
    return sink_map.model_copy(update={"shape": found})
