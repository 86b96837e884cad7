"""What reads and what writes the residual stream of a decoder, and what stands before every linear.

Found by the names and classes that transformers gives its modules; a parameter whose place is not known is named as a
reason, and nobody may rely on the rest being all.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sinkquant.errors import RequestError
from sinkquant.models.blocks import layer_config

BEFORE_ATTENTION = ("input_layernorm", "self_attn_layer_norm", "ln_1", "attention_norm", "ln_attn")
BEFORE_MLP = ("pre_feedforward_layernorm", "pre_mlp_layernorm", "ln_mlp", "ln_2", "ffn_norm")
ATTENTION_READERS = frozenset({"q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "q_a_proj",
                               "kv_a_proj_with_mqa"})
ATTENTION_WRITERS = frozenset({"o_proj", "out_proj", "dense", "c_proj"})
ATTENTION_INNER = frozenset({"q_norm", "k_norm", "q_layernorm", "k_layernorm", "q_a_layernorm", "kv_a_layernorm",
                             "q_b_proj", "kv_b_proj"})
MLP_READERS = frozenset({"gate_proj", "up_proj", "gate_up_proj", "fc1", "c_fc", "fc_in", "dense_h_to_4h", "w1", "w3",
                         "gate", "router", "shared_expert_gate"})
MLP_WRITERS = frozenset({"down_proj", "fc2", "c_proj", "fc_out", "dense_4h_to_h", "w2"})
UNTOUCHED = frozenset({"sinks", "e_score_correction_bias", "bias_mask"})


@dataclass(frozen=True)
class Matrix:
    """A weight, [..., out, in], or [..., in, out] where `transposed`; `bias` is [..., out]. Both by parameter names."""

    weight: str
    bias: str | None = None
    transposed: bool = False

    @property
    def module(self) -> str:
        """The linear's name; the parameter's where it belongs to no linear."""
        return self.weight.removesuffix(".weight")


@dataclass(frozen=True)
class Norm:
    """A norm of the residual stream: (x - mean if `centred`) / spread * (`offset` + gain) + bias."""

    name: str
    gain: str | None
    bias: str | None
    centred: bool
    offset: int


Known = dict[tuple[object, ...], tuple[bool, int] | None]
"""Class, parameters and settings of a norm -> `centred` and `offset`, None for none of these kinds."""


@dataclass(frozen=True)
class Pair:
    """Two linears with nothing but products and sums of whole channels between them.

    `rows` [channels] are the rows of `first` that feed the columns of `second`: column c is fed by `rows[reads[c]]`.
    Several heads of queries share one of values; `head_dim` is 0 in an MLP. `gated`: what `second` reads is multiplied
    by a gate, so that channels may be scaled but not mixed.
    """

    first: Matrix
    second: Matrix
    rows: torch.Tensor
    reads: torch.Tensor
    head_dim: int = 0
    gated: bool = False


@dataclass(frozen=True)
class BlockStructure:
    """`reads`: the norms, each with all matrices that read it; None stands for the stream itself. `writes`: matrices
    whose output is added to the stream. `values`: values and output of the attention. `inner`: the same in the MLP.
    `sandwiched`: norms between a writer and the stream. `unknown`: reasons why the rest may not be all."""

    reads: tuple[tuple[Norm | None, tuple[Matrix, ...]], ...]
    writes: tuple[Matrix, ...]
    values: Pair | None
    inner: tuple[Pair, ...]
    sandwiched: tuple[str, ...]
    unknown: tuple[str, ...]


@dataclass(frozen=True)
class Structure:
    """A whole decoder. `embeddings`: parameters whose rows are added up to the stream. `head` reads `final`."""

    blocks: tuple[BlockStructure, ...]
    embeddings: tuple[str, ...]
    final: Norm | None
    head: Matrix | None
    unknown: tuple[str, ...] = field(default_factory=tuple)

    @property
    def norms(self) -> Iterator[Norm]:
        """Every norm that reads the stream."""
        for block in self.blocks:
            yield from (norm for norm, _ in block.reads if norm is not None)
        if self.final is not None:
            yield self.final


def refusals(structure: Structure) -> dict[str, str]:
    """Scope of a rotation -> why the model would not compute the same after it; a scope that is possible is missing."""
    found = {}
    if any(block.values is None or block.values.gated for block in structure.blocks):
        found["values"] = found["full"] = "the values of its attention do not go straight into one output projection"
    unknown = [*structure.unknown, *(reason for block in structure.blocks for reason in block.unknown)]
    sandwiched = [name for block in structure.blocks for name in block.sandwiched]
    if unknown:
        found["full"] = unknown[0]
    elif sandwiched:
        found["full"] = f"{sandwiched[0]} scales every channel by itself just before the residual stream"
    return found


def inputs(structure: Structure) -> dict[str, tuple[str, str | None]]:
    """Name of a linear -> what its input is ("stream", "values" or "inner"), and the norm or the linear that can take a
    scale of its input's channels, None where there is none."""
    found: dict[str, tuple[str, str | None]] = {}
    for block in structure.blocks:
        for norm, matrices in block.reads:
            takes = norm.name if norm is not None and norm.gain is not None and not block.unknown else None
            found |= {matrix.module: ("stream", takes) for matrix in matrices}
        if block.values is not None:
            found[block.values.second.module] = ("values", block.values.first.module)
        found |= {pair.second.module: ("inner", pair.first.module) for pair in block.inner}
    return found


