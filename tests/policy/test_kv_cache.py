"""The KV section of a plan: what fits, what is kept, what it weighs, and its control."""

from __future__ import annotations

import pytest
from families import FAMILIES, tiny_model

from sinkquant.artifacts import KVCachePlan, KVLayerShape, ModelShape, SinkMap
from sinkquant.artifacts.kv import cache_bytes, packed_tokens
from sinkquant.errors import RequestError
from sinkquant.models import Decoder
from sinkquant.policy import kv_cache
from sinkquant.policy.kv_cache import accept_kv, make_kv_control, make_kv_plan
from sinkquant.recipe import Recipe


def _shape(layers: list[KVLayerShape]) -> ModelShape:
    return ModelShape(name="m", architecture="M", blocks=len(layers), dtype="bfloat16", linears={}, tensors={},
                      kv_layers=layers)


WIDE = [KVLayerShape(heads=8, key_dim=128, value_dim=128)] * 2


def _map(tokens: list[dict[str, object]] | None = None, channels: list[dict[str, object]] | None = None) -> SinkMap:
    known = {"token_id": 1, "text": "<s>", "position": 0, "kind": "bos", "attention": 0.6, "heads": 0.9, "share": 0.01,
             "massive": True}
    return SinkMap.model_validate({
        "schema": "sinkquant/sinkmap@1", "sink_rate": {}, "sink_rate_repeated_token": {}, "thresholds": {},
        "model": {"name": "m", "architecture": "M", "layers": 2, "heads": 8, "kv_heads": 8, "hidden_size": 64,
                  "parameters": 1, "dtype": "bfloat16"},
        "tokenization": {"bos_token_id": 1, "adds_bos": "once", "rows_start_with_bos": True, "rows": 1, "length": 64},
        "tokens": [known | token for token in ([{}] if tokens is None else tokens)], "heads": [], "super_weights": [],
        "channels": channels or [], "modules": {},
        "depth": ["embedding", "layers.0.attention", "layers.0.mlp", "layers.1.attention", "layers.1.mlp"]})


def _made(*assignments: str, sink_map: SinkMap | None = None, layers: list[KVLayerShape] | None = None) -> KVCachePlan:
    recipe = Recipe().replace(["kv_cache.key_bits=2", *assignments])
    made = make_kv_plan(_shape(layers or WIDE), sink_map or _map(), recipe)
    assert made is not None
    return made


def test_without_the_section_there_is_no_plan() -> None:
    assert make_kv_plan(_shape(WIDE), _map(), Recipe.parse({"kv_cache": None})) is None
    assert make_kv_control(None) is None


def test_two_bits_weigh_less_than_a_fifth() -> None:
    plan = _made("kv_cache.length=16384")
    assert plan.bytes / plan.unquantized_bytes < 0.20
    # The formula of the literature: window and exact tokens in 16 bits, else 2 bits + scale and zero of 8 bits per 32,
    # and their own ends in float16 per block of 32 tokens and head of 128 channels.
    packed = packed_tokens(16384, 128, 32)
    bits = (packed * (2 + 16 / 32 + 32 / (32 * 128)) + (16384 - packed + 1) * 16) / 16384
    assert plan.bits_per_value == pytest.approx(bits, abs=16 * 16 / 16384)
    assert cache_bytes(plan, 16384, 1) == bits / 8 * 16384 * 2 * 8 * 256 + 2 * 4 + 4


def test_what_is_kept_is_said() -> None:
    tokens: list[dict[str, object]] = [{}, {"token_id": 4, "text": ".", "position": None, "kind": "delimiter"},
                                       {"token_id": None, "text": None, "position": None, "kind": "learned"}]
    plan = _made(sink_map=_map(tokens))
    assert [(sink.token_id, sink.position) for sink in plan.sinks] == [(None, 0), (4, None)]
    assert "'<s>' at 0" in plan.reason
    assert plan.expected_exact == min(16, 1 + 41)  # the delimiter makes up 1 % of 4096 tokens
    assert "no sink" in _made(sink_map=_map([])).reason
    anything = _made(sink_map=_map([{"token_id": None, "text": None, "kind": "first_position"}])).reason
    assert "position 0, whatever stands there" in anything
    assert "None" not in anything


