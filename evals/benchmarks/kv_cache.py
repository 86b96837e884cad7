"""The KV cache against bf16 and transformers' own quantized caches: bytes held, decode and prefill latency, error.

    python evals/benchmarks/kv_cache.py [--tokens 4096 16384] [--bits 2 4] [--heads 32] [--kv-heads 8] [--dim 128]
                                         [--device cuda] [--clock processor] [--threads 1] [--reads torch] [--fill]

One attention layer, batch 1, random keys with a few outlier channels and one sink token (a large key, a small value),
queries that look at it. A prompt of all tokens but `--steps` is prefilled, then decode steps are timed: updating the
cache and attending to all of it, which is what a layer does with its cache. All caches run in one process, on the same
states, interleaved. "error" is the mean relative error of the attention output against the unquantized cache in
float32. quanto and hqq are measured where they are installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, HQQQuantizedLayer, QuantoQuantizedLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sinkquant.artifacts import KVCachePlan, KVLayer
from sinkquant.artifacts.kv import cache_bytes
from sinkquant.cache import Bases, SinkCache, attention
from sinkquant.cache.attention import attend
from sinkquant.cache.layer import SinkLayer
from sinkquant.cache.read_torch import TorchReads
from sinkquant.cache.transforms.descent import Descent
from sinkquant.cache.transforms.recoding import LayerBases
from sinkquant.cache.transforms.rotation import Basis

GROUP, WINDOW, SINKS = 32, 128, 1


class Subject:
    """One cache under test: `update` and attention, with the bytes that it holds."""

    def __init__(self, name: str, layer: CacheLayerMixin, module: torch.nn.Module,
                 cache: SinkCache | None = None, bases: Bases | None = None) -> None:
        self.name, self.layer, self.module, self.cache, self.bases = name, layer, module, cache, bases
        self.decode: list[float] = []
        self.outputs: list[torch.Tensor] = []
        self.prefill = 0.0

    def fill(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """All of a forward pass but its attention."""
        if self.cache is None:
            return self.layer.update(key, value)[0]
        self.cache.see(None, None, (1, key.shape[2]), key.device, False, bases=self.bases)
        return self.cache.update(key, value, 0)[0]

    def step(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool) -> torch.Tensor:
        """One forward pass of the layer: [1, new, heads, dim]."""
        if isinstance(self.layer, SinkLayer) and self.layer.worth_reading_packed(key.shape[2]):
            self.layer.append(key, value)
            out = attend(self.layer, query, None, query.shape[-1] ** -0.5)
            self.layer.settle()
            return out
        if self.cache is not None:
            self.cache.see(None, None, (1, key.shape[2]), key.device, False, bases=self.bases)
        states = self.layer.update(key, value) if self.cache is None else self.cache.update(key, value, 0)
        return sdpa_attention_forward(self.module, query, *states, None, is_causal=causal)[0]

    def nbytes(self) -> int:
        """Every distinct storage that the layer holds."""
        seen: dict[int, int] = {}
        _storages(self.layer.tensors() if isinstance(self.layer, SinkLayer) else vars(self.layer), seen, set())
        return sum(seen.values())


def _storages(held: Any, seen: dict[int, int], visited: set[int]) -> None:
    """Sizes of all tensor storages under an object; tensor subclasses are opened."""
    if id(held) in visited:
        return
    visited.add(id(held))
    if isinstance(held, torch.Tensor):
        if type(held) is torch.Tensor or isinstance(held, torch.nn.Parameter):
            if held.numel():
                seen[held.untyped_storage().data_ptr()] = held.untyped_storage().nbytes()
            return
        held = vars(held)
    if isinstance(held, dict):
        held = list(held.values())
    if isinstance(held, list | tuple):
        for one in held:
            _storages(one, seen, visited)


def states(tokens: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values [1, heads, tokens, dim]: four outlier channels per key head (KIVI 2402.02750, figure 2),
    and a first token whose key is large, points where all queries look, and whose value is small."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, kv_heads, tokens, dim, generator=generator)
    keys[..., :4] = keys[..., :4] * 2 + 8
    values = torch.randn(1, kv_heads, tokens, dim, generator=generator)
    queries = torch.randn(1, heads, tokens, dim, generator=generator)
    direction = torch.nn.functional.normalize(torch.randn(dim, generator=generator), dim=0)
    keys[:, :, 0] = 40 * direction
    values[:, :, 0] *= 0.05
    queries += 2.5 * direction
    return queries.to(dtype), keys.to(dtype), values.to(dtype)


def plan_of(bits: int, kv_heads: int, dim: int, exact: bool) -> KVCachePlan:
    """A KV plan for one layer with the first token exact, or none."""
    layer = KVLayer(packed=True, key_bits=[bits] * kv_heads, value_bits=[bits] * kv_heads, key_dim=dim, value_dim=dim,
                    reason="benchmark")
    return KVCachePlan(
        key_bits=bits, value_bits=bits, group_size=GROUP, window=WINDOW, symmetric=False, rotate="none",
        exact="first-n" if exact else "none", first_n=SINKS, max_exact=SINKS if exact else 0, layers=[layer],
        bits_per_value=0.0, length=1, expected_exact=0, bytes=0, unquantized_bytes=0, reason="benchmark")


def recipe_plan(bits: int, kv_heads: int, dim: int) -> KVCachePlan:
    """What `kv2-sink` with `kv_cache.bits` near 2.4 packs."""
    return plan_of(bits, kv_heads, dim, True).model_copy(update={
        "group_size": 64, "window": 8, "scale_bits": 8, "rotate": "covariance", "rotate_values": "covariance",
        "clip": "both", "rounding": "descent"})


def subjects(arguments: argparse.Namespace) -> list[Subject]:
    """Every cache that is to be measured, the bf16 one first."""
    module = torch.nn.Module()
    module.num_key_value_groups = arguments.heads // arguments.kv_heads
    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=arguments.heads, head_dim=arguments.dim,
                         num_key_value_heads=arguments.kv_heads, hidden_size=arguments.heads * arguments.dim)
    found = [Subject("DynamicCache bf16", DynamicLayer(), module)]
    for bits in arguments.bits:
        for exact in (True, False):
            cache = SinkCache(config, plan_of(bits, arguments.kv_heads, arguments.dim, exact))
            layer = cache.layers[0]
            found.append(Subject(f"SinkCache {bits} bits{', sink exact' if exact else ''}", layer, module, cache))
        cache = SinkCache(config, recipe_plan(bits, arguments.kv_heads, arguments.dim))
        layer = cache.layers[0]
        assert isinstance(layer, SinkLayer)
        near_one = torch.eye(arguments.dim) + 0.02 * torch.randn(arguments.kv_heads, arguments.dim, arguments.dim)
        some = LayerBases(Basis.of_matrix(near_one), Basis.of_matrix(near_one),
                          Descent.of_moment((near_one.mT @ near_one).double()))
        found.append(Subject(f"kv2-sink, {bits} bits", layer, module, cache, Bases({0: some}, "")))
        settings: dict[str, Any] = {"nbits": bits, "q_group_size": GROUP, "residual_length": WINDOW}
        for name, make in (("quanto", QuantoQuantizedLayer), ("hqq", HQQQuantizedLayer)):
            axis = 1 if name == "hqq" else 0
            package = "optimum.quanto" if name == "quanto" else "hqq"
            if _installed(package) and (name == "hqq" or bits in (2, 4)):
                found.append(Subject(f"transformers {name} {bits} bits",
                                     make(axis_key=axis, axis_value=axis, **settings), module))
    return found


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def timed(function: Callable[[], torch.Tensor], clock: Callable[[], float]) -> tuple[float, torch.Tensor]:
    """Milliseconds, and the result. A GPU's work is waited for."""
    _wait()
    start = clock()
    result = function()
    _wait()
    return 1e3 * (clock() - start), result


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(tokens: int, arguments: argparse.Namespace) -> None:
    """Print the table of one length."""
    dtype = torch.bfloat16
    queries, keys, values = (x.to(arguments.device) for x in states(
        tokens, arguments.heads, arguments.kv_heads, arguments.dim, dtype))
    prompt = tokens - arguments.steps
    clock = time.process_time if arguments.clock == "processor" else time.perf_counter
    rows = subjects(arguments)
    for subject in rows:
        prompt_states = [states[:, :, :prompt] for states in (queries, keys, values)]
        subject.prefill, _ = timed(lambda subject=subject, prompt_states=prompt_states: (  # type: ignore[misc]
            subject.fill(*prompt_states) if arguments.fill else subject.step(*prompt_states, True)), clock)
    for column in range(prompt, tokens):
        place = slice(column, column + 1)
        for subject in rows:
            took, out = timed(lambda subject=subject, place=place: subject.step(  # type: ignore[misc]
                queries[:, :, place], keys[:, :, place], values[:, :, place], False), clock)
            subject.decode.append(took)
            subject.outputs.append(out.float())
    base = rows[0]
    exact = reference(queries, keys, values, range(prompt, tokens), arguments)
    print(f"\n{tokens} tokens, {arguments.heads} query and {arguments.kv_heads} KV heads of {arguments.dim}, "
          f"{_where(arguments.device)}\n")
    print("| cache | bytes held | of bf16 | accounted | prefill ms | x bf16 | decode ms | x bf16 | error |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for subject in rows:
        held, step = subject.nbytes(), statistics.median(subject.decode)
        plan = subject.cache.plan if subject.cache is not None else None
        accounted = "" if plan is None else f"{cache_bytes(plan, tokens, plan.max_exact) - 4:,}"
        error = statistics.mean(float((out - want).norm() / want.norm())
                                for out, want in zip(subject.outputs, exact, strict=True))
        print(f"| {subject.name} | {held:,} | {held / base.nbytes():.3f} | {accounted} | {subject.prefill:.0f} | "
              f"{'' if arguments.fill else f'{subject.prefill / base.prefill:.2f}'} | "
              f"{step:.1f} | {step / statistics.median(base.decode):.2f} | {error:.4f} |", flush=True)


def _where(device: str) -> str:
    return torch.cuda.get_device_name(device) if device != "cpu" else f"{torch.get_num_threads()} threads"


def reference(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, columns: range,
              arguments: argparse.Namespace) -> list[torch.Tensor]:
    """Attention outputs of the timed steps, in float32 over unquantized states."""
    groups = arguments.heads // arguments.kv_heads
    k, v = (x.float().repeat_interleave(groups, dim=1) for x in (keys, values))
    outputs = []
    for column in columns:
        scores = queries[:, :, column:column + 1].float() @ k[:, :, :column + 1].mT * arguments.dim**-0.5
        outputs.append((torch.softmax(scores, dim=-1) @ v[:, :, :column + 1]).transpose(1, 2))
    return outputs


def main() -> None:
    """Measure every length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall")
    parser.add_argument("--reads", choices=("found", "torch"), default="found")
    parser.add_argument("--fill", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.reads == "torch":
        attention.reads_on = lambda device: TorchReads()
    with torch.no_grad():
        for tokens in arguments.tokens:
            measure(tokens, arguments)


if __name__ == "__main__":
    main()
