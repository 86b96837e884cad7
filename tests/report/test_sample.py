"""The sample's attention and the fidelity section: what is shown is what was measured, and the controls work."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from page import Page
from tiny_tokenizer import tiny_tokenizer

from sinkquant import Plan, Report, SinkMap
from sinkquant.artifacts import SinkFidelity
from sinkquant.artifacts.fidelity import AttentionSample, FidelityCheck, SpreadCurve
from sinkquant.diagnose import sample as module
from sinkquant.diagnose.sample import attention_sample
from sinkquant.report import write
from sinkquant.report.plots import perturbation_spread
from sinkquant.report.sample import lines, mean_attention, visible

BROWSERS = [found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))][:1]
LENGTH = 6


def matrices(seed: int) -> torch.Tensor:
    """[2 layers, 3 heads, LENGTH, LENGTH], causal, rows that sum to 1."""
    logits = torch.randn(2, 3, LENGTH, LENGTH, generator=torch.Generator().manual_seed(seed))
    hidden = torch.ones(LENGTH, LENGTH).triu(1).bool()
    return torch.softmax(logits.masked_fill(hidden, float("-inf")), dim=-1)


@pytest.fixture
def sample() -> AttentionSample:
    return attention_sample(matrices(0), matrices(1), torch.tensor([1, 20, 4, 21, 22, 23]), tiny_tokenizer())


@pytest.fixture
def compared(report: Report, sample: AttentionSample) -> Report:
    """The report with a comparison of its sink-aware row."""
    checks = [FidelityCheck(name="sink_rate", what="rate", value=-0.4, ideal=0, null=0.02, bound=0.05, kept=False),
              FidelityCheck(name="massive_overlap", what="overlap", value=None, ideal=1, null=0, bound=0.2, kept=None)]
    found = SinkFidelity(verdict="changed", sentence="The sinks <changed>.", checks=checks, rows=4, length=9,
                         sample=sample, spread=[SpreadCurve(with_bos=True, position=2, before=[0, 0, 1, 0.1, 0.05],
                                                            after=[0, 0, 1, 0.2, 0.15])])
    fidelity = report.fidelity.model_copy(update={"comparisons": {"sink_aware": found}})
    return report.model_copy(update={"fidelity": fidelity})


def test_a_sample_is_its_matrices_to_a_byte(sample: AttentionSample) -> None:
    found = mean_attention(sample, sample.before)
    torch.testing.assert_close(torch.from_numpy(found).float(), matrices(0).mean((0, 1)), atol=0.003, rtol=0)
    assert sample.tokens == ["<s>", "w20", ".", "w21", "w22", "w23"]
    expected = matrices(0).mean((0, 1))
    for line in lines(sample):
        assert line.target_position == int(expected[line.position].argmax())
        assert line.before == pytest.approx(float(expected[line.position].max()), abs=0.003)


def test_many_heads_are_shown_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 100)
    one = attention_sample(matrices(0), matrices(1), torch.arange(10, 16), tiny_tokenizer())
    assert (one.layers, one.heads) == (2, 1)
    torch.testing.assert_close(torch.from_numpy(mean_attention(one, one.after)).float(), matrices(1).mean((0, 1)),
                               atol=0.003, rtol=0)


def test_white_space_can_be_seen() -> None:
    assert [visible(token) for token in (" a", "\n", "\t", "")] == ["·a", "⏎", "⇥", "∅"]


def test_the_spread_says_its_means_and_has_a_table() -> None:
    plot = perturbation_spread([SpreadCurve(with_bos=True, position=1, before=[0, 1, 0.1, 0.3], after=[0, 1, 0.2, 0.4]),
                                SpreadCurve(with_bos=False, position=0, before=[1, 0.5, 0.5], after=[1, 0.7, 0.7])])
    assert "with <bos> later tokens change by 0.2 of their norm, 0.3 when quantized" in plot.alt
    assert "without <bos> later tokens change by 0.5 of their norm, 0.7 when quantized" in plot.alt
    assert plot.table[1:] == [["1", "0.1", "0.2", "0.5", "0.7"], ["2", "0.3", "0.4", "0.5", "0.7"]]


@pytest.fixture
def page(compared: Report, sink_map: SinkMap, plan: Plan, tmp_path: Path) -> Path:
    write(tmp_path, compared, sink_map, plan, sink_map)
    return tmp_path / "report.html"


def test_the_page_carries_the_comparison(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    found = Page(text)
    assert found.wrong == found.open == []
    assert "The sinks <changed>." in found.words
    assert 'class="lost">no<' in text
    assert "not judged" in found.words
    assert found.tags.count("svg") == 4
    assert found.words.count("As a table") == 5  # behind every picture, and behind the sample
    data = json.loads(re.search(r'id="attention-data">(.*?)</script>', text, re.DOTALL)[1])
    assert (data["layers"], data["heads"]) == (2, 3)
    assert len(text) < 3_000_000
    words = page.with_suffix(".md").read_text(encoding="utf-8")
    assert "## Sink fidelity of sink-aware\n\nThe sinks <changed>.\n\n| check |" in words
    assert "| rate | -0.4 | 0 | 0.02 | 0.05 | no |\n" in words


DRIVE = """<script>
const pick = (id, value) => { const c = document.getElementById("attention-" + id); c.value = value;
                              c.dispatchEvent(new Event("change")); };
const buttons = [...document.querySelectorAll("#attention .tokens button")];
const seen = {rest: document.getElementById("attention-words").textContent};
buttons[4].dispatchEvent(new Event("mouseenter"));
seen.hover = document.getElementById("attention-words").textContent;
buttons[4].dispatchEvent(new Event("mouseleave"));
buttons[5].click(); pick("side", "after"); pick("layer", "1"); pick("head", "2");
seen.held = document.getElementById("attention-words").textContent;
seen.shares = buttons.map((b) => +b.style.getPropertyValue("--share"));
seen.pressed = buttons.map((b) => b.getAttribute("aria-pressed"));
seen.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
seen.width = window.innerWidth;
document.body.dataset.seen = JSON.stringify(seen);
</script></body>"""


@pytest.mark.parametrize("browser", BROWSERS)
@pytest.mark.parametrize("width", [500, 1300])
def test_the_controls_work_in_a_browser(browser: str, width: int, page: Path, tmp_path: Path) -> None:
    driven = tmp_path / "driven.html"
    driven.write_text(page.read_text(encoding="utf-8").replace("</body>", DRIVE), encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
               f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},800", "--dump-dom", driven.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "CONSOLE" not in done.stderr
    seen = json.loads(re.search(r'data-seen="(.*?)">', done.stdout)[1].replace("&quot;", '"'))
    before, after = matrices(0).mean((0, 1)), matrices(1)[1, 2]
    top = int(before[4].argmax())
    token = ["<s>", "w20", ".", "w21", "w22", "w23"][top].replace("<s>", "&lt;s&gt;")
    assert seen["width"] == width
    assert seen["rest"].startswith("Share of all attention")
    assert f"“w22” at 4 reads {100 * float(before[4].max()):.0f} % “{token}” at {top}" in seen["hover"].replace(
        "<s>", "&lt;s&gt;")
    assert seen["held"].startswith("“w23” at 5 reads")
    assert seen["shares"] == pytest.approx([100 * float(share) for share in after[5]], abs=0.4)
    assert seen["pressed"] == ["false"] * 5 + ["true"]
    assert seen["wide"] <= 0  # nothing sticks out sideways