def structure_of(model: PreTrainedModel, block_names: Sequence[str], blocks: Sequence[nn.Module]) -> Structure:
    """The structure of a decoder with these blocks; no weight is read."""
    config = model.config.get_text_config(decoder=True)
    width = int(config.hidden_size)
    known: Known = {}
    found = tuple(_block(layer_config(config, index), name, block, known)
                  for index, (name, block) in enumerate(zip(block_names, blocks, strict=True)))
    inside = tuple(f"{name}." for name in block_names)
    ends = {id(model.get_input_embeddings()): "embedding", id(model.get_output_embeddings()): "head"}
    embeddings: list[str] = []
    finals: list[Norm] = []
    head: Matrix | None = None
    unknown: list[str] = []
    for name, module in model.named_modules():
        if name.startswith(inside) or name in block_names:
            continue
        own = [leaf for leaf, _ in module.named_parameters(recurse=False)]
        role = ends.get(id(module))
        if role == "head" and isinstance(module, nn.Linear):
            head = _matrix(name, module)
        elif role == "embedding" or (isinstance(module, nn.Embedding) and module.embedding_dim == width):
            embeddings.append(f"{name}.weight")
        elif "Norm" in type(module).__name__:
            norm = norm_of(name, module, width, known)
            unknown += [f"{name} is no norm that is known"] if norm is None else []
            finals += [] if norm is None else [norm]
        elif own:
            unknown.append(f"it holds {name}, whose part in the residual stream is not known")
    if len(finals) != 1:
        unknown.append(f"{len(finals)} norms stand outside the blocks where one was expected")
    if head is None:
        unknown.append("its output head is no linear")
    return Structure(found, tuple(embeddings), finals[0] if len(finals) == 1 else None, head, tuple(unknown))


def norm_of(name: str, module: nn.Module, width: int, known: Known) -> Norm | None:
    """A norm over `width` channels; None where it is none of the known kinds.

    Args:
        known: what norms of this class and these settings were found to compute, which is added to.

    Raises:
        RequestError: it gives NaN.
    """
    parameters = dict(module.named_parameters())
    if not set(parameters) <= {"weight", "bias"} or any(p.shape != (width,) for p in parameters.values()):
        return None
    settings = tuple(sorted((key, repr(value)) for key, value in vars(module).items() if not key.startswith("_")))
    kind = (type(module), tuple(sorted(parameters)), settings)
    if kind not in known:
        known[kind] = _computes(name, module, width, tuple(parameters))
    if (found := known[kind]) is None:
        return None
    own = [f"{name}.{leaf}" if leaf in parameters else None for leaf in ("weight", "bias")]
    return Norm(name, own[0], own[1], *found)


