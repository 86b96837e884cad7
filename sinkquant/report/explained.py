"""Explanation -> Markdown or JSON, and the cells of its tables."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from sinkquant.artifacts.base import write_atomically
from sinkquant.artifacts.explanation import Explanation, PartLoss
from sinkquant.report.kinds import require_kind, table_row

Cells = list[list[str]]
"""The first line names the columns."""
KINDS = (".md", ".json")
SHOWN = 8


def write_explanation(path: Path, found: Explanation) -> Path:
    """Write an explanation as what the file's name says: Markdown or JSON."""
    require_kind(path, KINDS)
    return found.save(path) if path.suffix == ".json" else write_atomically(path, markdown(found))


def markdown(found: Explanation) -> str:
    """Causes as a list, then the tables."""
    lines = [f"# Why {found.checkpoint} is not {found.model}", "", found.sentence, ""]
    for place, cause in enumerate(found.causes, start=1):
        lines.append(f"{place}. {cause.sentence} {cause.advice[:1].upper()}{cause.advice[1:]}."
                     + (f" `{options(cause.recipe)}`" if cause.recipe else "")
                     + (f" Verified: KL {cause.verified.kl:.3g}, {100 * cause.verified.removes:.0f} % less."
                        if cause.verified else ""))
    lines += ["", *(f"- {one.name}: {one.before} -> {one.after}" for one in found.settings),
              *([found.sinks_sentence] if found.sinks_sentence else []), *(f"- {note}." for note in found.notes)]
    for title, cells in shown_tables(found, True).items():
        lines += ["", f"## {title}", "", table_row(cells[0]), "|---" * len(cells[0]) + "|", *map(table_row, cells[1:])]
    return "\n".join(lines) + "\n"


def options(recipe: Sequence[str]) -> str:
    """Assignments as options for a shell, and for readers: YAML knows both kinds of quotes, a shell nests none."""
    return " ".join(f"--set {shlex.quote(one.replace(chr(39), chr(34)))}" for one in recipe)


def shown_tables(found: Explanation, full: bool) -> dict[str, Cells]:
    """Title -> cells, of what was found at all; the first lines, or all with `full`."""
    most = None if full else SHOWN
    tables = {"Modules": _parts(found.modules, most), "Layers": _parts(found.layers, most),
              "Roles": _parts(found.roles, most),
              "KL by position": [["positions", "KL, nats per token"], *(
                  [str(one.first) if one.first == one.last else f"{one.first}-{one.last}", f"{one.kl:.3g}"]
                  for one in found.positions)],
              "Tokens with the largest KL": [["row", "position", "behind", "KL"], *(
                  [str(one.row), str(one.position), repr(f"{one.before}[{one.text}]"), f"{one.kl:.3g}"]
                  for one in found.tokens[:most])],
              "Heads whose attention on the sinks changed": [["head", "before", "after"], *(
                  [f"layer {one.layer} head {one.head}", f"{one.before:.3f}", f"{one.after:.3f}"]
                  for one in found.heads)],
              "Massive channels, largest |h|": [["channel", "at its peak, before", "after"], *(
                  [f"{one.channel} after block {(peak := one.before.index(max(one.before)))}",
                   f"{one.before[peak]:.4g}", f"{one.after[peak]:.4g}"] for one in found.massive)]}
    return {title: cells for title, cells in tables.items() if len(cells) > 1}


def _parts(parts: Sequence[PartLoss], most: int | None) -> Cells:
    total = sum(one.first_order for one in parts) or 1.0
    return [["part", "share, first order", "removed by putting it back", "relative error of the weights"], *(
        [one.name, f"{100 * one.first_order / total:.1f} %",
         "" if one.removes is None else f"{100 * one.removes:.1f} %", f"{one.error:.3g}"] for one in parts[:most])]
