"""Checkpoints in vLLM: the log-probability of every token of some rows, and greedy continuations.

Run by the Python of vLLM's environment, which has nothing of sinkquant: `vllm_scores.py rows.json out.json
NAME=DTYPE=FOLDER ...`. Every checkpoint gets a process of its own, forked after vLLM was imported once; what it raises
is its result.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR",
                  VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1", VLLM_CPU_OMP_THREADS_BIND="nobind")
OLD = "ONEDNN_MAX_CPU_ISA"
"""Set by who asks for the answers of an older processor; oneDNN, which multiplies 8 bits here, reads it too."""
NEW = 24
"""Tokens of a continuation."""


def score(folder: str, dtype: str, rows: list[list[int]]) -> dict[str, Any]:
    """Log-probabilities per row (nothing for its first token), continuations, kernels, seconds."""
    from vllm import LLM, SamplingParams

    try:
        llm = LLM(folder, dtype=dtype, enforce_eager=True, max_model_len=512, max_num_seqs=4, seed=0,
                  enable_prefix_caching=False, disable_log_stats=True)
        begun = time.time()
        made = llm.generate([{"prompt_token_ids": row} for row in rows],
                            SamplingParams(max_tokens=NEW, temperature=0, prompt_logprobs=0, ignore_eos=True),
                            use_tqdm=False)
        seconds = time.time() - begun
        model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    except Exception as error:  # a checkpoint that an engine refuses is what this looks for
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    kernels: Counter[str] = Counter()
    for module in model.modules():
        if scheme := getattr(module, "scheme", None) or getattr(module, "quant_method", None):
            kernels[f"{type(scheme).__name__}, {type(getattr(scheme, 'kernel', None)).__name__}"] += 1
    return {"logprobs": [[next(iter(one.values())).logprob for one in each.prompt_logprobs if one] for each in made],
            "greedy": [list(each.outputs[0].token_ids) for each in made], "kernels": dict(kernels), "seconds": seconds}


def main() -> None:
    """See the module."""
    source, target, *asked = sys.argv[1:]
    rows = json.loads(Path(source).read_text(encoding="utf-8"))
    if OLD in os.environ:
        import torch

        torch.cpu._is_avx512_supported = lambda: False  # by which vLLM chooses the build of its kernels
    import vllm.v1.engine.core  # noqa: F401  once, before processes are forked

    found = {}
    for at, one in enumerate(asked):
        name, dtype, folder = one.split("=")
        place = Path(f"{target}.{at}")
        if os.fork() == 0:
            place.write_text(json.dumps(score(folder, dtype, rows)), encoding="utf-8")
            os._exit(0)
        os.wait()
        found[name] = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else {"error": "it ended"}
    Path(target).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
