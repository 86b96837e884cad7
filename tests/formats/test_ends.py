"""The token embedding and the output head in 8 and 4 bits, tied or not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from checkpoints import distance, plain_logits, quantized, weight_bytes
from families import FAMILIES, tiny_model
from safetensors import safe_open
from sinkmaps import sink_map_of
from small_runs import fingerprint, model_folder, small_recipe
from tiny_tokenizer import tiny_tokenizer

from sinkquant import RequestError, load, quantize
from sinkquant.artifacts import Plan
from sinkquant.formats import quantize_to, save
from sinkquant.models import Decoder, load_tokenizer, open_model
from sinkquant.policy import accept_edited, make_plan
from sinkquant.recipe import Recipe


@dataclass(frozen=True)
class Case:
    family: str
    lm_head: int
    embeddings: int
    tied: bool = False
    more: tuple[str, ...] = ()
    dtype: torch.dtype = torch.bfloat16


CASES = [
    Case("llama", 8, 16), Case("llama", 4, 8, dtype=torch.float32), Case("llama", 8, 8, tied=True),
    Case("llama", 4, 8, tied=True, dtype=torch.float16), Case("gemma3_text", 8, 8, tied=True),
    Case("opt", 8, 8, tied=True), Case("qwen3_moe", 3, 16, tied=True),
    Case("llama", 8, 8, tied=True, more=("weights.rotate=full", "weights.method=gptq"))]
NAMES = [f"{c.family}-{c.lm_head}-{c.embeddings}{'-tied' * c.tied}{'-rotated' * bool(c.more)}" for c in CASES]


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    return torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def results(rows: torch.Tensor, text_file: Path,
            tmp_path_factory: pytest.TempPathFactory) -> list[tuple[torch.Tensor, torch.Tensor, Plan, Path]]:
    """(logits in memory, logits in a process that knows transformers only, plan, folder) of every case."""
    work = tmp_path_factory.mktemp("ends")
    expected, plans, folders = [], [], []
    for index, case in enumerate(CASES):
        asked = (f"weights.lm_head={case.lm_head}", f"weights.embeddings={case.embeddings}", *case.more)
        model, plan, _ = quantized(text_file, case.family, "rtn", 4, 32, case.dtype, asked,
                                   tie_word_embeddings=case.tied)
        folders.append(save(model, tiny_tokenizer(), work / str(index)))
        plans.append(plan)
        with torch.no_grad():
            expected.append(model(rows, use_cache=False).logits)
    found = plain_logits(rows, folders, work)
    return [(one, found[i], plans[i], folders[i]) for i, one in enumerate(expected)]


@pytest.mark.parametrize("index", range(len(CASES)), ids=NAMES)
def test_plain_transformers_gives_the_same_logits_and_the_plan_the_size(
        index: int, results: list[tuple[torch.Tensor, torch.Tensor, Plan, Path]]) -> None:
    expected, found, plan, folder = results[index]
    assert torch.equal(found, expected)
    assert plan.weight_bytes == weight_bytes(folder)


def test_a_tied_head_shares_the_codes_and_half_of_16_bits_is_left(
        results: list[tuple[torch.Tensor, torch.Tensor, Plan, Path]]) -> None:
    _, _, plan, folder = results[NAMES.index("llama-8-8-tied")]
    assert plan.ends["lm_head"].shares == "model.embed_tokens"
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in set(file.keys())
        assert str(file.get_slice("model.embed_tokens.weight").get_dtype()) == "I8"
    dense, _ = load(folder)
    assert dense.get_output_embeddings().weight is dense.get_input_embeddings().weight
    table = tiny_model("llama", dtype=torch.bfloat16).get_input_embeddings().weight
    assert sum(end.bytes for end in plan.ends.values()) == table.numel() + 2 * 2 * len(table)
    rotated = results[NAMES.index("llama-8-8-tied-rotated")][2]  # the gain of the last norm is in the head alone
    assert rotated.ends["lm_head"].shares is None
    # Neither the head by words nor the embedding by bytes in one engine.
    assert results[NAMES.index("llama-8-16")][2].loads_in == ["transformers", "vllm"]
    assert plan.loads_in == ["transformers"]


@pytest.mark.parametrize("name", ["llama-8-8-tied", "llama-4-8-tied", "gemma3_text-8-8-tied"])
def test_packed_inference_keeps_them_packed(
        name: str, results: list[tuple[torch.Tensor, torch.Tensor, Plan, Path]], rows: torch.Tensor) -> None:
    folder = results[NAMES.index(name)][3]
    packed, _ = load(folder, packed=True)
    dense, _ = load(folder, dtype=torch.bfloat16)
    assert distance(packed, dense, rows) < 0.03
    assert getattr(type(packed.get_output_embeddings()), "keeps_packed", False)
    table, head = packed.get_input_embeddings(), packed.get_output_embeddings()
    assert torch.equal(table.weight, dense.get_input_embeddings().weight)
    if name == "llama-8-8-tied":
        assert table.codes.data_ptr() == head.codes.data_ptr()
    with pytest.raises(RequestError, match=r"has packed .*already; leave head_bits at 16"):
        load(folder, packed=True, head_bits=8)


@pytest.mark.parametrize(("family", "more"), [
    ("llama", ("weights.lm_head=8",)), ("llama", ("weights.lm_head=4", "weights.rotate=full")),
    ("olmo", ("weights.lm_head=4", "weights.rotate=full"))])  # a last norm without gain: untied after the rotation
def test_from_disk_to_disk_the_bytes_are_the_same_after_a_kill_too(
        family: str, more: tuple[str, ...], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "olmo", FAMILIES["llama"])
    source = model_folder(tmp_path / "model", family, torch.bfloat16, tie_word_embeddings=True)
    recipe = small_recipe(text_file, "weights.embeddings=8", *more)
    tokenizer = load_tokenizer(source)

    def write(name: str, stop: int | None) -> Path:
        model = open_model(source)
        decoder = Decoder.of(model)
        plan = make_plan(decoder.shape("tiny"), sink_map_of(decoder), recipe)

        def progress(done: int, _: int, __: str) -> None:
            if done == stop:
                raise KeyboardInterrupt

        quantize_to(tmp_path / name, model, plan, tokenizer, progress=progress)
        assert plan.weight_bytes == weight_bytes(tmp_path / name)
        return tmp_path / name

    whole = write("whole", None)
    with pytest.raises(KeyboardInterrupt):
        write("killed", 1)
    again = write("killed", None)
    assert fingerprint(whole) == fingerprint(again)
    # In memory: the same tensors.
    model, _ = load(source)
    decoder = Decoder.of(model)
    plan = make_plan(decoder.shape("tiny"), sink_map_of(decoder), recipe)
    save(quantize(model, plan, tokenizer), tokenizer, tmp_path / "memory")
    assert (tmp_path / "memory" / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("changes", "message"), [
    (["weights.embeddings=4"], "weights.embeddings is 4, and transformers loads a token embedding of 8 bits"),
    (["weights.embeddings=8"], "tied to the token embedding, .* set weights.lm_head too"),
    (["weights.lm_head=4", "weights.group_size=-1", "weights.overrides=[]", "backend=gptq"],
     "are for the backend compressed-tensors, not for gptq; leave them at 16.$"),
    (["weights.lm_head=8", "backend=gguf", "weights.group_size=32"], "its files hold both as weights.ends says"),
    (["weights.lm_head=8", "weights.embeddings=8", "engine=vllm-cpu"], "does not run integer weights of a byte each"),
    (["weights.lm_head=8", "weights.embeddings=8", "kv_cache.prefix=bos"], "come from the unquantized token embedding"),
    (["weights.lm_head=8", "protect.channels=split", "activations.format=16-bit"], "own format holds the embedding"),
])
def test_what_no_checkpoint_holds_is_refused_by_name(changes: list[str], message: str) -> None:
    decoder = Decoder.of(tiny_model("llama", dtype=torch.bfloat16, tie_word_embeddings=True))
    energies = {"model.layers.1.mlp.down_proj": 0.9}
    with pytest.raises(RequestError, match=message):
        make_plan(decoder.shape("tiny"), sink_map_of(decoder, energies), Recipe().replace(
            ["weights.group_size=32", *changes]))


def test_an_edited_plan_may_change_their_bits_and_nothing_else() -> None:
    decoder = Decoder.of(tiny_model("llama", dtype=torch.bfloat16))
    shape = decoder.shape("tiny")
    plan = make_plan(shape, sink_map_of(decoder), Recipe().replace(["weights.group_size=32", "weights.lm_head=8"]))
    less = plan.ends["lm_head"].model_copy(update={"bits": 4, "group_size": 32})
    counted = accept_edited(plan.model_copy(update={"ends": {"lm_head": less}}), shape)
    assert counted.weight_bytes < plan.weight_bytes
    assert accept_edited(plan.model_copy(update={"ends": {}}), shape).weight_bytes > plan.weight_bytes
    with pytest.raises(RequestError, match="edit the bits alone, here pack-quantized in groups of 32"):
        accept_edited(plan.model_copy(update={"ends": {"lm_head": less.model_copy(update={"group_size": 16})}}), shape)


def test_a_head_alone_is_packed(text_file: Path, tmp_path: Path) -> None:
    """Blocks in 16 bits below a head of 8: transformers is told of it, and loads it."""
    model, plan, _ = quantized(text_file, more=("weights.ignore=['*']", "weights.lm_head=8", "kv_cache={exact: none}"),
                               dtype=torch.bfloat16)
    assert not plan.formats
    folder = save(model, tiny_tokenizer(), tmp_path / "head")
    rows = torch.arange(3, 19)[None]
    with torch.no_grad():
        expected = model(rows, use_cache=False).logits
    assert torch.equal(plain_logits(rows, [folder], tmp_path)[0], expected)
