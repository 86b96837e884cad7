"""Decode attention over packed blocks as one Triton kernel, for one new token per row on an NVIDIA GPU.

Every program reads some blocks of one KV head and gives a partial output with its running maximum and sum, as
Flash-Decoding does (FlashAttention-2, 2307.08691, section 3.1, split over the columns); PyTorch joins the parts with
the window and the exact tokens. Scales of keys are folded into the query (KIVI 2402.02750, section 3.3). Triton comes
with CUDA builds of PyTorch; this module is imported only where a CUDA tensor is attended to.
"""

import torch
import triton
import triton.language as tl

from sinkquant.cache.layer import SinkLayer
from sinkquant.cache.scales import widened
from sinkquant.cache.store import Lane, PackedStates

PROGRAMS = 256
"""Programs that are aimed at, about two per multiprocessor of a large GPU."""
FEWEST_BLOCKS = 4
"""Blocks that a program reads at least."""
LEAST_DOT = 16
"""The smallest side of a matrix that Triton multiplies."""
TILE = 32
"""Tokens that a program holds at a time; every block is a multiple of them. More would not fit into the shared memory
of small GPUs with heads of 256."""


def attend_one(layer: SinkLayer, query: torch.Tensor, mask: torch.Tensor | None, scale: float,
               softcap: float | None = None, learned: torch.Tensor | None = None) -> torch.Tensor:
    """What `attention.attend` gives for one new token per row. See there for the arguments.

    Args:
        query: [batch, heads, 1, key_dim]; `attention.kernel_reads` says yes to it.

    Returns:
        [batch, 1, heads, value_dim] in the query's dtype.
    """
    batch, heads = query.shape[:2]
    kv_heads = layer.keys.shape[1]
    q = query.float().reshape(batch, kv_heads, heads // kv_heads, -1) * scale
    front_keys, front_values = layer.front()
    front, length = front_keys.shape[2], layer.packed_length
    bias = _bias(mask, batch, front + length + layer.keys.shape[2], query.device)

    # Exact tokens in packed blocks: their slots are read instead, under the mask of their columns.
    places = layer.exact_columns.long() - layer.dropped
    inside = ((layer.exact_columns >= 0) & (places >= 0) & (places < length))[:, None].expand(-1, bias.shape[1], -1)
    places = places[:, None].expand_as(inside)
    exact = bias.gather(2, (front + places).clamp(0, bias.shape[2] - 1)).masked_fill(~inside, -torch.inf)
    # One column more than there are takes the slots that lie elsewhere.
    packed = torch.nn.functional.pad(bias[:, :, front:front + length], (0, 1))
    packed = packed.scatter(2, torch.where(inside, places, length), -torch.inf)[:, :, :length]
    whole = layer.packed_keys.blocks * layer.plan.group_size
    if length < whole:
        packed = packed.new_full((*packed.shape[:2], whole), -torch.inf).index_copy(2, layer.valid_places(), packed)
    parts, tops, sums = _read(layer.packed_keys, layer.packed_values, q, packed, softcap, query.dtype)

    keys = torch.cat([front_keys, layer.exact_keys, layer.keys], dim=2).float()
    values = torch.cat([front_values, layer.exact_values, layer.values], dim=2).float()
    scores = q @ keys.mT
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    beside = torch.cat([bias[:, :, :front], exact, bias[:, :, front + length:]], dim=2)
    scores += beside[:, :, None] if beside.shape[1] == 1 else beside.view_as(scores)
    # A query of padding may see nothing at all: it gets zeros, not NaN.
    top = torch.maximum(scores.amax(-1), tops.amax(-1)).clamp(min=torch.finfo(torch.float32).min)
    logits = None if learned is None else learned.float().view(1, kv_heads, -1)
    top = top if logits is None else torch.maximum(top, logits)
    weights, shares = torch.exp(scores - top[..., None]), torch.exp(tops - top[..., None])
    total = weights.sum(-1) + (shares * sums).sum(-1)
    total = total if logits is None else total + torch.exp(logits - top)
    out = (shares[..., None] * parts).sum(3)
    back = layer.packed_values.recoding.rotation
    out = out if back is None else back.back(out)
    out = (out + weights @ values) / total.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    return out.view(batch, heads, 1, -1).transpose(1, 2).to(query.dtype)


def _bias(mask: torch.Tensor | None, batch: int, columns: int, device: torch.device) -> torch.Tensor:
    """What is added to scores, float32 [batch, 1 or heads, columns]."""
    if mask is None:
        return torch.zeros(batch, 1, columns, device=device)
    part = mask[:, :, 0, :columns]
    if part.dtype == torch.bool:
        part = torch.zeros(part.shape, device=device).masked_fill(~part, -torch.inf)
    return part.float().expand(batch, -1, -1)


def _read(keys: PackedStates, values: PackedStates, q: torch.Tensor, bias: torch.Tensor, softcap: float | None,
          dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention of q float32 [batch, kv_heads, rows, key_dim] over all packed blocks, in parts.

    Args:
        bias: float32 [batch, 1 or kv_heads * rows, blocks * G].
        dtype: the model's; it says how precise products have to be.

    Returns:
        float32 [batch, kv_heads, rows, parts, value_dim] outputs, not divided by their sums; [batch, kv_heads, rows,
        parts] maxima of the scores, -inf where all is masked; and sums of exp(score - maximum).
    """
    batch, kv_heads, rows, key_width = q.shape
    key, value = keys.lanes[0], values.lanes[0]
    assert key.data is not None
    assert value.data is not None
    assert values.group is not None
    key_scale, key_zero, value_scale, value_zero = *_scales(key), *_scales(value)
    q = q if keys.recoding.rotation is None else keys.recoding.rotation.query(q)
    value_width, blocks = value.data.shape[4], keys.blocks
    per_program = max(FEWEST_BLOCKS, triton.cdiv(blocks * batch * kv_heads, PROGRAMS))
    splits = triton.cdiv(blocks, per_program)
    out = q.new_empty(batch, kv_heads, rows, splits, value_width)
    tops, sums = q.new_empty(batch, kv_heads, rows, splits), q.new_empty(batch, kv_heads, rows, splits)
    bias = bias.contiguous()
    with torch.cuda.device_of(q):
        _kernel[(batch * kv_heads, splits)](
            q.contiguous(), key.data.contiguous(), key_scale, key_zero,
            value.data.contiguous(), value_scale, value_zero,
            bias, out, tops, sums, blocks, per_program, kv_heads, 0.0 if softcap is None else softcap,
            ROWS=rows, ROWS_PAD=_padded(rows), KEY_WIDTH=key_width, KEY_PAD=_padded(key_width),
            VALUE_WIDTH=value_width, VALUE_PAD=_padded(value_width), SIZE=keys.block, AT_ONCE=TILE, GROUP=values.group,
            KEY_BITS=key.bits, VALUE_BITS=value.bits, KEY_ZERO=key.zero is not None, VALUE_ZERO=value.zero is not None,
            BIAS_HEADS=bias.shape[1], CAPPED=softcap is not None,
            # Codes are exact in TF32; what else it rounds, it rounds finer than bfloat16 and as fine as float16.
            PRECISION="ieee" if dtype == torch.float32 else "tf32", enable_fp_fusion=True)
    return out, tops, sums


def _scales(lane: Lane) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros as the kernel reads them, the scales in place of zeros where there are none: float16 as they
    are held, and those of 8 bits in float32."""
    assert lane.scale is not None
    scale, zero = (lane.scale, lane.zero) if lane.ends is None else widened(lane.scale, lane.zero, lane.ends)
    return scale.contiguous(), (scale if zero is None else zero).contiguous()


def _padded(width: int) -> int:
    return max(LEAST_DOT, triton.next_power_of_2(width))


@triton.jit
def _codes(data, token, channel, inside, SIZE: tl.constexpr, WIDTH: tl.constexpr,  # type: ignore[no-untyped-def]
           BITS: tl.constexpr):
    """Codes of a block in float32 at tokens and channels that broadcast, as `packing.pack` lays them out."""
    LOW: tl.constexpr = 2 if BITS == 3 else BITS
    run: tl.constexpr = SIZE * LOW // 8
    codes = tl.load(data + (token % run) * WIDTH + channel, mask=inside, other=0).to(tl.int32)
    codes = (codes >> (token // run * LOW)) & ((1 << LOW) - 1)
    if BITS == 3:
        bit_run: tl.constexpr = SIZE // 8
        bit = tl.load(data + (run + token % bit_run) * WIDTH + channel, mask=inside, other=0).to(tl.int32)
        codes = codes | (((bit >> (token // bit_run)) & 1) << 2)
    return codes.to(tl.float32)


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
        q, key_data, key_scale, key_zero, value_data, value_scale, value_zero, bias, out, tops, sums,
        blocks, per_program, kv_heads, softcap,
        ROWS: tl.constexpr, ROWS_PAD: tl.constexpr, KEY_WIDTH: tl.constexpr, KEY_PAD: tl.constexpr,
        VALUE_WIDTH: tl.constexpr, VALUE_PAD: tl.constexpr, SIZE: tl.constexpr, AT_ONCE: tl.constexpr,
        GROUP: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, KEY_ZERO: tl.constexpr,
        VALUE_ZERO: tl.constexpr, BIAS_HEADS: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr):
    head = tl.program_id(0).to(tl.int64)  # of all rows of the batch
    split = tl.program_id(1)
    row = tl.arange(0, ROWS_PAD)
    key_channel = tl.arange(0, KEY_PAD)
    value_channel = tl.arange(0, VALUE_PAD)
    queries = tl.load(q + (head * ROWS + row)[:, None] * KEY_WIDTH + key_channel[None, :],
                      mask=(row < ROWS)[:, None] & (key_channel < KEY_WIDTH)[None, :], other=0.0)
    bias_head = (head // kv_heads) * BIAS_HEADS + (row * 0 if BIAS_HEADS == 1 else head % kv_heads * ROWS + row)
    groups: tl.constexpr = VALUE_WIDTH // GROUP
    top = tl.full([ROWS_PAD], float("-inf"), tl.float32)
    total = tl.zeros([ROWS_PAD], tl.float32)
    part = tl.zeros([ROWS_PAD, VALUE_PAD], tl.float32)
    tiles: tl.constexpr = SIZE // AT_ONCE
    first = split * per_program
    for index in range(first * tiles, tl.minimum(first + per_program, blocks) * tiles):
        block = head * blocks + index // tiles
        token = index % tiles * AT_ONCE + tl.arange(0, AT_ONCE)

        scale = tl.load(key_scale + block * KEY_WIDTH + key_channel, mask=key_channel < KEY_WIDTH,
                        other=0.0).to(tl.float32)
        if KEY_ZERO:
            zero = tl.load(key_zero + block * KEY_WIDTH + key_channel, mask=key_channel < KEY_WIDTH,
                           other=0.0).to(tl.float32)
        else:
            zero = -0.5 * ((1 << KEY_BITS) - 1) * scale
        codes = _codes(key_data + block * (SIZE * KEY_BITS // 8 * KEY_WIDTH), token[None, :], key_channel[:, None],
                       (key_channel < KEY_WIDTH)[:, None], SIZE, KEY_WIDTH, KEY_BITS)
        scores = tl.dot(queries * scale[None, :], codes, input_precision=PRECISION)
        scores += tl.sum(queries * zero[None, :], axis=1)[:, None]
        if CAPPED:
            scores = (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0) * softcap
        scores += tl.load(bias + bias_head[:, None] * (blocks * SIZE) + (index // tiles * SIZE + token)[None, :],
                          mask=(row < ROWS)[:, None], other=0.0)

        here = tl.maximum(top, tl.max(scores, axis=1))
        # Where all was masked so far, any finite number does.
        shift = tl.where(here == float("-inf"), 0.0, here)
        weights = tl.exp(scores - shift[:, None])
        shrink = tl.exp(top - shift)
        total = total * shrink + tl.sum(weights, axis=1)
        top = here

        grid = (block * SIZE + token)[:, None] * groups + (value_channel // GROUP)[None, :]
        inside = (value_channel < VALUE_WIDTH)[None, :]
        steps = tl.load(value_scale + grid, mask=inside, other=0.0).to(tl.float32)
        if VALUE_ZERO:
            starts = tl.load(value_zero + grid, mask=inside, other=0.0).to(tl.float32)
        else:
            starts = -0.5 * ((1 << VALUE_BITS) - 1) * steps
        codes = _codes(value_data + block * (SIZE * VALUE_BITS // 8 * VALUE_WIDTH), token[:, None],
                       value_channel[None, :], inside, SIZE, VALUE_WIDTH, VALUE_BITS)
        part = part * shrink[:, None] + tl.dot(weights, codes * steps + starts, input_precision=PRECISION)

    place = (head * ROWS + row) * tl.num_programs(1) + split
    tl.store(tops + place, top, mask=row < ROWS)
    tl.store(sums + place, total, mask=row < ROWS)
    tl.store(out + place[:, None] * VALUE_WIDTH + value_channel[None, :], part,
             mask=(row < ROWS)[:, None] & (value_channel < VALUE_WIDTH)[None, :])
