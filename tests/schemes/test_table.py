"""The engine table: what its conditions say, what a processor lacks, and that the page shows what plans read."""

from __future__ import annotations

from pathlib import Path

import pytest

from sinkquant.schemes import Loads, WeightFormat, scheme_of
from sinkquant.schemes.loads import KV_SCALES, READ_KV_SCALES, reads_kv_scales
from sinkquant.schemes.registry import SCHEMES
from sinkquant.schemes.table import instructions_asked, out_of_reach

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "engines.md"
HEAD = ("| weights | engine | formats | hardware | known | to know |", "|---|---|---|---|---|---|")


def engine_table() -> list[str]:
    """Markdown lines: a row for every scheme and engine; schemes that the same engines load share theirs."""
    rows: dict[Loads, list[str]] = {}
    for said, loads in (*((scheme.words, scheme.loads) for scheme in SCHEMES), (KV_SCALES, READ_KV_SCALES)):
        for row in loads:
            words = rows.setdefault(row, [])
            words += [said] if said not in words else []
    return [*HEAD, *(f"| {', '.join(words)} | {f'{row.engine} {row.since}'.strip()} | {row.conditions() or 'all'} | "
                     f"{row.hardware} | {row.known}: {row.place} | {row.caveat} |" for row, words in rows.items())]


def test_the_page_shows_the_rows() -> None:
    text = PAGE.read_text(encoding="utf-8")
    shown = text.partition("<!-- ENGINES -->\n")[2].partition("\n<!-- /ENGINES -->")[0]
    assert shown.splitlines() == engine_table()


@pytest.mark.parametrize(("form", "engines"), [
    (WeightFormat(4, 64), {"transformers", "vllm", "vllm-cuda", "vllm-cpu"}),
    (WeightFormat(3, 64), {"transformers", "vllm-cuda"}), (WeightFormat(3, 16), {"transformers"}),
    (WeightFormat(8, -1), {"transformers", "vllm", "vllm-cuda"}),
    (WeightFormat(8, -1, inputs="int8", input_scale="token"),
     {"transformers", "vllm", "vllm-cuda", "vllm-cpu"}),
    (WeightFormat(4, 64, inputs="int8", input_scale="token"), {"transformers", "vllm-cuda"}),
    (WeightFormat(7, -1, inputs="int8", input_scale="token", storage="int-quantized"),
     {"transformers", "vllm", "vllm-cpu"}),
    (WeightFormat(8, -1, inputs="int8", input_scale="token", storage="int-quantized"), {"transformers", "vllm"}),
    (WeightFormat(8, -1, storage="int-quantized"), {"transformers"})])
def test_who_loads_integers(form: WeightFormat, engines: set[str]) -> None:
    assert {row.engine for row in scheme_of(form).loads if row.takes(form)} == engines


def test_conditions_in_words() -> None:
    row = Loads("e", "CPU", "", "read", "p", frozenset({2, 3, 4, 5}), frozenset({-1, 32}), frozenset({"int8"}))
    assert row.conditions() == "2 to 5 bits, groups of 32 or per channel, int8 inputs"
    assert Loads("e", "any", "", "read", "p").conditions() == ""
    assert row.names == ("e", "e-cpu")
    assert "e" in Loads("e with f", "any", "", "read", "p").names
    assert "e-cuda" in Loads("e", "CUDA, SM75", "", "read", "p").names


def test_who_reads_the_scales_of_keys_and_values() -> None:
    assert all(map(reads_kv_scales, ("transformers", "transformers with bitsandbytes", "vllm-cuda", "vllm-cpu")))
    assert not any(map(reads_kv_scales, ("llama.cpp", "optimum.quanto", "gptqmodel")))


def test_what_a_processor_lacks() -> None:
    assert instructions_asked() == ["AVX-512", "VNNI"]
    assert out_of_reach(frozenset(instructions_asked())) == []
    (one,) = out_of_reach(frozenset({"AVX-512"}))
    assert "needs VNNI for integer weights (8 bits, per channel, int8 inputs), which this processor lacks" in one


def test_stored_scales_of_inputs_beside_packed_codes_run_nowhere_in_vllm() -> None:
    for form in (WeightFormat(4, 128, inputs="int8", input_scale="tensor"),
                 WeightFormat(8, 128, inputs="int8", input_scale="tensor")):
        assert not any(one.takes(form) for one in scheme_of(form).loads if one.engine.startswith("vllm"))
    form = WeightFormat(4, 128, inputs="int8", input_scale="token")
    assert any(one.takes(form) for one in scheme_of(form).loads if "vllm-cuda" in one.names)
