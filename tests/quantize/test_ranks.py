"""Two processes give what one gives, to numerical noise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import tiny_mixture
from forked import start
from safetensors.torch import load_file
from sinkmaps import BOS, STOP, sink_map_of
from small_runs import model_folder, small_recipe
from tiny_tokenizer import tiny_tokenizer
from torch.distributed import TCPStore

import sinkquant as sq
from sinkquant.artifacts import Plan
from sinkquant.errors import RequestError
from sinkquant.formats import follow, load_dense, stream
from sinkquant.models import ActivationStore, Decoder, load_tokenizer, open_model
from sinkquant.policy import make_plan
from sinkquant.quantize import ranks

TORCHRUN = {"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0",
            "TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
"""What torchrun tells its processes, beside their number and the port of its store."""
JOBS = {"evaluated": ("weights.method=rtn", "weights.scale_search=false", "evaluate.divergence_rows=5",
                      "evaluate.limit=3", "evaluate.tasks=[sink_perplexity, sink_cloze]"),
        "quantized": ("evaluate.skip=true", "weights.descent=0", "calibration.rows=5", "activations.format=int8",
                      "activations.scale=tensor", "activations.sinks=all"),
        "mixture": ("evaluate.skip=true", "weights.descent=0", "calibration.rows=5", "calibration.batch_size=2",
                    "protect.statistics=cap", "calibration.min_expert_tokens=35")}


def task(places: list[Path]) -> None:
    """A program: what each of the two processes does."""
    for place in places:
        known = place / "sinks.json"
        sq.run(place / "recipe.yaml", place / "model", place / "two",
               sink_map=sq.SinkMap.load(known) if known.exists() else None)


def together(work: Path, places: list[Path]) -> None:
    """Two processes as torchrun starts them, with a store that it would keep."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    both = [start(work / str(rank), task, places, environment=TORCHRUN | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(store.port)}) for rank in range(2)]
    for process in both:
        code, _, err = process.communicate()
        assert code == 0, err


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> dict[str, tuple[Path, sq.Report | None]]:
    """Job -> a folder in which one process has written `one` and two have written `two`, and the report of the one.
    The same two processes do all jobs."""
    places = {name: tmp_path_factory.mktemp(name) for name in JOBS}
    recipes, known = {}, {}
    for name, place in places.items():
        if name == "mixture":
            tiny_mixture("mixtral", dtype=torch.bfloat16).save_pretrained(place / "model")
            tiny_tokenizer().save_pretrained(place / "model")
            known[name] = sink_map_of(Decoder.of(sq.load(place / "model")[0]), tokens=(BOS, STOP),
                                      name=str(place / "model"))
            known[name].save(place / "sinks.json")
        else:
            model_folder(place / "model")
        recipes[name] = small_recipe(text_file, *JOBS[name])
        (place / "recipe.yaml").write_text(recipes[name].to_yaml(), encoding="utf-8")
    together(tmp_path_factory.mktemp("ranks"), list(places.values()))
    return {name: (place, sq.run(recipes[name], place / "model", place / "one", sink_map=known.get(name)))
            for name, place in places.items()}


def test_two_processes_evaluate_as_one_does(done: dict[str, tuple[Path, sq.Report | None]]) -> None:
    place, alone = done["evaluated"]
    assert alone is not None
    together = sq.Report.load(place / "two" / "report.json")
    assert [row.name for row in together.rows] == ["unquantized", "sink_aware", "control"]
    for one, two in zip(alone.rows, together.rows, strict=True):
        for task, measures in one.tasks.items():
            for metric, measure in measures.items():
                assert two.tasks[task][metric].value == pytest.approx(measure.value, rel=1e-4, abs=1e-7), (task, metric)
    assert together.evaluation == alone.evaluation
    assert together.verdict.answer == alone.verdict.answer
    assert together.fidelity == alone.fidelity


def test_two_processes_give_what_one_gives(done: dict[str, tuple[Path, sq.Report | None]]) -> None:
    folder, _ = done["quantized"]
    one, two = (load_dense(folder / name / "model").state_dict() for name in ("one", "two"))
    scales = [{name: float(tensor) for name, tensor in load_file(folder / place / "model/model.safetensors").items()
               if name.endswith("layers.0.self_attn.q_proj.input_scale")} for place in ("one", "two")]
    assert len(scales[0]) == 1
    assert scales[0] == scales[1]  # the range is that of all rows
    unquantized = sq.load(folder / "model")[0]
    first_block = {name: weight for name, weight in one.items() if name.startswith("model.layers.0.")}
    for name, weight in first_block.items():
        # Sums differ by rounding, so that a code on the edge may fall to the other side, and what follows in its row.
        differs = ((weight - two[name]).abs() > 1e-6 * weight.abs().max()).float().mean()
        assert differs < 0.08, name
        error = weight - unquantized.state_dict()[name]
        assert (weight - two[name]).norm() <= 0.4 * error.norm(), name
    # Every such code changes what later blocks get, and with it more codes; what the model loses stays the same.
    rows = torch.arange(8, 72)[None]
    outputs = [load_dense(folder / name / "model")(rows).logits.detach() for name in ("one", "two")]
    lost = [float((logits - unquantized(rows).logits.detach()).norm()) for logits in outputs]
    assert lost[0] == pytest.approx(lost[1], rel=0.2)
    assert (outputs[0] - outputs[1]).norm() < 0.6 * lost[0]


