"""Several processes, on one machine or several (torchrun): each walks with its share of the calibration rows, the sums
of the Hessians are added up, and the modules of a block are shared out for the solve.

Without a process group of torch.distributed there is one rank, and nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from sinkquant.artifacts import ModuleDecision, Plan
from sinkquant.errors import RequestError
from sinkquant.models import Decoder
from sinkquant.models.inputs import InputRanges
from sinkquant.models.processes import PATIENCE, new_store, this_process
from sinkquant.quantize.block import QuantizedBlock, with_codes
from sinkquant.quantize.hessian import Hessian
from sinkquant.recipe import Recipe

ONE_PROCESS = ("weights.tune, weights.distill, weights.smooth and protect.channels=scale need all rows in one process; "
               "start without torchrun.")


def join() -> None:
    """Join a process group with all processes of torchrun, if it started this one; gloo, which every machine has.
    Whoever left one joins the next."""
    if dist.is_available() and dist.is_torchelastic_launched() and not dist.is_initialized():
        rank, ranks = this_process()
        dist.init_process_group("gloo", store=new_store(), rank=rank, world_size=ranks, timeout=PATIENCE)


def leave() -> None:
    """End the process group; the libraries that load and evaluate models would share their work in it as well."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def this_rank() -> tuple[int, int]:
    """(rank, number of ranks); (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def tell(message: Any, rank: int = 0) -> Any:
    """What one rank hands over, on every rank."""
    box = [message]
    if this_rank()[1] > 1:
        dist.broadcast_object_list(box, src=rank)
    return box[0]


def my_rows(rows: torch.Tensor, plan: Plan) -> torch.Tensor:
    """This rank's share of the calibration rows, [at least 1, length]. Capped statistics compare the tokens of a batch,
    so that batches stay together for them.

    Raises:
        RequestError: fewer rows than ranks, or a setting whose result depends on which rows are together.
    """
    rank, ranks = this_rank()
    if ranks == 1:
        return rows
    if len(rows) < ranks:
        raise RequestError(f"there are {len(rows)} calibration rows for {ranks} processes; start fewer.")
    if plan.calibration.tune or plan.calibration.distill or plan.rescales:
        raise RequestError(ONE_PROCESS)
    if plan.calibration.statistics != "cap":
        return rows.tensor_split(ranks)[rank]
    batches = rows.split(plan.calibration.batch_size)
    if len(batches) < ranks:
        raise RequestError(f"there are {len(batches)} batches of calibration rows for {ranks} processes, and capped "
                           "statistics need whole ones; start fewer, or set calibration.batch_size lower.")
    first, last = (len(batches) * place // ranks for place in (rank, rank + 1))
    return torch.cat(batches[first:last])


def require_one_process(recipe: Recipe, edited: Plan | None = None) -> None:
    """Raises RequestError where torchrun started several processes and the recipe, or a plan to carry out instead,
    needs all calibration rows in one, before the sinks are looked for."""
    asked = edited.calibration if edited else recipe.weights
    rescales = edited.rescales if edited else recipe.weights.smooth != "none" or recipe.protect.channels == "scale"
    if (asked.tune or asked.distill or rescales) and this_process()[1] > 1:
        raise RequestError(ONE_PROCESS)


def total(counts: torch.Tensor) -> torch.Tensor:
    """The sum of every rank's counts, on every rank."""
    if this_rank()[1] > 1:
        counts = counts.cpu()
        dist.all_reduce(counts)
    return counts


def add_up(hessians: dict[str, Hessian], linears: Mapping[str, nn.Module], cross: bool) -> None:
    """Give every rank the sums over all ranks. A linear that no token reached on any rank stays missing."""
    if this_rank()[1] == 1:
        return
    for name in sorted(linears):
        hessian = hessians.get(name)
        if hessian is None:
            weight = linears[name].weight
            assert isinstance(weight, torch.Tensor)
            hessian = Hessian(weight.shape[1], weight.device)
        total = torch.tensor([hessian.weight], dtype=torch.float64)
        dist.all_reduce(total)
        hessian.weight = float(total)
        sums = [hessian.sum]
        if cross:
            hessian.cross_sum = torch.zeros_like(hessian.sum) if hessian.cross_sum is None else hessian.cross_sum
            sums.append(hessian.cross_sum)
        for matrix in sums:
            everywhere = matrix.cpu()
            dist.all_reduce(everywhere)
            matrix.copy_(everywhere)
        if hessian.weight > 0:
            hessians[name] = hessian


def widest(ranges: InputRanges, names: list[str]) -> None:
    """Give every rank the smallest and the largest input that any rank has seen, in place."""
    if this_rank()[1] == 1:
        return
    for name in sorted(names):
        seen = name in ranges.low
        ends = torch.tensor([-float(ranges.low[name]), float(ranges.high[name])] if seen else [-torch.inf, -torch.inf])
        dist.all_reduce(ends, dist.ReduceOp.MAX)
        if ends[1] > -torch.inf:
            ranges.low[name], ranges.high[name] = -ends[0], ends[1]


def solver(index: int) -> int:
    """The rank that solves the modules that read a block's input of that index."""
    return index % this_rank()[1]


def exchange(decoder: Decoder, mine: dict[str, ModuleDecision], made: QuantizedBlock,
             shared: Mapping[str, list[str]]) -> None:
    """Let every rank hold what each of them has solved of a block. shared: `by_input` of the modules in `mine`."""
    weights, losses = with_codes(made.weights), dict(made.losses)
    places = {name: place for place, names in enumerate(shared.values()) for name in names}
    for name, index in places.items():
        if mine[name].bits >= 16:
            continue
        made.weights[name], made.losses[name] = tell((weights.get(name), losses.get(name)), solver(index))
        old = decoder.weight(name)
        decoder.put(name, made.weights[name].dequantized(decoder.model.dtype).to(old.device, old.dtype))
    for kept in (made.weights, made.losses):  # in the order of the module names, as one process has them
        ordered = {name: kept[name] for name in mine if name in kept}
        kept.clear()
        kept.update(ordered)  # type: ignore[arg-type]
