"""Over-squashing and representational collapse: how much of the text still reaches the last token.

The exact products and Jacobians need length x length matrices: they are for rows of at most `LONGEST` tokens.
"""

from __future__ import annotations

import copy

import torch

from sinkquant.artifacts.diagnosis import Collapse, OverSquashing
from sinkquant.diagnose.null import measured
from sinkquant.diagnose.rates import context_lengths
from sinkquant.diagnose.survey import WalkSettings
from sinkquant.errors import RequestError
from sinkquant.models import AttentionRecord, AttentionRows, Decoder
from sinkquant.models.hooks import hooked

LONGEST = 256
"""Tokens in a row whose mixing matrices are kept."""
JACOBIAN_LENGTH, JACOBIAN_ROWS = 32, 2
JACOBIAN_PARAMETERS = 50_000_000
"""Models up to this size are differentiated exactly: hidden_size backward passes per row."""


class MixingProduct:
    """An observer: the product over layers of abar = (sum over heads of attention + identity / heads), each abar
    divided by its row sums, float64 [rows, length, length]; entry (j, i) weighs all paths from token i to token j.

    Mass on a learned sink column moves no token and is left out before the division. Layers without an attention
    matrix are left out of the product.
    """

    def __init__(self) -> None:
        self.product: torch.Tensor | None = None
        self._chunks: list[torch.Tensor] = []
        self._batches: list[torch.Tensor] = []

    def attention_rows(self, rows: AttentionRows) -> None:
        """Sum a chunk over heads."""
        self._chunks.append(rows.probabilities.double().sum(1))

    def attention(self, record: AttentionRecord) -> None:
        """The end of a batch."""
        mixed = torch.cat(self._chunks, dim=1)
        self._chunks = []
        mixed = mixed + torch.eye(mixed.shape[1], dtype=torch.float64, device=mixed.device) / record.query.shape[1]
        self._batches.append((mixed / mixed.sum(-1, keepdim=True)).cpu())

    def close_layer(self) -> None:
        """All batches of a layer were seen: the last layer stands leftmost."""
        if self._batches:
            layer = torch.cat(self._batches)
            self.product = layer if self.product is None else layer @ self.product
        self._batches = []


def mixing_product(decoder: Decoder, rows: torch.Tensor, compute: WalkSettings) -> torch.Tensor:
    """The product of mixing matrices of all layers (Barbero et al. 2504.02732), float64.

    Returns:
        [rows, length, length], rows that sum to 1.

    Raises:
        RequestError: the rows are longer than `LONGEST`.
    """
    if rows.shape[1] > LONGEST:
        raise RequestError(f"exact mixing products are for rows of at most {LONGEST} tokens, not {rows.shape[1]}.")
    observer = MixingProduct()
    walk = compute.walk(decoder, rows)
    walk.observers.append(observer)
    for step in walk.steps():
        step.run()
        observer.close_layer()
    assert observer.product is not None, "some block attends"
    return observer.product


def jacobian_norms(decoder: Decoder, row: torch.Tensor) -> torch.Tensor:
    """Spectral norms of d v_last / d v_i, exact in float32: float64 [length].

    From the input of the first block to the output of the last one, all `hidden_size` rows by backward passes.

    Args:
        row: int64 [length], at most `JACOBIAN_LENGTH` tokens.

    Raises:
        RequestError: the row or the model is too large for exact derivatives.
    """
    size = sum(parameter.numel() for parameter in decoder.model.parameters())
    if len(row) > JACOBIAN_LENGTH or size > JACOBIAN_PARAMETERS:
        raise RequestError(f"exact Jacobians are for models of at most {JACOBIAN_PARAMETERS:,} parameters and rows of "
                           f"at most {JACOBIAN_LENGTH} tokens.")
    # As any module does it: transformers refuses `.float()` of a model that came out of a quantized checkpoint.
    twin = Decoder.of(torch.nn.Module.float(copy.deepcopy(decoder.model)).eval().requires_grad_(False))
    kept: dict[str, torch.Tensor] = {}

    def enter(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        kept["in"] = args[0].detach().requires_grad_(True)
        return (kept["in"], *args[1:])

    def leave(_: torch.nn.Module, __: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        kept["out"] = output[0] if isinstance(output, tuple) else output

    handles = [twin.blocks[0].register_forward_pre_hook(enter), twin.blocks[-1].register_forward_hook(leave)]
    with hooked(handles), torch.enable_grad():
        twin.model.base_model(row[None].to(twin.model.device), use_cache=False)
        last = kept["out"].reshape(-1, kept["out"].shape[-1])[-1]
        lines = [torch.autograd.grad(value, kept["in"], retain_graph=True)[0][0] for value in last]
    jacobian = torch.stack(lines).double().cpu()  # [hidden out, length, hidden in]
    return torch.linalg.matrix_norm(jacobian.transpose(0, 1), ord=2)


def over_squashing(decoder: Decoder, rows: torch.Tensor, sinks: torch.Tensor, compute: WalkSettings) -> OverSquashing:
    """Where the last token's information comes from. rows, sinks: [rows, length], cut to `LONGEST` tokens."""
    rows, sinks = rows[:, :LONGEST], sinks[:, :LONGEST]
    last = mixing_product(decoder, rows, compute)[:, -1]
    far = ~sinks & (torch.arange(rows.shape[1]) < rows.shape[1] // 2)
    jacobian = None
    if sum(parameter.numel() for parameter in decoder.model.parameters()) <= JACOBIAN_PARAMETERS:
        norms = [jacobian_norms(decoder, row) for row in rows[:JACOBIAN_ROWS, :JACOBIAN_LENGTH]]
        jacobian = torch.stack(norms).mean(0).tolist()
    return OverSquashing(length=rows.shape[1], rows=len(rows), product=last.mean(0).tolist(),
                         sink_share=measured((last * sinks).sum(1), compute.seed),
                         far_share=measured((last * far).sum(1), compute.seed), jacobian=jacobian)


def representational_collapse(decoder: Decoder, rows: torch.Tensor, compute: WalkSettings) -> list[Collapse]:
    """Distances of the last token's representation when it is repeated once more, over prefixes of the rows.

    Args:
        rows: int64 [rows, length]; prefixes of 8, 16, 32, ... tokens are taken, and the whole but one.
    """
    found = []
    for length in context_lengths(rows.shape[1] - 1, first=8):
        once = rows[:, :length]
        ends = []
        for row in (once, torch.cat([once, once[:, -1:]], dim=1)):
            walk = compute.walk(decoder, row)
            for step in walk.steps():
                step.run()
            ends.append(walk.hidden[:, -1].double().cpu())
        distance = (ends[0] - ends[1]).norm(dim=-1)
        found.append(Collapse(length=length, distance=measured(distance, compute.seed),
                              relative=measured(distance / ends[0].norm(dim=-1).clamp(min=1e-300), compute.seed)))
    return found
