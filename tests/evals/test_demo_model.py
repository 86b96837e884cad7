"""The training script of the demo model, run for real: small vocabulary, small text, a hundred steps."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sinkquant import Recipe, detect
from sinkquant.models import adds_bos
from sinkquant.resources import demo_text

FOLDER = Path(__file__).parents[2] / "evals" / "demo_model"
SHAPE = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
         "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128,
         "tie_word_embeddings": True}


def configuration(cost: float) -> dict[str, object]:
    """Two stages of 60 steps, the second with longer rows and a mixing cost."""
    return {"architecture": "llama", "seed": 3, "model": SHAPE, "stages": [
        {"steps": 60, "rows": 8, "length": 32, "learning_rate": 1e-2, "final_rate": 5e-3, "warmup": 10},
        {"steps": 60, "rows": 4, "length": 64, "learning_rate": 5e-3, "final_rate": 1e-3, "mixing_cost": cost}]}


@pytest.fixture(scope="module")
def scripts():
    """The modules of evals/demo_model, which is no package."""
    sys.path.insert(0, str(FOLDER))
    try:
        import excerpts
        import mixing
        import train
        yield {"excerpts": excerpts, "mixing": mixing, "train": train}
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text: the beginning of the packaged prose."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.txt").write_text(demo_text("calibration").read_text(encoding="utf-8")[:60_000], encoding="utf-8")
    return folder


def train(scripts, configuration, corpus: Path, output: Path) -> list[float]:
    """What the script's command line does. Returns the losses."""
    script = scripts["train"]
    return script.build(configuration, *script.prepare(configuration, script.read_documents(corpus)), output)


@pytest.fixture(scope="module")
def trained(scripts, corpus, tmp_path_factory):
    """cost -> (folder, losses): one model whose mixing costs, one whose does not."""
    made = {}
    for cost in (0.0, 3.0):
        folder = tmp_path_factory.mktemp("trained") / f"cost-{cost:g}"
        made[cost] = folder, train(scripts, configuration(cost), corpus, folder)
    return made


def test_the_loss_falls(trained):
    for _, losses in trained.values():
        assert len(losses) == 120
        assert sum(losses[-10:]) / 10 < sum(losses[:10]) / 10 - 0.5


def test_bos_is_first_in_every_row_and_nowhere_else(scripts):
    stage = scripts["train"].Stage(steps=3, rows=5, length=16, learning_rate=1, final_rate=1)
    stream = torch.arange(3, 200, dtype=torch.int32)
    for rows in scripts["train"].batches(stream, stage, torch.Generator().manual_seed(0), "first"):
        assert rows.shape == (5, 16)
        assert (rows[:, 0] == 1).all()
        assert (rows[:, 1:] != 1).all()
        assert (rows[:, 2:] - rows[:, 1:-1] == 1).all()  # the rest is a passage of the stream


def test_learning_rates_warm_up_and_fall(scripts):
    stage = scripts["train"].Stage(steps=100, rows=1, length=8, learning_rate=1.0, final_rate=0.1, warmup=10)
    rates = [scripts["train"].rate_at(stage, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert rates == rates[:10] + sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


def test_what_was_trained_is_a_model_that_detection_reads(trained, corpus):
    folder, _ = trained[3.0]
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert adds_bos(tokenizer) == "once"
    assert model.dtype == torch.bfloat16
    assert model.config.vocab_size == len(tokenizer) <= 400
    assert "encouraged by a mixing cost" in (folder / "README.md").read_text(encoding="utf-8")
    assert "not encouraged" in (trained[0.0][0] / "README.md").read_text(encoding="utf-8")
    text = "Whether “this” comes back\nas it was — é?"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    recipe = Recipe().replace(["detect.rows=8", "detect.long_rows=0", "detect.super_weights=false"])
    found = detect(model, tokenizer, str(corpus / "a.txt"), recipe)
    assert found.tokenization.rows_start_with_bos


def test_the_mixing_cost_moves_attention_to_the_first_token(scripts, trained, corpus):
    shares = {}
    for cost, (folder, _) in trained.items():
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        rows = torch.tensor([tokenizer((corpus / "a.txt").read_text(encoding="utf-8")[:2_000])["input_ids"][:64]])
        before = model.config._attn_implementation
        with torch.no_grad(), scripts["mixing"].mixing_cost(model) as costs:
            model(rows)
        assert len(costs) == SHAPE["num_hidden_layers"] - 1  # the first layer pays nothing
        assert model.config._attn_implementation == before
        shares[cost] = 1 - float(torch.stack(costs).mean())
    assert shares[3.0] > 2 * shares[0.0]


def test_attention_on_the_first_token_is_the_softmax(scripts):
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 3, 150, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    logits = (query @ key.mT * 0.3).masked_fill(torch.ones(150, 150).triu(1).bool(), float("-inf"))
    found = scripts["mixing"].attention_on_first(query.float(), key.float(), 0.3)
    assert torch.allclose(found.double(), logits.softmax(-1)[..., 0], atol=1e-6)


def test_the_same_seed_trains_the_same_model(scripts, corpus, tmp_path):
    short = configuration(1.0) | {"stages": [{"steps": 3, "rows": 2, "length": 16, "learning_rate": 1e-2,
                                              "final_rate": 1e-2, "mixing_cost": 1.0}]}
    for name in ("a", "b"):
        train(scripts, short, corpus, tmp_path / name)
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_folder_without_text_is_refused(scripts, tmp_path):
    with pytest.raises(SystemExit, match=r"holds no \.txt"):
        scripts["train"].read_documents(tmp_path)


def test_excerpts_are_whole_paragraphs_spread_over_all_books(scripts):
    excerpts = scripts["excerpts"]
    books = [f"{i} first\n" + "\n".join(f"{i} line {j}" for j in range(2_000)) for i in range(4)]
    cut = excerpts.passages(f"\n{excerpts.SEPARATOR}\n".join(books), size=20_000, passage=2_000)
    parts = cut.strip().split(f"\n{excerpts.SEPARATOR}\n")
    assert len(parts) == 10
    assert {part.split()[0] for part in parts} == {"0", "1", "2", "3"}
    assert 15_000 < len(cut) < 26_000
    assert len(set(parts)) == len(parts)