def _computes(name: str, module: nn.Module, width: int, leaves: Sequence[str]) -> tuple[bool, int] | None:
    """Whether a norm subtracts the mean, and what it adds to its gain: found by trying it on random numbers."""
    trial = copy.deepcopy(module).to_empty(device="cpu").double().eval()
    generator = torch.Generator().manual_seed(0)
    rows = 1 + 3 * torch.randn(2, width, generator=generator, dtype=torch.float64)
    values = {leaf: torch.rand(width, generator=generator, dtype=torch.float64) for leaf in leaves}
    with torch.no_grad():
        for leaf, value in values.items():
            getattr(trial, leaf).copy_(value)
        found = trial(rows)
    if not torch.isfinite(found).all():
        raise RequestError(f"{name} gives NaN for ordinary inputs: the epsilon of norms in config.json (rms_norm_eps, "
                           "layer_norm_eps) makes no sense; get the configuration again.")
    for centred in (False, True):
        moved = rows - rows.mean(-1, keepdim=True) if centred else rows
        unit = moved / moved.square().mean(-1, keepdim=True).sqrt()
        for offset in (0, 1):
            gain = offset + values["weight"] if "weight" in values else torch.ones(width, dtype=torch.float64)
            if torch.allclose(found.double(), unit * gain + values.get("bias", 0), rtol=1e-3, atol=1e-3):
                return centred, offset
    return None


def _block(config: PreTrainedConfig, name: str, block: nn.Module, known: Known) -> BlockStructure:
    norms = [child for child, module in block.named_children() if "Norm" in type(module).__name__]
    before_attention = next((norm for norm in BEFORE_ATTENTION if norm in norms), None)
    before_mlp = next((norm for norm in BEFORE_MLP if norm in norms), None)
    if before_mlp is None and before_attention == "self_attn_layer_norm" and "final_layer_norm" in norms:
        before_mlp = "final_layer_norm"
    if before_mlp is None and before_attention is not None and "post_attention_layernorm" in norms:
        before_mlp = "post_attention_layernorm"
    unknown: list[str] = []
    if getattr(config, "do_layer_norm_before", True) is False:
        unknown.append("its norms stand behind the residual additions")
    attention = tuple(path for path, module in block.named_modules() if "Attention" in type(module).__name__)
    matrices: dict[str, Matrix] = {}
    attends: list[Matrix] = []
    feeds: list[Matrix] = []
    writes: list[Matrix] = []
    for path, module in block.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not own or path in norms:
            continue
        leaf, full = path.rpartition(".")[2], f"{name}.{path}"
        inside = any(path == one or path.startswith(f"{one}.") for one in attention)
        readers, writers = (ATTENTION_READERS, ATTENTION_WRITERS) if inside else (MLP_READERS, MLP_WRITERS)
        if leaf in readers | writers and "weight" in own:
            matrix = matrices[path] = _matrix(full, module)
            (writes if leaf in writers else attends if inside else feeds).append(matrix)
        elif leaf == "experts" and {"gate_up_proj", "down_proj"} <= set(own):
            up, down, width = own["gate_up_proj"].shape, own["down_proj"].shape, int(config.hidden_size)
            turned = bool(getattr(module, "is_transposed", up[1] == width == down[2]))  # Llama 4's do not say
            feeds.append(Matrix(f"{full}.gate_up_proj", _if_there(own, full, "gate_up_proj_bias"), turned))
            writes.append(Matrix(f"{full}.down_proj", _if_there(own, full, "down_proj_bias"), turned))
            own = {key: own[key] for key in own if not key.startswith(("gate_up_proj", "down_proj"))}
            unknown += [f"it holds {full}.{key}" for key in own]
        elif not ((inside and leaf in ATTENTION_INNER) or set(own) <= UNTOUCHED):
            unknown.append(f"it holds {full}, whose part in the residual stream is not known")
    read: list[tuple[Norm | None, tuple[Matrix, ...]]] = []
    sides = [(before_attention, attends), (before_mlp, feeds)] if before_mlp else [(before_attention, attends + feeds)]
    for norm, readers_of_it in sides:
        found = None
        if norm is not None:
            found = norm_of(f"{name}.{norm}", block.get_submodule(norm), int(config.hidden_size), known)
            unknown += [f"{name}.{norm} is no norm that is known"] if found is None else []
        read.append((found, tuple(readers_of_it)))
    values = next((pair for path in attention if (pair := _values(config, block, path, matrices)) is not None), None)
    sandwiched = tuple(f"{name}.{norm}" for norm in norms if norm not in (before_attention, before_mlp))
    return BlockStructure(tuple(read), tuple(writes), values, tuple(_inner(block, matrices)), sandwiched,
                          tuple(unknown))


