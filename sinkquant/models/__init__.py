"""What a decoder is, and how its blocks, its attention and its text are looked at."""

from typing import TYPE_CHECKING

from sinkquant.lazy import make_lazy

if TYPE_CHECKING:
    from sinkquant.models.activations import ActivationStore
    from sinkquant.models.attention import AttentionObserver, AttentionRecord, AttentionRows, observed_attention
    from sinkquant.models.corpus import documents, read_text
    from sinkquant.models.decoder import Decoder, as_stored, max_length, require_dense, vocabulary_of, weight_matrix
    from sinkquant.models.experts import cast_experts
    from sinkquant.models.folder import resolve
    from sinkquant.models.loading import cast_model, check_finite, load_model, load_tokenizer, pick_device
    from sinkquant.models.smaller import head_columns
    from sinkquant.models.source import open_model, source_of
    from sinkquant.models.tensors import pieces
    from sinkquant.models.text import BosPolicy, adds_bos, encode, starts_with_bos, token_rows, tokenization_facts
    from sinkquant.models.walk import Step, Walk, answer, together

make_lazy(__name__)
