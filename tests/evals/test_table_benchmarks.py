"""Lines that benchmarks keep, and the benchmarks of backends and of kept channels: a line beside every control."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
from families import tiny_model
from planter import Plant, plant
from transformers import PreTrainedTokenizerFast

BENCHMARKS = Path(__file__).parents[2] / "evals" / "benchmarks"


def run(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    runpy.run_path(str(BENCHMARKS / script), run_name="__main__")


def cells(printed: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()]


@pytest.fixture
def common(tiny_folder: Path, text_file: Path) -> list[str]:
    return [str(tiny_folder), "--text", str(text_file), "--held-out", "2", "--set", f"calibration.text={text_file}",
            "calibration.rows=2", "calibration.length=32", "detect.rows=8", "detect.long_rows=0"]


def test_kept_lines_are_compared_and_not_measured_again(common: list[str], tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "lines.jsonl"
    rows = [([0.5, 0.5], 2.0), ([0.25, 0.25], 1.5)]
    kept.write_text("".join(json.dumps({"labels": {"method": name, "bits": "2"}, "kl": kl, "loss": [loss] * 2,
                                        "unquantized": [1.0, 1.0]}) + "\n"
                            for name, (kl, loss) in zip(["control", "ours"], rows, strict=True)))
    run(monkeypatch, "measure.py", str(kept), "--same", "bits")
    head, _, control, ours = cells(capsys.readouterr().out)
    assert head[:3] == ["method", "bits", "KL, nats"]
    assert control[2] == "0.50000"
    assert control[4] == ""
    assert ours[4:6] == ["0.25000 (50%)", "0.25000 to 0.25000"]
    assert ours[6] == "4.482"
    assert ours[7].startswith("+1.763")  # exp(1.5), and that less exp(1)

    run(monkeypatch, "pruning.py", *common, "--methods", "magnitude", "--patterns", "2:4", "--lines", str(kept))
    before = kept.read_text()
    assert cells(capsys.readouterr().out)[-1][:4] == ["magnitude", "16", "2:4", "all"]
    assert len(before.splitlines()) == 3
    run(monkeypatch, "pruning.py", *common, "--methods", "magnitude", "--patterns", "2:4", "--lines", str(kept))
    assert kept.read_text() == before


def test_a_backend_stands_beside_its_control(common: list[str], monkeypatch: pytest.MonkeyPatch,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "backends.py", *common, "weights.group_size=32", "--formats", "rtn-w4")
    lines = cells(capsys.readouterr().out)
    assert [line[:3] for line in lines[2:]] == [["none", "bfloat16", "unquantized"],
                                                *(["compressed-tensors", "rtn-w4", row]
                                                  for row in ("control", "sink-aware"))]
    assert float(lines[2][3]) == 0
    assert float(lines[3][3]) > 0
    assert int(lines[3][9].replace(",", "")) < int(lines[2][9].replace(",", ""))
    assert all(float(line[10]) > 0 for line in lines[2:])  # tokens per second


def test_kept_channels_stand_beside_controls_of_the_same_bytes(common: list[str], monkeypatch: pytest.MonkeyPatch,
                                                               capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "channels.py", *common, "weights.group_size=32", "--methods", "rtn", "--bits", "2", "--channels",
        "split", "module", "scale")
    lines = cells(capsys.readouterr().out)[2:]
    assert [line[2:4] for line in lines] == [
        ["nothing", ""], ["split", "evenly"], ["split", "elsewhere"], ["split", "sinks"],
        ["module", "evenly"], ["module", "elsewhere"], ["module", "sinks"], ["scale", "sinks"]]
    assert lines[2][-2] == lines[3][-2]  # bytes


def test_recipes_stand_beside_their_controls_with_tasks(common: list[str], tmp_path: Path,
                                                        tokenizer: PreTrainedTokenizerFast,
                                                        monkeypatch: pytest.MonkeyPatch,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data.jsonl").write_text("".join(f'{{"first": "{a} {b}", "last": "{c}"}}\n' for a, b, c in [
        ("to", "be", "or"), ("not", "to", "be"), ("that", "is", "the")]))
    (tmp_path / "toy.yaml").write_text(
        f"task: toy\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'data.jsonl'}}}}}\n"
        "test_split: test\noutput_type: loglikelihood\ndoc_to_text: '{{first}}'\ndoc_to_target: ' {{last}}'\n"
        "metric_list:\n  - metric: perplexity\n    aggregation: perplexity\n    higher_is_better: false\n"
        "  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n")
    planted = plant(tiny_model("llama", max_position_embeddings=64), Plant(1, None, frozenset({0, 1, 2, 3}), 20, 0))
    planted.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    common[0] = str(tmp_path / "model")
    kept = tmp_path / "lines.jsonl"
    run(monkeypatch, "recipes.py", *common, "weights.group_size=32", "--lines", str(kept), "--only", "2 bits, RTN",
        "2 bits, GPTQ", "KV cache, 2", "--tasks", "toy", "--task-folder", str(tmp_path))
    head, _, *rows = [row for row in cells(capsys.readouterr().out) if row]
    assert head == ["model", "sinks", "KL, nats", "perplexity", "toy", "toy, nats"]
    # Rounding to nearest has nothing to protect, so that its control would be the same model.
    assert [row[:2] for row in rows] == [["unquantized", ""], ["2 bits, GPTQ", "aware"], ["2 bits, GPTQ", "control"],
                                         ["2 bits, RTN", "aware"], ["KV cache, 2 bits", "aware"],
                                         ["KV cache, 2 bits", "control"]]
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    assert all(len(line["scores"]["toy, nats"]) == 3 and min(line["scores"]["toy, nats"]) > 0 for line in lines)
    assert lines[0]["kl"] == pytest.approx([0, 0], abs=1e-6)
    plain, *others, cached, _ = [line["scores"]["toy, nats"] for line in lines]
    assert all(other != plain for other in others)
    assert cached == pytest.approx(plain, rel=1e-5)  # documents that are no longer than the window
    assert " to " in rows[1][5]
    before = kept.read_text()
    run(monkeypatch, "recipes.py", *common, "weights.group_size=32", "--lines", str(kept), "--table")
    assert kept.read_text() == before

    # A task more: of the lines that lack it that one is measured, and the table has it beside the others.
    (tmp_path / "again.yaml").write_text((tmp_path / "toy.yaml").read_text().replace("task: toy", "task: again"))
    run(monkeypatch, "recipes.py", *common, "weights.group_size=32", "--lines", str(kept), "--only", "2 bits, RTN",
        "--tasks", "toy", "again", "--task-folder", str(tmp_path))
    more = [json.loads(line) for line in kept.read_text().removeprefix(before).splitlines()]
    assert [(line["labels"]["model"], set(line["scores"])) for line in more] == [
        ("unquantized", {"again", "again, nats"}), ("2 bits, RTN", {"again", "again, nats"})]
    assert more[1]["kl"] == next(line["kl"] for line in lines if line["labels"]["model"] == "2 bits, RTN")
    *_, rounded, _, _ = [row for row in cells(capsys.readouterr().out) if row]
    assert (rounded[0], rounded[4:6]) == ("2 bits, RTN", rounded[6:8])


def test_a_repair_of_low_rank_stands_beside_other_bytes(common: list[str], monkeypatch: pytest.MonkeyPatch,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "low_rank.py", *common, "weights.bits=3", "weights.group_size=32", "--ranks", "1", "1000",
        "--beside", "weights.bits=8")
    plain, one, whole, other = cells(capsys.readouterr().out)[2:]
    assert [line[0] for line in (one, whole, other)] == ["repair of rank 1", "repair of rank 1000", "weights.bits=8"]
    lost = [float(line[1]) for line in (plain, one, whole)]
    assert lost[0] > lost[1] > 100 * lost[2]  # of the whole repair bfloat16's rounding is left
    assert len({line[-1] for line in (plain, one, whole, other)}) == 4  # bytes