def _matrix(name: str, module: nn.Module) -> Matrix:
    has_bias = getattr(module, "bias", None) is not None
    return Matrix(f"{name}.weight", f"{name}.bias" if has_bias else None, isinstance(module, Conv1D))


def _if_there(own: dict[str, nn.Parameter], full: str, leaf: str) -> str | None:
    return f"{full}.{leaf}" if leaf in own else None


def _size(block: nn.Module, path: str, columns: bool) -> int:
    """Output rows or input columns of a linear."""
    module = block.get_submodule(path)
    shape = module.weight.shape
    assert isinstance(shape, torch.Size)
    return int(shape[-1] if columns != isinstance(module, Conv1D) else shape[0])


def _values(config: PreTrainedConfig, block: nn.Module, path: str, matrices: dict[str, Matrix]) -> Pair | None:
    """The rows that make values, and the output that reads them; None where something else stands between them."""
    module = block.get_submodule(path)
    prefix = f"{path}." if path else ""
    second = next((f"{prefix}{leaf}" for leaf in ("o_proj", "out_proj", "dense", "c_proj")
                   if f"{prefix}{leaf}" in matrices), None)
    names = {child for child, _ in module.named_children()}
    if second is None or any("norm" in child and child[0] not in "qk" for child in names):
        return None
    others = {child for child, one in module.named_children() if isinstance(one, nn.Linear | Conv1D)}
    if others - ATTENTION_READERS - ATTENTION_WRITERS - ATTENTION_INNER:  # it may read the values too, as Doge's does
        return None
    heads = int(config.num_attention_heads)
    columns = _size(block, second, columns=True)
    head_dim = int(getattr(module, "v_head_dim", None) or getattr(module, "head_dim", None) or columns // heads)
    source = next((leaf for leaf in ("v_proj", "qkv_proj", "query_key_value", "c_attn")
                   if f"{prefix}{leaf}" in matrices), None)
    if source is None or columns % head_dim:
        return None
    total = _size(block, f"{prefix}{source}", columns=False)
    by_head = source == "query_key_value" or (
        config.model_type == "gpt_bigcode" and source == "c_attn" and not config.multi_query)
    if by_head:  # a head's query, key and value stand side by side
        if total != 3 * columns:
            return None
        rows = torch.arange(total).reshape(-1, 3, head_dim)[:, 2].flatten()
    else:
        count = total if source == "v_proj" else (total - columns) // 2
        rows = torch.arange(total - count, total)
    if not len(rows) or len(rows) % head_dim or columns % len(rows):
        return None
    repeats = columns // len(rows)
    reads = torch.arange(len(rows)).reshape(-1, 1, head_dim).expand(-1, repeats, -1).flatten()
    queries = f"{prefix}q_proj"  # twice as wide where they hold a gate too, as Qwen3-Next's
    gated = queries in matrices and _size(block, queries, columns=False) == 2 * columns
    return Pair(matrices[f"{prefix}{source}"], matrices[second], rows, reads, head_dim, gated)


def _inner(block: nn.Module, matrices: dict[str, Matrix]) -> Iterator[Pair]:
    """What the gate multiplies, with what reads the product; and two linears with a ReLU between them."""
    for path, second in matrices.items():
        parent, _, leaf = path.rpartition(".")
        prefix = f"{parent}." if parent else ""
        columns = _size(block, path, columns=True)
        every = torch.arange(columns)
        if any("norm" in child for child, _ in block.get_submodule(parent).named_children() if parent):
            continue
        if leaf in ("down_proj", "w2"):
            gate, up = ("gate_proj", "up_proj") if leaf == "down_proj" else ("w1", "w3")
            if f"{prefix}{gate}" in matrices and f"{prefix}{up}" in matrices:
                yield Pair(matrices[f"{prefix}{up}"], second, every, every)
            elif f"{prefix}gate_up_proj" in matrices:
                yield Pair(matrices[f"{prefix}gate_up_proj"], second, columns + every, every)
        elif leaf in ("fc2", "dense_4h_to_h") and any(
                isinstance(module, nn.ReLU) for module in block.get_submodule(parent).children()):
            first = f"{prefix}{'fc1' if leaf == 'fc2' else 'dense_h_to_4h'}"
            if first in matrices:
                yield Pair(matrices[first], second, every, every)