def test_sliding_windows_keep_sinks_where_the_recipe_says_so() -> None:
    layers = [KVLayerShape(heads=8, key_dim=128, value_dim=128, sliding_window=window) for window in (1024, 128)] + WIDE
    plain, plan = _made(layers=layers), _made("kv_cache.sliding_sinks=true", layers=layers)
    assert not plain.sliding_sinks
    assert "changes" not in plain.in_words()
    assert [layer.packed for layer in plain.layers] == [True, False, True, True]
    assert "changes what the model computes: 2 layers" in plan.in_words()
    # Nothing of a short window can be packed, but only our own layer keeps its sinks.
    assert [layer.key_bits[0] for layer in plan.layers if layer.packed] == [2, 16, 2, 2]
    assert ["beyond" in layer.reason for layer in plan.layers] == [True, True, False, False]
    control = make_kv_control(plan)
    assert control is not None
    assert not control.sliding_sinks
    assert 0 <= control.bytes - plan.bytes < 0.005 * plan.bytes
    assert accept_kv(plan, _shape(layers)) == plan
    with pytest.raises(RequestError, match="layer 1"):
        accept_kv(plain.model_copy(update={"sliding_sinks": True}), _shape(layers))


def test_sliding_sinks_that_would_do_nothing_are_refused() -> None:
    sliding = [KVLayerShape(heads=8, key_dim=128, value_dim=128, sliding_window=1024)]
    with pytest.raises(RequestError, match="no layer of M has a sliding window"):
        _made("kv_cache.sliding_sinks=true")
    for exact, message in (("none", "keeps none"), ("massive", "known before a pass")):
        channels: list[dict[str, object]] = [{"channel": 3, "peak": 90.0, "ratio": 100.0, "born": "layers.0.mlp",
                                              "ended": None, "tokens": ["<s>"], "profile": [1.0, 1.0, 9.0, 9.0, 9.0]}]
        with pytest.raises(RequestError, match=message):
            _made("kv_cache.sliding_sinks=true", f"kv_cache.exact={exact}", layers=sliding,
                  sink_map=_map(channels=channels))


