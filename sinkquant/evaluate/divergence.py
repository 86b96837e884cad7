"""Mean KL divergence of a quantized model's next-token distribution from the unquantized one's."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

POSITIONS = 128


def row_divergences(baseline: PreTrainedModel, other: PreTrainedModel, rows: torch.Tensor,
                    batch_size: int = 4) -> list[float]:
    """KL(baseline || other) in nats per token, averaged over the positions of every row.

    Args:
        rows: int64 [rows, length], `<bos>` where the models expect it.
    """
    means = []
    with torch.no_grad():
        for start in range(0, len(rows), batch_size):
            batch = rows[start:start + batch_size]
            first = baseline(batch.to(baseline.device), use_cache=False).logits
            second = other(batch.to(other.device), use_cache=False).logits.to(first.device)
            # A few positions at a time: two float32 [tokens, vocabulary] matrices are the largest thing here.
            parts = []
            for place in range(0, batch.shape[1], POSITIONS):
                p = torch.log_softmax(first[:, place:place + POSITIONS].float(), dim=-1)
                q = torch.log_softmax(second[:, place:place + POSITIONS].float(), dim=-1)
                parts.append((p.exp() * (p - q)).sum(-1).double())
            means += torch.cat(parts, dim=1).mean(1).tolist()
    return [max(0.0, value) for value in means]