def test_two_processes_share_the_experts_of_a_mixture_and_cap_the_same_sinks(
        done: dict[str, tuple[Path, sq.Report | None]]) -> None:
    folder, _ = done["mixture"]
    assert len(Plan.load(folder / "two" / "plan.json").calibration.sinks) == 2
    tokens = [json.loads((folder / name / "model/sinkquant.json").read_text())["expert_tokens"]
              for name in ("one", "two")]
    first, second = (f"model.layers.{i}.mlp.experts" for i in range(2))
    assert tokens[0][first] == tokens[1][first]
    assert sum(tokens[0][first]) == 2 * 5 * 64
    assert min(tokens[0][first]) < 35 < max(tokens[0][first])
    # A code on the edge that fell to the other side may send a token to another expert of the next layer.
    assert sum(abs(a - b) for a, b in zip(tokens[0][second], tokens[1][second], strict=True)) <= 4
    one, two = (load_dense(folder / name / "model").state_dict() for name in ("one", "two"))
    for name, weight in one.items():
        differs = ((weight - two[name]).abs() > 1e-6 * weight.abs().max()).float().mean()
        assert differs < 0.02, name


@pytest.mark.parametrize("asked", ["weights.tune=1", "weights.distill=1", "weights.smooth=awq",
                                   "protect.channels=scale"])
def test_what_needs_all_rows_is_refused_before_the_sinks_are_looked_for(
        asked: str, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, recipe = model_folder(tmp_path / "model"), small_recipe(text_file, asked)
    decoder = Decoder.of(sq.load(source)[0])
    plan = make_plan(decoder.shape("tiny"), sink_map_of(decoder, {"model.layers.1.mlp.down_proj": 0.9}), recipe)
    ranks.require_one_process(recipe)
    monkeypatch.setattr(ranks, "this_process", lambda: (0, 2))
    ranks.require_one_process(small_recipe(text_file))
    with pytest.raises(RequestError, match="need all rows in one process; start without torchrun"):
        ranks.require_one_process(small_recipe(text_file), plan)
    with pytest.raises(RequestError, match="need all rows in one process; start without torchrun"):
        sq.run(recipe, source, tmp_path / "out")


def test_a_rank_that_follows_keeps_its_rows_where_it_is_told(
        tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = model_folder(tmp_path / "model")
    decoder = Decoder.of(sq.load(source)[0])
    plan = make_plan(decoder.shape("tiny"), sink_map_of(decoder), small_recipe(text_file, "weights.descent=0"))
    jobs = iter([{"folder": str(tmp_path / "out"), "plan": plan.to_json(), "done": 0, "device": "cpu",
                  "dtype": torch.float32, "scales": {}}, None])
    monkeypatch.setattr(stream, "tell", lambda _: next(jobs))
    asked: list[tuple[int, ...]] = []

    class Store(ActivationStore):
        def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            asked.append(shape)
            return super().empty(shape, dtype)

    follow(lambda: open_model(source), load_tokenizer(source), Store())
    assert (4, 64, 64) in asked  # all rows, all tokens, hidden_size


def test_rows_are_shared_out_and_what_cannot_be_shared_is_refused(
        tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = sq.load(model_folder(tmp_path / "model"))
    recipe = small_recipe(text_file, "detect.super_weights=false")
    sink_map = sq.detect(model, tokenizer, recipe=recipe)
    plan = sq.plan(model, sink_map, recipe)
    rows = torch.arange(15).reshape(5, 3)
    assert ranks.my_rows(rows, plan) is rows
    shares = []
    for rank in range(2):
        monkeypatch.setattr(ranks, "this_rank", lambda rank=rank: (rank, 2))
        shares.append(ranks.my_rows(rows, plan))
    assert torch.equal(torch.cat(shares), rows)
    capped = sq.plan(model, sink_map, recipe.replace(["protect.statistics=cap", "calibration.batch_size=2"]))
    together = []
    for rank in range(2):
        monkeypatch.setattr(ranks, "this_rank", lambda rank=rank: (rank, 2))
        together.append(ranks.my_rows(rows, capped))
    assert [len(part) for part in together] == [2, 3]  # one batch of two, and one of two with the last one
    assert torch.equal(torch.cat(together), rows)
    with pytest.raises(RequestError, match="1 batches of calibration rows for 2 processes"):
        ranks.my_rows(rows[:2], capped)
    with pytest.raises(RequestError, match="1 calibration rows for 2 processes"):
        ranks.my_rows(rows[:1], plan)
    with pytest.raises(RequestError, match="need all rows in one process"):
        ranks.my_rows(rows, sq.plan(model, sink_map, recipe.replace(["weights.tune=2"])))
