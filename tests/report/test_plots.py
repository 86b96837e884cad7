"""Pictures show what the artifacts hold, in numbers and in words."""

from __future__ import annotations

import pytest

from sinkquant.artifacts.report import PositionLoss
from sinkquant.report.dots import Axis, Dot, Dots
from sinkquant.report.kinds import table_row
from sinkquant.report.plots import accuracy_dots, all_plots, bits_per_module, differences, label
from sinkquant.report.sink_plots import massive_along_depth, sink_heatmap


def test_every_plot_says_what_it_shows(report, sink_map, plan):
    plots = all_plots(report, sink_map, plan, None)
    assert list(plots) == ["accuracy", "worth", "sinks", "bits", "massive"]
    assert "sink-aware 0.250 ± 0.02; control 0.500 ± 0.02" in plots["accuracy"].alt
    assert "everything 0.25 (0.1 to 0.4)" in plots["worth"].alt
    assert "mean 0.55, largest 0.90. 2 no-op heads (crosses)." in plots["sinks"].alt
    assert "Channel 5 reaches 700, 90 times the median; it is born in layers.0.mlp and lasts to the end" in (
        plots["massive"].alt)
    assert plots["bits"].alt == "Linears by bits: 2 at 4 bits, 1 at 8 bits, 1 at 16 bits."


def test_the_heat_map_says_how_far_heads_moved(sink_map):
    moved = sink_map.model_copy(deep=True)
    moved.heads[1][0].sink_score = 0.65
    assert "moves no head by more than 0.250" in sink_heatmap(sink_map, moved).alt
    assert sink_heatmap(sink_map, moved).svg.count("<svg") == 1


def test_a_report_without_divergence_has_no_picture_of_it(report, sink_map, plan):
    rows = [row.model_copy(update={"tasks": {}}) for row in report.rows]
    bare = report.model_copy(update={"rows": rows, "paired": []})
    assert list(all_plots(bare, sink_map, plan, None)) == ["sinks", "bits", "massive"]


def test_divergence_by_position_is_drawn_where_it_was_measured(report, sink_map, plan):
    bins = [PositionLoss(first=0, last=0, kl=0.5), PositionLoss(first=1, last=3, kl=0.25)]
    rows = [row.model_copy(update={"kl_by_position": bins if row.name != "unquantized" else []}) for row in report.rows]
    plot = all_plots(report.model_copy(update={"rows": rows}), sink_map, plan, None)["positions"]
    assert plot.table == [["model", "0", "1-3"], ["sink-aware", "0.5", "0.25"], ["control", "0.5", "0.25"]]


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (100, 64)])
def test_any_shape_of_model_is_drawn_in_a_small_file(layers, heads, sink_map, plan):
    head = sink_map.heads[0][0]
    one = sink_map.model_copy(update={"heads": [[head] * heads] * layers})
    modules = {f"model.layers.{i}.{kind}": next(iter(plan.modules.values()))
               for i in range(layers) for kind in ("self_attn.q_proj", "mlp.up_proj")}
    for plot in (sink_heatmap(one, one), bits_per_module(plan.model_copy(update={"modules": modules}))):
        assert plot.svg.startswith("<svg viewBox=")
        assert len(plot.svg) < 1_500_000


def test_every_row_says_what_it_weighs_and_stands_beside_its_control(report):
    packed = report.rows[1].model_copy(update={"kv_bits": 4.0, "kv_bytes": 5_000_000, "weight_bytes": 4_678_472})
    rows = [packed.model_copy(update={"name": "cache"}), report.rows[2], packed, report.rows[0]]
    dots = accuracy_dots(rows)
    assert [dot.name for dot in dots] == ["unquantized", "sink-aware", "control", "cache"]
    assert dots[0].cells == ["0.004 MB", "4.50", "20 MB"]  # 16 bits for 4
    assert dots[1].cells == ["4.68 MB", "4.50", "5 MB"]
    assert (dots[0].value, dots[1].value) == (None, 0.25)
    assert dots[1].high - dots[1].value == pytest.approx(1.96 * 0.01)


def test_only_what_has_a_control_is_worth_something(report):
    assert [dot.name for dot in differences(report.paired).dots] == ["everything"]
    assert differences(report.paired[1:]) is None


@pytest.mark.parametrize("values", [[0.004, 0.008], [0.001, 5.0], [-1.0, 2.0], [0.0], [3.0, 3.0]])
def test_an_axis_holds_what_it_shows_in_its_order(values):
    axis = Axis.of(values, [value - 0.0001 for value in values])
    places = [axis.place(value) for value in sorted(values)]
    assert places == sorted(places)
    assert 0 < places[0] <= places[-1] < 100
    assert axis.logarithmic == (values == [0.001, 5.0])
    ticks = axis.ticks(6)
    assert 2 <= len(ticks) <= 9
    assert all(axis.place(float(text)) == at for at, text in ticks)


def test_differences_keep_their_zero():
    dots = Dots("", [], "", [Dot("a", [], 0.001, 0.0, 0.002, ""), Dot("b", [], 5.0, 4.0, 6.0, "")], linear=True)
    assert not dots.axis.logarithmic
    assert dots.axis.low == 0.0


def test_a_model_without_massive_activations(sink_map):
    plot = massive_along_depth(sink_map.model_copy(update={"channels": []}), None)
    assert plot.alt == "No massive activation was found."


def test_a_channel_that_is_massive_no_more_is_named(sink_map):
    after = sink_map.model_copy(update={"channels": []})
    assert "Quantized, channel 5 is massive no more." in massive_along_depth(sink_map, after).alt
    assert "massive no more" not in massive_along_depth(sink_map, sink_map).alt


def test_linears_with_the_same_bits_share_a_line(plan):
    one = next(iter(plan.modules.values()))
    modules = {f"layers.{i}.{kind}": one for i in range(2) for kind in ("self_attn.q_proj", "mlp.up_proj")}
    table = bits_per_module(plan.model_copy(update={"modules": modules})).table
    assert table == [["linear", "block 0", "block 1"], ["self_attn.q_proj", "4", "4"], ["mlp.up_proj", "4", "4"]]


def test_names_of_folders_are_shown_as_they_are() -> None:
    assert label("w4") == "w4"
    assert label("_w4") == "\u200b_w4"
    assert label("cost $x_{ $") == r"cost \$x_{ \$"


def test_a_bar_in_a_cell_is_no_new_cell() -> None:
    assert table_row(["a|b", "c"]) == r"| a\|b | c |"
