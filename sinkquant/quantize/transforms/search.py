"""What a scale of channels is worth: the error that rounding to nearest leaves in the linears that read them, be it of
weights alone or of inputs too."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sinkquant.models.inputs import InputSwitch, RoundedInputs, input_args, static_scale
from sinkquant.quantize.module import square_norm
from sinkquant.schemes import WeightFormat, input_format, scheme_of
from sinkquant.schemes.codecs import codec_of, library_codec
from sinkquant.schemes.codecs.packed import dequantize, group_scales, to_codes
from sinkquant.schemes.inputs import NO_ROUNDING

ROWS = 128
"""Rows of a weight that the error is taken over, evenly spread: rows are rounded one by one."""
SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
"""Shares of a group's range that are tried where scales are searched: coarse, since scales of channels are compared."""


@dataclass(frozen=True)
class Reader:
    """A linear that will be packed: its weight, float32 [rows, columns], and its format."""

    weight: torch.Tensor
    form: WeightFormat

    def sample(self) -> Reader:
        """The same with at most `ROWS` rows."""
        step = -(-len(self.weight) // ROWS)
        return Reader(self.weight[::step], self.form)


def best(candidates: list[torch.Tensor], readers: list[Reader], hessian: torch.Tensor, scale_search: bool) -> int:
    """Which of several scales of the columns, [columns], leaves the least error, the first of equals.

    The error of a reader is trace(dW H dW^T) / trace(W H W^T): the weighted squared error of what it gives.
    """
    metric = hessian.float()
    sampled = [reader.sample() for reader in readers]
    totals = [max(square_norm(reader.weight, metric), 1e-30) for reader in sampled]
    errors = [sum(_rounding_error(reader, scale, metric, scale_search) / total
                  for reader, total in zip(sampled, totals, strict=True)) for scale in candidates]
    return errors.index(min(errors))


def best_rounded(candidates: list[torch.Tensor], readers: list[Reader], tokens: torch.Tensor,
                 largest: torch.Tensor, scale_search: bool) -> int:
    """Which of several scales of the columns, [columns], leaves the least error where inputs are rounded as well, the
    first of equals: the mean over tokens of the squared error of what a reader gives over the square of that, so that
    no massive activation outweighs all other tokens.

    Args:
        tokens: float [tokens, columns], some inputs. largest: [columns], the largest |x| of all.
    """
    sampled = [reader.sample() for reader in readers]
    wanted = [tokens @ reader.weight.T for reader in sampled]
    errors = [0.0] * len(candidates)
    for place, scale in enumerate(candidates):
        for reader, right in zip(sampled, wanted, strict=True):
            inputs = _rounded_inputs(tokens / scale, reader.form, largest / scale)
            weight = _rounded_weight(reader.weight * scale, reader.form, tokens / scale, scale_search)
            off = (inputs @ weight.T - right).square().sum(-1) / right.square().sum(-1).clamp(min=1e-30)
            errors[place] += float(off.mean())
    return errors.index(min(errors))


def _rounded_inputs(tokens: torch.Tensor, form: WeightFormat, largest: torch.Tensor) -> torch.Tensor:
    if form.inputs == NO_ROUNDING or form.input_scale is None:
        return tokens
    args, scale = input_args(form.inputs, form.input_scale), None
    if input_format(form.inputs).stored(form.input_scale):
        scale = static_scale(-largest.max(), largest.max(), args, torch.bfloat16).to(tokens.device)
    # compressed-tensors takes a scale per token of inputs [rows, tokens, columns] alone.
    return RoundedInputs(args, InputSwitch(), scale).rounded(tokens[None])[0]


def _rounded_weight(weight: torch.Tensor, form: WeightFormat, tokens: torch.Tensor, scale_search: bool) -> torch.Tensor:
    library = library_codec(form)
    if library is not None:
        return library.rounded(weight.bfloat16(), form).dequantized(torch.float32)
    codec, scales = codec_of(form), getattr(torch, scheme_of(form).scales("bfloat16", expert=False))
    whole = codec.fused_scale([weight]) if scheme_of(form).fused_scale else None
    return codec.nearest(form, scales, scale_search, whole).quantize(weight, tokens.square().mean(0)).dequantized()


def _rounding_error(reader: Reader, scale: torch.Tensor, metric: torch.Tensor, scale_search: bool) -> float:
    assert reader.form.group_size is not None
    weight = reader.weight * scale
    reach = group_scales(weight, reader.form.bits, reader.form.group_size, torch.bfloat16).float()
    groups = (*reach.shape, -1)
    grouped, cost = weight.reshape(groups), (metric.diagonal() / scale.square()).reshape(1, reach.shape[1], -1)
    rounded, least = torch.empty_like(grouped), torch.full_like(reach, torch.inf)
    for share in SHARES if scale_search else SHARES[:1]:
        part = dequantize(to_codes(weight, reach * share, reader.form.bits), reach * share).reshape(groups)
        error = ((part - grouped).square() * cost).sum(-1)
        rounded = torch.where((error < least)[..., None], part, rounded)
        least = torch.minimum(least, error)
    return square_norm(rounded.reshape(weight.shape) / scale - reader.weight, metric)
