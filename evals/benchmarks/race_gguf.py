"""A model as the GGUF file that llama.cpp's own quantizer reads, and what it wrote as a model of transformers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from transformers import PreTrainedModel

from sinkquant.models import load_model
from sinkquant.models.gguf_tensors import in_models_order, row_order
from sinkquant.schemes.gguf.layout import FileTensor, aligned, head, metadata_bytes
from sinkquant.schemes.gguf.metadata import family_of, model_metadata, read_json
from sinkquant.schemes.gguf.names import file_name, is_gain


def write_gguf(folder: Path, path: Path) -> None:
    """A model as one float32 GGUF file, which llama.cpp's own quantizer reads."""
    model, config = load_model(folder, torch.float32), read_json(folder / "config.json")
    kind = type(model).__name__
    family, metadata = family_of(kind), model_metadata(folder, kind, "F32")
    tied = config.get("tie_word_embeddings", False)
    state = {name: value for name, value in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    tensors = {str(file_name(family, name)): FileTensor("F32", tuple(value.shape), name)
               for name, value in state.items()}
    with path.open("wb") as file:
        file.write(head(metadata_bytes(metadata), len(metadata), tensors))
        for name, tensor in tensors.items():
            value = state[str(tensor.source)].float()
            order = row_order(config, family, name, value.shape[0])
            value = value if order is None else value[order]
            value = value + 1 if family.norms_plus_one and is_gain(name) else value
            file.write(value.contiguous().numpy().tobytes() + bytes(aligned(tensor.bytes) - tensor.bytes))


def read_gguf(path: Path, folder: Path) -> tuple[PreTrainedModel, int, Counter[str]]:
    """A file of llama.cpp's with its weights dequantized to float32 in the model of `folder`, the bytes of its blocks,
    and how many of the blocks' weights have which type: rows that a type's blocks do not divide fall back."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    model, tensors, blocks, kinds = load_model(folder, torch.float32), {}, 0, Counter[str]()
    for tensor in GGUFReader(path).tensors:
        shape = [int(size) for size in reversed(tensor.shape)]
        tensors[tensor.name] = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type)).reshape(shape)
        if tensor.name.startswith("blk."):
            blocks += int(tensor.n_bytes)
            kinds[tensor.tensor_type.name] += int(tensor.n_elements) if len(shape) > 1 else 0
    info = model.load_state_dict(in_models_order(folder, tensors), strict=False)
    left = set(info.missing_keys) - {"lm_head.weight"}
    if left or info.unexpected_keys:
        raise SystemExit(f"{path} lacks {sorted(left)} and has {info.unexpected_keys}")
    model.tie_weights()
    return model, blocks, kinds
