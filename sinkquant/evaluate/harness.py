"""lm-eval's own harness over a loaded model, with `<bos>` exactly once at the start of every window.

lm-eval's backend lets the tokenizer put `<bos>` in front and decides by the first string of a batch; its windows after
the first hold none. A model with sinks and no `<bos>` to sink into is another model (Barbero et al. 2504.02732:
without it the sink rate falls to nothing and the loss triples), so here nothing is left to guessing.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkquant.artifacts import KVCachePlan
from sinkquant.cache import SinkCache, prepare, put_in_front
from sinkquant.errors import RequestError, SinkquantError
from sinkquant.evaluate.likelihood import continuation_scores
from sinkquant.evaluate.states import last_states
from sinkquant.models import encode, max_length
from sinkquant.models.head import OutputHead
from sinkquant.models.processes import shared
from sinkquant.models.text import leading


class SinkLM(HFLM):
    """HFLM in which every window starts with `<bos>` exactly once, or never holds one, as `bos` says.

    Args:
        model: a loaded model; it is scored in its own dtype on its own device.
        bos: whether rows of this model start with `<bos>`.
        quiet: no progress bars.
        window: tokens that are scored at once, or stand before them, or of a prompt, at most; None: as many as there
            are positions.
        kv: score and generate through a SinkCache that is packed so; None for none. What the plan puts in front of
            every row is neither scored nor part of what is generated; the model has positions for as many tokens less.
            Where it drops tokens, rows are read one by one: each keeps sinks of its own of them.
    """

    _max_length: int | None

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, bos: bool, batch_size: int,
                 quiet: bool = True, window: int | None = None, kv: KVCachePlan | None = None) -> None:
        if tokenizer.pad_token_id is None:
            # HFLM would give the caller's tokenizer a padding token, and some an id that the model does not know.
            tokenizer = copy.deepcopy(tokenizer)
            if tokenizer.eos_token_id is None and tokenizer.unk_token_id is None:
                tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
        if kv is not None and kv.evict is not None:
            batch_size = 1
        # HFLM would tie a head of its own to the embedding where the configuration says that they are tied.
        model.tie_weights = lambda *_, **__: None
        try:
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, add_bos_token=False,
                             max_length=None if window is None else min(window, max_length(model)))
        finally:
            del model.tie_weights
        self._bos = int(tokenizer.bos_token_id) if bos else None
        self._quiet, self._window, self._kv = quiet, window, kv
        self._head = OutputHead(model)
        if kv is not None:
            prepare(model)

    @property
    def max_length(self) -> int:
        """Tokens of a row, as many as the model has positions for beside those in front."""
        longest = int(super().max_length)
        return longest if self._kv is None else min(longest, max_length(self.model) - len(self._kv.front))

    @property
    def prefix_token_id(self) -> int | None:
        """What stands before a text that has no context: `<bos>`, or the end-of-text token where rows have none.

        None where the tokenizer has neither: the first token of such a text is not scored.
        """
        if self._bos is not None:
            return self._bos
        return None if self.tokenizer.eos_token_id is None else int(self.tokenizer.eos_token_id)

    def tok_encode(self, string: str, *_: Any, **__: Any) -> list[int]:
        """Token ids without any that the tokenizer adds, and without a `<bos>` that the text itself begins with."""
        tokens = encode(self.tokenizer, string)
        return tokens[leading(tokens, self._bos):]

    def tok_batch_encode(self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None,
                         truncation: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts for generation: ids and attention mask, int64 [batch, length].

        Every prompt keeps its `<bos>` where its beginning is cut off to fit into the window, or beside what follows.
        """
        front = [] if self._bos is None else [self._bos]
        limits = [limit for limit in (left_truncate_len, self._window) if limit is not None]
        room = max(1, min(limits) - len(front)) if limits else None
        rows = [front + (tokens if room is None else tokens[-room:]) for tokens in map(self.tok_encode, strings)]
        length = max(map(len, rows))
        ids = torch.full((len(rows), length), int(self.tokenizer.pad_token_id), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            place = slice(length - len(row), length) if padding_side == "left" else slice(0, len(row))
            ids[index, place] = torch.tensor(row, dtype=torch.long)
            mask[index, place] = 1
        return ids, mask

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Context and scored tokens of a request: split where the whole is tokenized, `<bos>` in front.

        Raises:
            RequestError: nothing is to be scored, or more than the model's context holds.
        """
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        before = self.tok_encode(context) if context else []
        # A last word that merges with what follows would leave nothing to score.
        target = self.tok_encode(context + continuation)[len(before):] or self.tok_encode(continuation)
        front = [] if self._bos is None else [self._bos]
        if not before and not front:
            prefix = self.prefix_token_id
            front, target = ([prefix], target) if prefix is not None else (target[:1], target[1:])
        room = self.max_length + 1 - len(front) - len(target)
        if not 0 < len(target) <= self.max_length:
            raise RequestError(f"a task asks for the likelihood of {len(target)} tokens at once, and this model can "
                               f"score 1 to {self.max_length}; leave the task out of evaluate.tasks.")
        return front + before[max(0, len(before) - room):], target

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of continuations, in nats, and whether each is what greedy decoding would give."""
        pairs = [(request.args, *self._encode_pair(*request.args)) for request in requests]
        return [(float(score), bool(greedy)) for score, greedy in self._shared(pairs, disable_tqdm)]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole documents in nats; every token is scored once, in disjoint windows."""
        windows, owners = [], []
        for index, request in enumerate(requests):
            for context, scored in self.windows(self.tok_encode(request.args[0])):
                windows.append((None, context, scored))
                owners.append(index)
        scores = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._shared(windows, disable_tqdm), strict=True):
            scores[owner] += score
        return scores

    def windows(self, tokens: list[int]) -> list[tuple[list[int], list[int]]]:
        """A document in windows: (context, scored tokens), as many as the model has positions for.

        With `<bos>` it is the context of every window. Without it they are lm-eval's: the first window has the
        end-of-text token for context, or its own first token, each further one the token before it, and the last one
        as many as there is room for.
        """
        if self._bos is not None:
            return [([self._bos], tokens[begin:begin + self.max_length])
                    for begin in range(0, len(tokens), self.max_length)]
        prefix = self.prefix_token_id
        if prefix is None:
            prefix, tokens = tokens[0] if tokens else 0, tokens[1:]
        return [make_disjoint_window(window) for window in
                get_rolling_token_windows(tokens, prefix, self.max_length, 1)]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Generated texts; see `tok_batch_encode` for the prompts.

        Raises:
            RequestError: no room is left for a prompt beside what is to be generated, or nothing ends a text.
        """
        if self.tokenizer.eos_token_id is None:
            raise RequestError("a task generates texts, and the tokenizer has no token that ends one; leave the task "
                               "out of evaluate.tasks.")
        quiet, generate, longest = disable_tqdm or self._quiet, super().generate_until, self._max_length
        if self._window is not None:  # of the prompts alone; what is generated has all positions
            self._max_length = max_length(self.model)
        try:
            for request in requests:
                require_positions(request.task_name, tokens_made(request.args[1]), self.max_length)
            return shared(requests, lambda mine: list(generate(mine, disable_tqdm=quiet)))
        finally:
            self._max_length = longest

    def _shared(self, pairs: list[Any], disable_tqdm: bool) -> list[Any]:
        """Scores of (request, context, scored tokens); several processes score a share each."""
        return shared(pairs, lambda mine: list(self._loglikelihood_tokens(
            mine, disable_tqdm=disable_tqdm or self._quiet)))

    def _loglikelihood_tokens(self, requests: list[Any], disable_tqdm: bool = False,
                              override_bs: int | None = None) -> list[tuple[float, bool]]:
        """Instead of HFLM's, which takes logits of every position of a batch, and float32 copies of them.

        Rows are padded on the right, where no scored token sees the padding.

        Raises:
            SinkquantError: a score is NaN, of which lm-eval would make the first choice.
        """
        found = continuation_scores(self._states, self._head, [(context, target) for _, context, target in requests],
                                    override_bs or int(self.batch_size))
        if any(math.isnan(score) for score, _ in found):
            raise SinkquantError(f"what {self.model.name_or_path or 'the model'} predicts of a task's text is not "
                                 "finite: its weights, or what they make of the text, overflow; compute in float32 "
                                 "(compute.dtype), or look at its weights.")
        return found

    def _states(self, ids: torch.Tensor) -> torch.Tensor:
        """What the output head is given for rows that are padded on the right."""
        return last_states(self.model, ids, self._kv)

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any) -> torch.Tensor:
        if self._kv is None:
            return torch.as_tensor(super()._model_generate(context, max_length, stop, **kwargs))
        cache = SinkCache(self.model.config, self._kv)
        ids, mask = put_in_front(context, kwargs.pop("attention_mask", None), self._kv.front)
        made = super()._model_generate(ids, max_length + len(self._kv.front), stop, past_key_values=cache,
                                       attention_mask=mask, **kwargs)
        return torch.cat([context, made[:, ids.shape[1]:]], dim=1)

    def get_model_info(self) -> dict[str, Any]:
        """Nothing: HFLM would ask the hub for the model's commit."""
        return {}


def tokens_made(settings: dict[str, Any]) -> int:
    """Tokens that a task generates at most, by its `generation_kwargs`."""
    return int(normalize_gen_kwargs(settings)["max_gen_toks"])


def require_positions(task: str | None, made: int, positions: int) -> None:
    """Raises RequestError where a task generates so many tokens that no room is left for a prompt."""
    if made >= positions:
        raise RequestError(f"the task {task!r} generates up to {made} tokens, and this model reads {positions}, the "
                           "prompt among them; leave it out of evaluate.tasks.")
