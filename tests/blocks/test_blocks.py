"""Whole blocks: those that cost least go, what makes massive activations stays, plain transformers loads the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import FAMILIES, tiny_mixture, tiny_model
from planter import Plant, plant
from safetensors.torch import load_file
from sinkmaps import sink_map_of
from small_runs import model_folder
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sinkquant import Recipe, detect, plan, quantize
from sinkquant.artifacts import Channel, SinkMap
from sinkquant.artifacts.sizes import checkpoint_bytes
from sinkquant.blocks import choose_blocks, cut_blocks, drop_blocks, require_droppable
from sinkquant.errors import RequestError
from sinkquant.explain.settings import rebuilt
from sinkquant.formats import save
from sinkquant.models import Decoder, load_model, open_model
from sinkquant.models.shorter import shorter_config, shorter_model
from sinkquant.models.smaller import smaller_model

KEPT = [0, 2]
ROW = torch.arange(8, 60)[None]


def logits_without(model: PreTrainedModel, gone: int) -> torch.Tensor:
    """What a model predicts where one block hands on what it is given."""
    def handed_on(_: torch.nn.Module, args: tuple, named: dict, given: object) -> object:
        hidden = args[0] if args else named["hidden_states"]
        return (hidden, *given[1:]) if isinstance(given, tuple) else hidden

    handle = Decoder.of(model).blocks[gone].register_forward_hook(handed_on, with_kwargs=True)
    try:
        with torch.no_grad():
            return model(ROW, use_cache=False).logits
    finally:
        handle.remove()


def channel(born: str, ended: str | None, peak: float = 500.0) -> Channel:
    return Channel(channel=7, peak=peak, ratio=300.0, born=born, ended=ended, tokens=["<s>"])


@pytest.fixture
def recipe(text_file: Path) -> Recipe:
    return Recipe().replace([f"calibration.text={text_file}", "detect.rows=6", "detect.length=32",
                             "detect.long_rows=0", "detect.super_weights=false"])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shorter_checkpoint_computes_what_the_blocks_that_stay_leave(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    expected = logits_without(model, 1)
    cut_blocks(model, tiny_tokenizer(), KEPT, tmp_path / "short")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "short").eval()
    text = loaded.config.get_text_config(decoder=True)
    whole = model.config.get_text_config(decoder=True)
    assert text.num_hidden_layers == 2
    if getattr(whole, "layer_types", None):
        assert text.layer_types == [whole.layer_types[index] for index in KEPT]
    with torch.no_grad():
        assert torch.allclose(loaded(ROW, use_cache=False).logits, expected, atol=1e-5)
        assert loaded.generate(ROW, max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (1, 54)
    drop_blocks(model, KEPT)
    with torch.no_grad():
        assert torch.allclose(model(ROW, use_cache=False).logits, expected, atol=1e-5)
        assert torch.allclose(model(ROW, use_cache=True).logits, expected, atol=1e-5)
    assert model.config.get_text_config(decoder=True).num_hidden_layers == 2


def test_a_first_layer_of_another_kind_is_carried(tmp_path: Path) -> None:
    model = tiny_mixture("deepseek_v3", num_hidden_layers=3)
    for kept, dense in (([0, 2], 1), ([1, 2], 0)):
        assert shorter_config(model.config, kept).first_k_dense_replace == dense
        folder = tmp_path / str(dense)
        cut_blocks(model, tiny_tokenizer(), kept, folder)
        expected = logits_without(model, ({0, 1, 2} - set(kept)).pop())
        with torch.no_grad():
            loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
            assert torch.allclose(loaded(ROW, use_cache=False).logits, expected, atol=1e-5)


def test_blocks_whose_kind_follows_from_their_number_are_refused(recipe: Recipe) -> None:
    """Every second block has experts, and no key lists which: without the first, the others would change places."""
    model = tiny_mixture("qwen3_moe", num_hidden_layers=4, decoder_sparse_step=2)
    with pytest.raises(RequestError, match=r"block|shape"):
        require_droppable(Decoder.of(model), recipe.changed(prune={"blocks": 1}))
    model = tiny_model("llama")
    model.config.num_kv_shared_layers = 1
    with pytest.raises(RequestError, match="shares keys and values or weights between blocks"):
        require_droppable(Decoder.of(model), recipe.changed(prune={"blocks": 1}))
    model = tiny_model("llama")
    model.model.layers[2].mlp = model.model.layers[1].mlp
    with pytest.raises(RequestError, match="layers 1 and 2 share the weight"):
        require_droppable(Decoder.of(model), recipe.changed(prune={"blocks": 1}))


KINDS = {
    "qwen3_next": {"layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2,
                   "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16,
                   "linear_value_head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
                   "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention"] * 2},
    "bamba": {"attn_layer_indices": [2, 5], "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16,
              "mamba_n_groups": 1},
    "smollm3": {"no_rope_layers": [1, 1, 0, 1, 1, 0]},
    "cohere2": {"sliding_window": 16, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2}}
"""Models of six blocks that differ in kind, each third of another one than the rest."""


def of_kinds(family: str, **more: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **FAMILIES["qwen3"] | {"num_hidden_layers": 6} | more)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", KINDS)
def test_blocks_of_several_kinds_keep_theirs(family: str, tmp_path: Path) -> None:
    model = of_kinds(family, **KINDS[family])
    for gone in (1, 2):
        expected = logits_without(model, gone)
        cut_blocks(model, tiny_tokenizer(), [index for index in range(6) if index != gone], tmp_path / str(gone))
        with torch.no_grad():
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path / str(gone)).eval()
            assert torch.allclose(loaded(ROW, use_cache=False).logits, expected, atol=1e-5)


def test_the_last_block_with_attention_stays(recipe: Recipe) -> None:
    model = of_kinds("lfm2", **KINDS["lfm2"])
    for index in (2, 5):  # nothing costs less than they do
        model.model.layers[index].self_attn.out_proj.weight.data.zero_()
        model.model.layers[index].feed_forward.w2.weight.data *= 1e-3
    for score in ("divergence", "influence"):
        found = choose_blocks(model, tiny_tokenizer(), sink_map_of(Decoder.of(model)),
                              recipe.changed(prune={"blocks": 5, "block_score": score}))
        assert found.dropped[0].block in (2, 5)
        assert len({2, 5} & set(found.kept)) == 1


GEMMA3N = {"sliding_window": 16, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 128,
           "intermediate_size": [128] * 6, "activation_sparsity_pattern": [0.0] * 6, "laurel_rank": 8,
           "altup_num_inputs": 2, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2}


@pytest.mark.parametrize(("family", "settings", "message"), [
    ("gemma3n_text", GEMMA3N | {"num_kv_shared_layers": 2}, r"between blocks \(num_kv_shared_layers is 2\)"),
    ("gemma3n_text", GEMMA3N | {"num_kv_shared_layers": 0}, r"holds model\.embed_tokens_per_layer\.weight in another"),
    ("jamba", {"attn_layer_period": 3, "attn_layer_offset": 1, "num_experts": 2, "use_mamba_kernels": False},
     r"holds model\.layers\.1\.mamba\.A_log in another shape"),
    ("minimax", {"layer_types": ["linear_attention", "full_attention"] * 3, "num_local_experts": 2, "block_size": 16},
     "the blocks of MiniMaxForCausalLM differ in kind")])
def test_blocks_that_hang_together_are_refused(family: str, settings: dict[str, object], message: str,
                                               recipe: Recipe) -> None:
    with pytest.raises(RequestError, match=message):
        require_droppable(Decoder.of(of_kinds(family, **settings)), recipe.changed(prune={"blocks": 1}))


@pytest.fixture(scope="module")
def uneven() -> PreTrainedModel:
    """Of six blocks, the second and the fifth add next to nothing; the fifth less than the second."""
    model = tiny_model("llama", num_hidden_layers=6)
    with torch.no_grad():
        for index, factor in ((1, 1e-2), (4, 1e-3)):
            block = model.model.layers[index]
            block.self_attn.o_proj.weight *= factor
            block.mlp.down_proj.weight *= factor
    return model


@pytest.mark.parametrize("score", ["divergence", "influence"])
def test_blocks_that_do_least_go_first_and_their_cost_is_that_of_the_shorter_model(
        score: str, uneven: PreTrainedModel, recipe: Recipe, tmp_path: Path) -> None:
    recipe = recipe.changed(prune={"blocks": 0.4, "block_score": score})
    found = choose_blocks(uneven, tiny_tokenizer(), sink_map_of(Decoder.of(uneven)), recipe)
    assert [one.block for one in found.dropped] == [4, 1]
    assert found.kept == [0, 2, 3, 5]
    assert 0 < found.dropped[0].divergence < found.dropped[1].divergence
    assert all(0 <= one.sink_share <= 1 for one in found.dropped)
    assert [cost.block for cost in sorted(found.costs, key=lambda cost: cost.influence)][:2] == [4, 1]
    assert all((cost.divergence is None) == (score == "influence") for cost in found.costs)
    with torch.no_grad():
        whole = torch.log_softmax(uneven(ROW, use_cache=False).logits.double(), -1)
        less = torch.log_softmax(logits_without(uneven, 4).double(), -1)
    scale = float((whole.exp() * (whole - less)).sum(-1).mean())
    assert found.dropped[0].divergence == pytest.approx(scale, rel=0.5)  # other rows, the same size
    source = model_folder(tmp_path / "source", num_hidden_layers=6)
    uneven.save_pretrained(source)
    again = choose_blocks(open_model(source), tiny_tokenizer(), sink_map_of(Decoder.of(uneven)), recipe)
    assert again == found  # from disk as from memory


def test_the_second_block_to_go_is_measured_beside_the_first(recipe: Recipe) -> None:
    model = tiny_model("llama", num_hidden_layers=5, seed=3)
    found = choose_blocks(model, tiny_tokenizer(), sink_map_of(Decoder.of(model)),
                          recipe.changed(prune={"blocks": 3}))
    alone = {cost.block: cost.divergence for cost in found.costs}
    assert found.dropped[0].divergence == alone[found.dropped[0].block] == min(alone.values())  # type: ignore[type-var]
    drop_blocks(model, found.kept)
    assert len(model.model.layers) == 2
    assert found.dropped[2].divergence > found.dropped[0].divergence


def test_what_makes_massive_activations_stays_unless_told_and_measured(uneven: PreTrainedModel,
                                                                       recipe: Recipe) -> None:
    sink_map = sink_map_of(Decoder.of(uneven), channels=(channel("layers.1.mlp", "layers.4.mlp"),))

    def chosen(**prune: object) -> list[int]:
        return [one.block for one in choose_blocks(uneven, tiny_tokenizer(), sink_map,
                                                   recipe.changed(prune=prune)).dropped]

    found = choose_blocks(uneven, tiny_tokenizer(), sink_map, recipe.changed(prune={"blocks": 1}))
    assert (found.emergence, found.end) == (1, 4)
    assert not {1, 4} & set(chosen(blocks=2))
    assert found.costs[4].massive == "end"
    assert found.costs[4].divergence is not None
    assert chosen(blocks=2, massive=True) == [4, 1]
    assert not {1, 4} & set(chosen(blocks=2, massive=True, block_score="influence"))
    with pytest.raises(RequestError, match=r"drops 5 of 6 blocks, but block 1 .*emerge.* and block 4 .*end.* stay; "
                                           r"drop at most 4, or set prune\.massive=true"):
        chosen(blocks=5)


def test_a_planted_sinks_block_is_the_one_that_stays(recipe: Recipe) -> None:
    model = plant(tiny_model("llama", num_hidden_layers=5), Plant(token_id=1, position=0, heads=frozenset({0, 1, 2, 3}),
                                                                  channel=7, birth=2))
    recipe = recipe.changed(detect={"length": 64, "rows": 20})
    sink_map: SinkMap = detect(model, tiny_tokenizer(), recipe=recipe)
    found = choose_blocks(model, tiny_tokenizer(), sink_map, recipe.changed(prune={"blocks": 3}))
    assert found.emergence == 2
    assert 2 in found.kept


@pytest.mark.parametrize(("asked", "message"), [
    (3, "leaves none of the model's 3 blocks; drop at most 2"), (9, "leaves none of the model's 3 blocks"),
    (0.9, "is 3 of 3 blocks and leaves none"), (0.1, "takes none of 3 blocks; ask for at least 0.33")])
def test_too_many_and_too_few_blocks_are_refused(asked: float, message: str, recipe: Recipe) -> None:
    with pytest.raises(RequestError, match=message):
        require_droppable(Decoder.of(tiny_model("llama")), recipe.changed(prune={"blocks": asked}))


def test_a_shorter_model_does_not_carry_the_blocks_that_are_gone(tmp_path: Path) -> None:
    source = model_folder(tmp_path / "source")
    shape = Decoder.of(shorter_model(open_model(source), KEPT)).shape("short")
    model = load_model(source)
    drop_blocks(model, KEPT)
    for one in (shape, Decoder.of(model).shape("short")):
        assert not one.carried
        assert not one.not_rotated
        assert checkpoint_bytes(one, {}) < checkpoint_bytes(Decoder.of(open_model(source)).shape("whole"), {})
    asked = Recipe().replace(["weights.method=rtn", "weights.group_size=32", "protect.tokens=false"])
    quantize(model, plan(model, sink_map_of(Decoder.of(model)), asked))
    save(model, tiny_tokenizer(), tmp_path / "saved")
    assert not [name for name in load_file(tmp_path / "saved" / "model.safetensors") if ".layers.2." in name]


def test_what_cannot_be_cut_is_refused(tmp_path: Path, recipe: Recipe) -> None:
    model = tiny_model("llama")
    for kept in ([], [1, 0], [0, 0], [1, 3]):
        with pytest.raises(RequestError, match="some of 0 to 2, ascending"):
            cut_blocks(model, tiny_tokenizer(), kept, tmp_path / "short")
    nowhere = tiny_model("llama").to("meta")
    with pytest.raises(RequestError, match="not in memory"):
        cut_blocks(nowhere, tiny_tokenizer(), KEPT, tmp_path / "short")
    with pytest.raises(RequestError, match="not in memory"):
        choose_blocks(nowhere, tiny_tokenizer(), sink_map_of(Decoder.of(model)), recipe)
    with pytest.raises(RequestError, match="weights stay on disk"):
        drop_blocks(open_model(model_folder(tmp_path / "source")), KEPT)
    with pytest.raises(RequestError, match="drops no blocks"):
        choose_blocks(model, tiny_tokenizer(), sink_map_of(Decoder.of(model)), recipe)
    for value in (0, 1.5, -1):
        with pytest.raises(RequestError, match=r"prune\.blocks"):
            recipe.changed(prune={"blocks": value})


def test_a_head_of_its_own_beside_a_configuration_that_ties_it_stays_one(tmp_path: Path) -> None:
    source = model_folder(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    cut_blocks(open_model(source), tiny_tokenizer(), KEPT, tmp_path / "short")
    before, after = load_file(source / "model.safetensors"), load_model(tmp_path / "short")
    assert torch.equal(after.lm_head.weight, before["lm_head.weight"])
    assert torch.equal(after.model.embed_tokens.weight, before["model.embed_tokens.weight"])
    assert not after.config.tie_word_embeddings
    smaller = smaller_model(open_model(source), 1)
    assert smaller is not None
    assert smaller.lm_head.weight is not smaller.model.embed_tokens.weight
    original = load_model(source)
    mended = rebuilt(original, "rms_norm_eps", original.config)
    with torch.no_grad():
        assert torch.equal(mended(ROW).logits, original(ROW).logits)
