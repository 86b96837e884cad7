"""Commands that look at a model: its sinks, what they do for it, its tokenization; and one without idle heads."""

from __future__ import annotations

import shlex
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from sinkquant.artifacts import SinkMap
from sinkquant.artifacts.base import write_atomically
from sinkquant.cli.paper import paragraph, table
from sinkquant.cli.parts import (
    FullOption,
    JsonOption,
    ModelArgument,
    RecipeOption,
    SetOption,
    SinkMapOption,
    TextOption,
    TrustOption,
    find_sinks,
    for_text,
    not_unicode,
    printed,
    shown_progress,
    to_file,
    writable,
)
from sinkquant.cli.show import show_sink_map
from sinkquant.errors import RequestError
from sinkquant.models import resolve
from sinkquant.models.folder import inside_run
from sinkquant.recipe import DEFAULT_RECIPE, Recipe


def detect(model: ModelArgument, text: TextOption = None, assignments: SetOption = None, json: JsonOption = False,
           full: FullOption = False,
           output: Annotated[Path | None, to_file("Write the sink map here.")] = None,
           trust_remote_code: TrustOption = False) -> None:
    """Find sink tokens, heads, channels and super weights."""
    sink_map = find_sinks(inside_run(model), text, Recipe().replace(assignments or []), trust_remote_code,
                          quantized=True)
    if not printed(sink_map, json, output):
        show_sink_map(sink_map, full)


def diagnose(models: Annotated[list[str], typer.Argument(help="A model folder, a hub id, or 'demo'; several to "
                                                              "compare.")],
             against: Annotated[str | None, typer.Option(help="A quantized version, to be compared with it.")] = None,
             text: TextOption = None, assignments: SetOption = None, json: JsonOption = False,
             sink_map: SinkMapOption = None,
             output: Annotated[Path | None, to_file("Write the diagnosis here.")] = None,
             depth_plot: Annotated[Path | None, to_file("Write a page here that draws the depth at which tokens "
                                                        "settle.", "--depth-plot")] = None,
             trust_remote_code: TrustOption = False) -> None:
    """What the sinks do for a model: over-mixing, spread, robustness, each beside its null; sink fidelity."""
    recipe = Recipe().replace(assignments or [])
    if len(models) > 1 and (output or against or sink_map or depth_plot):
        raise RequestError("-o, --against, --sink-map and --depth-plot are for one model; name one.")
    folders = [resolve(inside_run(model)) for model in models]
    known = SinkMap.load(sink_map) if sink_map else None
    from sinkquant.cli.tables.diagnosis import scale_table, tables
    from sinkquant.compare.checkpoint import open_checkpoints
    from sinkquant.diagnose import diagnose as examine
    from sinkquant.models import load_tokenizer, read_text
    from sinkquant.run.candidates import loader

    (other,) = open_checkpoints([against]) if against else (None,)
    tokenizers = [load_tokenizer(folder, trust_remote_code) for folder in folders]
    for tokenizer in tokenizers:
        read_text(text, "evaluation", tokenizer)
    found = []
    with shown_progress() as progress:
        for name, folder, tokenizer in zip(models, folders, tokenizers, strict=True):
            quantized = other.load("auto", "cpu", trust_remote_code) if other else None
            loaded = loader(folder, "auto", "cpu", trust_remote_code)()
            found.append(examine(loaded, tokenizer, text, recipe, name, known, against=quantized,
                                 against_name=against or "", kept=other.kept if other else None, progress=progress))
            del loaded, quantized  # before the next ones are loaded
    if output:
        found[0].save(output)
    if depth_plot and found[0].depth is not None:
        from sinkquant.report.depth import page  # matplotlib

        write_atomically(depth_plot, page(found[0].depth, models[0]))
    if json:
        texts = [one.to_json(not_unicode()) for one in found]
        print(texts[0] if len(texts) == 1 else f"[{','.join(texts)}]")
        return
    for one in found:
        for shown in tables(one):
            table(shown)
        for note in dict.fromkeys([*one.notes, *(one.against.notes if one.against else [])]):
            paragraph(f"Note: {note}")
    if len(found) > 1:
        table(scale_table(found))