@pytest.mark.parametrize("evict", ["null", "512"])
@pytest.mark.parametrize("exact", ["first-n", "detected"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_control_has_the_same_bytes(bits: int, exact: str, evict: str) -> None:
    plan = _made(f"kv_cache.key_bits={bits}", f"kv_cache.value_bits={bits}", f"kv_cache.exact={exact}",
                 f"kv_cache.evict={evict}")
    control = make_kv_control(plan)
    assert control is not None
    assert control.exact == "none"
    assert control.sinks == []
    assert (control.key_bits, control.layers) == (plan.key_bits, plan.layers)
    assert 0 <= control.bytes - plan.bytes < 0.005 * plan.bytes
    for kept, exact in ((plan, plan.expected_exact), (control, 0)):
        lengths = range(kept.length - kept.group_size + 1, kept.length + 1)
        assert kept.bytes == pytest.approx(sum(cache_bytes(kept, n, exact) for n in lengths) / len(lengths), abs=1)


def test_the_control_of_a_long_cache_is_found_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = [_made("kv_cache.length=131072", f"kv_cache.key_bits={bits}", f"kv_cache.value_bits={bits}")
             for bits in (2, 16)]
    weighed: list[int] = []
    own = kv_cache._mean_bytes

    def counted(plan: KVCachePlan, exact: int) -> int:
        weighed.append(plan.window)
        return own(plan, exact)

    monkeypatch.setattr(kv_cache, "_mean_bytes", counted)
    packed, dense = map(make_kv_control, plans)
    assert packed is not None
    assert dense is not None
    assert packed.window > plans[0].window
    assert len(weighed) < 30
    assert dense.window == plans[1].window
    assert "every token" in dense.reason


def test_edited_plans_that_generation_cannot_read_are_refused() -> None:
    sliding = [KVLayerShape(heads=2, key_dim=64, value_dim=64, sliding_window=512)] * 2 + WIDE
    shape, plan = _shape(sliding), _made(layers=sliding)
    assert accept_kv(plan, shape) == plan
    with pytest.raises(RequestError, match="groups of 8; set its group_size to 32, 64 or 128"):
        accept_kv(plan.model_copy(update={"group_size": 8}), shape)
    for index, evict, words in ((1, None, "layers with a sliding window"), (2, 128, "layers without a sliding window")):
        layers = list(plan.layers)
        layers[index] = layers[index].model_copy(update={"packed": False})
        with pytest.raises(RequestError, match=words):
            accept_kv(plan.model_copy(update={"layers": layers, "evict": evict}), shape)
    accept_kv(plan.model_copy(update={"layers": [*plan.layers[:3], layers[2]]}), shape)


def test_an_edited_section_says_one_thing() -> None:
    shape, plan = _shape(WIDE), _made()
    for change, words in (({"key_bits": 4, "window": 192}, "says key_bits 4, and most heads of its layers have 2"),
                          ({"exact": "massive"}, "names no channel"), ({"exact": "first-n"}, "first_n is 0")):
        with pytest.raises(RequestError, match=words):
            accept_kv(plan.model_copy(update=change), shape)
    for change in ({"exact": "none", "sinks": [], "max_exact": 0}, {"sinks": []}):
        kept = accept_kv(plan.model_copy(update=change), shape)
        assert kept is not None
        assert kept.expected_exact == 0
        assert kept.bytes < plan.bytes
        assert "stay exact" not in kept.reason
    raised = [layer.model_copy(update={"key_bits": [4] * len(layer.key_bits)}) for layer in plan.layers]
    with pytest.raises(RequestError, match="says key_bits 2, and most heads of its layers have 4"):
        accept_kv(plan.model_copy(update={"layers": raised}), shape)
    edited = accept_kv(plan.model_copy(update={"layers": raised, "key_bits": 4}), shape)
    assert edited is not None
    assert (edited.key_bits, edited.value_bits) == (4, 2)
    assert edited.bytes > plan.bytes
    for before in (plan, _made("kv_cache.exact=none"), _made(sink_map=_map([]))):
        first = accept_kv(before.model_copy(update={"exact": "first-n", "first_n": 5, "max_exact": 16}), shape)
        assert first is not None
        assert (first.expected_exact, first.reason) == (5, "the first 5 tokens stay exact")
    for own in (plan, make_kv_control(plan), _made("kv_cache.exact=first-n"), _made(sink_map=_map([])),
                _made("kv_cache.overrides=[{layers: [0, 1], key_bits: 8}]")):
        assert accept_kv(own, shape) == own


def test_bits_per_layer_and_head() -> None:
    plan = _made("kv_cache.overrides=[{layers: [1], heads: [0, 3], key_bits: 8}, {layers: [0], value_bits: 16}]")
    assert plan.layers[1].key_bits == [8, 2, 2, 8, 2, 2, 2, 2]
    assert plan.layers[1].value_bits == [2] * 8
    assert plan.layers[0].value_bits == [16] * 8
    assert "overrides[1]" in plan.layers[0].reason
    assert (plan.key_bits, plan.value_bits) == (2, 2)
    assert "keys in 8 and values in 2 bits" in _made("kv_cache.overrides=[{layers: [0, 1], key_bits: 8}]").in_words()


def test_the_group_fits_by_itself() -> None:
    assert _made().group_size == 32
    assert _made(layers=[KVLayerShape(heads=2, key_dim=80, value_dim=80)]).group_size == 128


def test_long_sliding_windows_are_packed_and_short_ones_left() -> None:
    layers = [KVLayerShape(heads=2, key_dim=64, value_dim=64, sliding_window=window) for window in (4096, 64, None)]
    plan = _made(layers=layers)
    assert [layer.packed for layer in plan.layers] == [True, False, True]
    assert plan.layers[0].sliding_window == 4096
    alone = _made(layers=layers[1:2])
    assert not any(layer.packed for layer in alone.layers)
    assert (alone.bits_per_value, alone.bytes) == (16.0, 4)
    assert "nothing is packed" in alone.reason
    assert make_kv_control(alone) is not None


def test_massive_carriers_come_from_the_birth_layer() -> None:
    channels = [{"channel": 7, "peak": 40.0, "ratio": 900.0, "born": "layers.0.mlp", "ended": None, "tokens": ["<s>"],
                 "profile": [0.1, 0.1, 30.0, 31.0, 40.0]},
                {"channel": 9, "peak": 50.0, "ratio": 100.0, "born": "layers.1.mlp", "ended": None, "tokens": ["<s>"],
                 "profile": [0.1, 0.1, 1.0, 1.0, 50.0]}]
    plan = _made("kv_cache.exact=massive", sink_map=_map(channels=channels))
    assert plan.massive is not None
    assert (plan.massive.layer, plan.massive.channels, plan.massive.thresholds) == (0, [7], [15.0])


@pytest.mark.parametrize(("assignments", "layers", "message"), [
    (["kv_cache.exact=massive"], WIDE, "no massive channel"),
    (["kv_cache.group_size=64"], [KVLayerShape(heads=2, key_dim=80, value_dim=80)], "use 128"),
    (["kv_cache.rotate=true"], [KVLayerShape(heads=2, key_dim=96, value_dim=96)], "power of two"),
    (["kv_cache.rounding=descent", "kv_cache.rotate=hadamard"], [KVLayerShape(heads=2, key_dim=64, value_dim=64)],
     "queries of the calibration text"),
    (["kv_cache.overrides=[{layers: [5], key_bits: 8}]"], WIDE, "layer 5"),
    (["kv_cache.overrides=[{layers: [0], heads: [8], key_bits: 8}]"], WIDE, "has 8"),
    ([], [KVLayerShape(heads=0, key_dim=1, value_dim=1)], "no layer"),
    ([], [KVLayerShape(heads=1, key_dim=144, value_dim=144)], "no group"),
])
def test_what_does_not_fit_is_refused(assignments: list[str], layers: list[KVLayerShape], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        _made(*assignments, layers=layers)


@pytest.mark.parametrize(("assignment", "message"), [
    ("kv_cache.key_bits=5", "key_bits"), ("kv_cache.group_size=48", "group_size"), ("kv_cache.window=-1", "window"),
    ("kv_cache.exact=first", "exact"), ("kv_cache.keybits=2", "did you mean 'key_bits'"),
    ("kv_cache.overrides=[{layers: [0], key_bit: 2}]", "did you mean 'key_bits'")])
def test_the_recipe_refuses(assignment: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Recipe().replace([assignment])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_tells_its_layers(family: str) -> None:
    layers = Decoder.of(tiny_model(family)).shape("m").kv_layers
    assert len(layers) == 3
    windows = [layer.sliding_window for layer in layers]
    assert any(windows) == (family in ("mistral", "gemma2", "gemma3_text", "gpt_oss"))
    assert all(layer.heads in (2, 4) and layer.key_dim == 16 for layer in layers)


def _outliers(*ids: int) -> SinkMap:
    found = {"token_ids": list(ids), "texts": [f"t{token}" for token in ids], "count": len(ids), "largest_ratio": 90.0,
             "layers": 2}
    return SinkMap.model_validate(_map().model_dump(by_alias=True) | {"outlier_prefix": found})


def test_a_found_prefix_stands_in_front_but_for_its_bos() -> None:
    plan = _made("kv_cache.prefix=found", "kv_cache.exact=none", sink_map=_outliers(4, 7, 1))
    assert (plan.prefix, plan.front, plan.expected_exact) == ([4, 7, 1], [4, 7], 3)
    assert "put in front of every row" in plan.reason
    control = make_kv_control(plan)
    assert control is not None
    assert (control.prefix, control.front) == ([], [])
    alone = _made("kv_cache.prefix=found", sink_map=_outliers(1))
    assert (alone.prefix, alone.front) == ([1], [])
    assert "alone" in alone.reason
    shape = _shape(WIDE)
    assert accept_kv(plan, shape) == plan
    with pytest.raises(RequestError, match="front"):
        accept_kv(plan.model_copy(update={"front": [7]}), shape)


def test_nothing_found_is_refused() -> None:
    with pytest.raises(RequestError, match="no outlier token was found"):
        _made("kv_cache.prefix=found", sink_map=_outliers())
    with pytest.raises(RequestError, match="not looked for"):
        _made("kv_cache.prefix=found")


def test_reasons_name_no_more_tokens_than_are_kept() -> None:
    first = _made("kv_cache.exact=first-n", "kv_cache.first_n=32")
    assert (first.expected_exact, first.reason) == (16, "the first 16 tokens stay exact")
    assert _made("kv_cache.max_exact=1").reason.endswith(", at most 1 in a row")
    assert "at most" not in _made().reason
