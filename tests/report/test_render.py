"""One page that needs nothing from outside, and says the same as the JSON and the Markdown beside it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from families import tiny_model
from kv_plans import kv_plan
from page import Page

from sinkquant import Plan, Report, SinkMap
from sinkquant.report import comparison, page, write

BROWSERS = [found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))][:1]


@pytest.fixture
def folder(tmp_path: Path, report: Report, sink_map: SinkMap, plan: Plan) -> Path:
    write(tmp_path, report, sink_map, plan, sink_map)
    return tmp_path


def test_the_page_stands_alone_and_is_sound(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert [source for source in page.fetched if not source.startswith("data:")] == []
    assert not re.search(r"https?:|@import|url\((?!#)", text)
    assert page.wrong == []
    assert page.open == []
    assert len(set(page.ids)) == len(page.ids)
    assert {use.removeprefix("#") for use in page.used} <= set(page.ids)
    assert page.tags.count("svg") == 3
    assert "script" not in page.tags  # the token's text is escaped
    assert "<script>alert(1)</script>" in page.words
    for words in ("Protection pays", "it does", "Quality gate failed", "KL divergence 0.25 is over 0.1", "m & m",
                  "25.0 %", "0.25 ± 0.01", "3.1 ± 0.1 (96.8 %)", "sink-aware is better", "no difference shown",
                  "because a|b <i>so</i>", "a note of detection", "a note of the run", "1.5 s",
                  "Predicted and measured", "bytes on disk", "not predicted", "1.250", "no cache & no inputs",
                  "1,024.0 MiB"):
        assert words in page.words, words
    assert page.words.index("Protection pays") < page.words.index("Checkpoints on disk")


def test_colours_are_the_page_s_own(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    for drawn in ("#101010", "#606060", "#2563eb", "#d97706"):
        assert drawn not in text
    used = set(re.findall(r"var\((--[\w-]+)\)", text))
    dark = text[text.index("prefers-color-scheme: dark"):]
    assert used <= set(re.findall(r"(--[\w-]+):", text))
    assert {"--series-0", "--series-1", "--ink", "--card"} <= used & set(re.findall(r"(--[\w-]+):", dark))


def test_json_and_markdown_hold_the_same(folder, report):
    kept = Report.load(folder / "report.json")
    assert set(kept.plots) == {"accuracy", "worth", "sinks", "massive", "bits"}
    assert kept.model_copy(update={"plots": {}}) == report
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    assert markdown.startswith("# Protection pays: m & m, recipe w4\n\nProtection pays on this model: it does.\n")
    tables = [block for block in markdown.split("\n\n") if block.startswith("|")]
    assert len(tables) == 6
    for table in tables:
        assert len({line.count("|") for line in table.strip().splitlines()}) == 1
        assert len(table.strip().splitlines()) > 2
    assert "| sink-aware | 1,000 | 25.0 % | 4.500 | 16-bit | 16 |" in markdown


def test_two_renderings_have_the_same_bytes(tmp_path, report, sink_map, plan):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, report, sink_map, plan, sink_map)
    for name in ("report.html", "report.md", "report.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_report_of_little_is_still_a_page(tmp_path, report, sink_map, plan):
    """No baseline, no control, no sinks, no channels: a random model that was evaluated alone."""
    verdict = report.verdict.model_copy(update={"answer": "not measured", "gate": None, "sentence": "Not measured: x"})
    bare = report.model_copy(update={"rows": report.rows[1:2], "paired": [], "recovery": {}, "fidelity": None,
                                     "verdict": verdict})
    empty = sink_map.model_copy(update={"tokens": [], "channels": [], "notes": []})
    write(tmp_path, bare, empty, plan)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.wrong == page.open == []
    assert "No sink was found." in page.words
    assert "Not measured: x" in page.words
    assert "No massive activation was found." in page.words


@pytest.mark.parametrize("how", ["plain", "gguf", "own", "cache", "simulated"])
def test_what_plain_transformers_does_not_load_as_measured_is_loaded_by_sinkquant(how, tmp_path, report, sink_map,
                                                                                 plan):
    first = next(iter(plan.modules))
    int4 = plan.modules[first].model_copy(update={"activations": "int4", "activation_scale": "token"})
    changed = {"plain": {}, "gguf": {"modules": {name: one.model_copy(update={"storage": "gguf", "group_size": 32})
                                                 for name, one in plan.modules.items() if one.bits < 16}},
               "own": {"loads_in": ["sinkquant"]}, "cache": {"kv_cache": kv_plan(tiny_model("llama"))},
               "simulated": {"modules": plan.modules | {first: int4}}}[how]
    text = page(report, sink_map, plan.model_copy(update=changed))
    assert ("AutoModelForCausalLM" in text) == (how == "plain")
    assert ('model, tokenizer = sinkquant.load("model")' in text) == (how != "plain")


def test_runs_side_by_side(report):
    other = report.model_copy(update={"recipe": "w3 <b>"})
    page = Page(comparison([("one", report), ("two", other)]))
    assert page.wrong == page.open == page.fetched[1:] == []
    assert "2 runs side by side" in page.words
    assert "w3 <b>" in page.words
    assert page.ids == ["accuracy"]
    assert "two: sink-aware" in page.words
    assert "compare them with care" not in page.words
    assert "compare them with care" in Page(comparison([
        ("one", report), ("two", other.model_copy(update={"evaluation": {"rows": 9}}))])).words


@pytest.mark.parametrize("browser", BROWSERS)
def test_a_browser_opens_it_without_complaint(browser, folder, tmp_path):
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
               f"--user-data-dir={tmp_path / 'profile'}", "--window-size=390,800", "--dump-dom",
               (folder / "report.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "CONSOLE" not in done.stderr
    assert "Protection pays" in done.stdout
    assert done.stdout.count("<svg") == 3