def cut(model: ModelArgument,
        output: Annotated[Path, typer.Option("-o", "--output", help="The smaller model's folder; must not exist yet.")],
        sink_map: Annotated[Path | None, typer.Option(help="A sink map made with prune.heads=no-op; default: detect "
                                                           "now.")] = None,
        assignments: SetOption = None, text: TextOption = None, trust_remote_code: TrustOption = False) -> None:
    """Write a model without the heads that do nothing, in smaller shapes that plain transformers loads."""
    recipe = Recipe().changed(prune={"heads": "no-op"}).replace(assignments or [])
    folder = resolve(model)
    from sinkquant.formats import require_free
    from sinkquant.heads.cut import cut_heads, require_cuttable
    from sinkquant.models import load_tokenizer, open_model

    require_free(output)
    loaded = open_model(folder, trust_remote_code=trust_remote_code)
    require_cuttable(loaded)
    found = SinkMap.load(sink_map) if sink_map else find_sinks(model, text, recipe, trust_remote_code)
    kept = cut_heads(loaded, load_tokenizer(folder, trust_remote_code), found, output, recipe)
    paragraph(f"{len(kept[0])} of {found.model.kv_heads} key-value heads are left in every layer: {output}")


def imatrix(model: ModelArgument,
            output: Annotated[Path, typer.Option("-o", "--output", callback=writable,
                                                 help="The file to write, as imatrix.gguf.")],
            recipe: RecipeOption = DEFAULT_RECIPE, assignments: SetOption = None, text: TextOption = None,
            sink_map: SinkMapOption = None, trust_remote_code: TrustOption = False) -> None:
    """Write an importance matrix with the sinks' weight, for llama.cpp's llama-quantize --imatrix."""
    chosen, folder = Recipe.load(recipe).replace(assignments or []), resolve(model)
    chosen = for_text(chosen, text)
    from sinkquant.imatrix import imatrix as write
    from sinkquant.imatrix.imatrix import check_imatrix
    from sinkquant.models import ActivationStore, Decoder, load_tokenizer, open_model
    from sinkquant.policy.headers import FOR_SINKS
    from sinkquant.predict import spill_limit

    loaded, tokenizer = open_model(folder, trust_remote_code=trust_remote_code), load_tokenizer(folder,
                                                                                               trust_remote_code)
    check_imatrix(Decoder.of(loaded), output)
    known = SinkMap.load(sink_map) if sink_map else None
    if known is None and chosen.statistics in FOR_SINKS:
        known = find_sinks(model, text, chosen, trust_remote_code)
    store = ActivationStore(Path(tempfile.gettempdir()), spill_limit(chosen))
    with shown_progress() as progress:
        found = write(loaded, tokenizer, output, known, chosen, store, progress)
    paragraph(f"The inputs of {len(found)} tensors: {output}. Use it as llama-quantize --imatrix "
              f"{shlex.quote(str(output))}.")
    if chosen.statistics in FOR_SINKS:
        paragraph("For types below 4 bits make one with --set protect.tokens=false: there the sinks' weight was "
                  "measured to lose.")


def doctor(model: ModelArgument, text: TextOption = None, trust_remote_code: TrustOption = False) -> None:
    """Audit the tokenization, and say what of a model is supported. A run's folder stands for its checkpoint."""
    folder = resolve(inside_run(model))
    from sinkquant.doctor import examine
    from sinkquant.formats import open_any
    from sinkquant.models import load_tokenizer

    audit = examine(open_any(folder, trust_remote_code),
                    load_tokenizer(folder, trust_remote_code), text)
    for title, facts in (("Tokenization", audit.tokenization), ("Support", audit.support)):
        shown = Table(title=title, show_header=False, title_justify="left")
        for key, value in facts.items():
            shown.add_row(escape(key), escape(value))
        table(shown)
    for warning in audit.warnings:
        paragraph(f"warning: {warning}")
    paragraph(audit.sentence())
