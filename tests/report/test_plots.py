"""Pictures show what the artifacts hold, in numbers and in words."""

from __future__ import annotations

import pytest

from sinkquant.report.plots import (
    accuracy_against_bytes,
    accuracy_points,
    all_plots,
    bits_per_module,
    massive_along_depth,
    sink_heatmap,
)


def test_every_plot_says_what_it_shows(report, sink_map, plan):
    plots = all_plots(report, sink_map, plan, None)
    assert list(plots) == ["accuracy", "sinks", "massive", "bits"]
    assert "sink-aware 0.25 at 0.00 MB" in plots["accuracy"].alt
    assert "mean 0.55, largest 0.90. 2 no-op heads (crosses)." in plots["sinks"].alt
    assert "Channel 5 reaches 700, 90 times the median; it is born in layers.0.mlp and lasts to the end" in (
        plots["massive"].alt)
    assert plots["bits"].alt == "Linears by bits: 2 at 4 bits, 1 at 8 bits, 1 at 16 bits."


def test_the_heat_map_says_how_far_heads_moved(sink_map):
    moved = sink_map.model_copy(deep=True)
    moved.heads[1][0].sink_score = 0.65
    assert "moves no head by more than 0.250" in sink_heatmap(sink_map, moved).alt
    assert sink_heatmap(sink_map, moved).svg.count("<svg") == 1


def test_a_report_without_divergence_has_no_picture_of_it(report):
    rows = [row.model_copy(update={"tasks": {}}) for row in report.rows]
    assert accuracy_points(report.model_copy(update={"rows": rows})) == {}
    assert set(accuracy_points(report)) == {"KL divergence, nats per token", "byte perplexity"}


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (100, 64)])
def test_any_shape_of_model_is_drawn_in_a_small_file(layers, heads, sink_map, plan):
    head = sink_map.heads[0][0]
    one = sink_map.model_copy(update={"heads": [[head] * heads] * layers})
    modules = {f"model.layers.{i}.{kind}": next(iter(plan.modules.values()))
               for i in range(layers) for kind in ("self_attn.q_proj", "mlp.up_proj")}
    for plot in (sink_heatmap(one, one), bits_per_module(plan.model_copy(update={"modules": modules}))):
        assert plot.svg.startswith("<svg viewBox=")
        assert len(plot.svg) < 1_500_000


def test_rows_of_one_size_do_not_hide_each_other(report):
    svg = accuracy_against_bytes(accuracy_points(report)).svg
    places = {line for line in svg.splitlines() if "<use" in line}
    assert len(places) >= 2 * len(report.rows)


def test_a_model_without_massive_activations(sink_map):
    plot = massive_along_depth(sink_map.model_copy(update={"channels": []}), None)
    assert plot.alt == "No massive activation was found."
