"""A hash of what every recipe writes, so that a change of the code that should not change a checkpoint is seen not to.

    python evals/benchmarks/same_bytes.py --sink-maps DIR > before.txt
    python evals/benchmarks/same_bytes.py --sink-maps DIR --compare before.txt

One line `model recipe sha256` for every packaged recipe, and for a few recipes more that take other paths, on the
bundled model and on tiny models of five families with a planted sink: little calibration, no evaluation. The hash is
over the checkpoint's files of weights and what config.json says of quantization. A recipe that does not go with
a model gives the sentence that refuses it in place of the hash. `--sink-maps` keeps the sink map of every model, and
reads it where it is there, so that changes of detection do not count. With `--compare`, lines that differ are listed at
the end and the exit code is 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers

import sinkquant as sq
from sinkquant.recipe import recipe_names

DEMO = "demo"
FAMILIES = ("llama", "gemma3_text", "qwen3_moe", "gpt2", "phi3")
MIXTURES = ("qwen3_moe",)
"""Random as they are: no sink is planted into experts."""
QUICK = ["evaluate.skip=true", "calibration.rows=4", "calibration.length=48", "detect.rows=8", "detect.long_rows=1",
         "detect.super_weights=false", "sensitivity.rows=2", "sensitivity.length=32"]
"""Every code path, on as little text as will do."""
MORE = {
    "gptaq": ("w3a16-sink", ["weights.method=gptaq"]),
    "tune": ("w2a16-sink", ["weights.method=rtn", "weights.tune=16"]),
    "distill": ("w2a16-sink", ["weights.method=rtn", "weights.distill=8"]),
    "split": ("w3a16-sink", ["protect.channels=split", "protect.max_share=0.3"]),
    "split-gptaq": ("w3a16-sink", ["protect.channels=split", "protect.max_share=0.3", "weights.method=gptaq"]),
    "module": ("w3a16-sink", ["protect.channels=module", "protect.max_share=0.3"]),
    "scale": ("w3a16-sink", ["protect.channels=scale"]),
    "rotate": ("w3a16-sink", ["weights.rotate=full"]),
    "wanda": ("w4-24-sink", ["prune.method=wanda"]),
    "budget-even": ("w3a16-sink", ["budget.bits=4.6"]),
    "int4-inputs": ("w4a16-sink", ["activations.format=int4", "activations.scale=tensor"]),
    "fp8-static": ("fp8-sink", ["activations.scale=tensor"]),
    "fp4-double": ("nf4-sink", ["weights.format=fp4", "weights.double_quantization=true", "protect.channels=none"]),
    "gptq-rtn": ("gptq-w4-sink", ["weights.method=rtn", "weights.bits=3"]),
    "kv-prefix": ("w4-kv2-sink", ["kv_cache.prefix=bos", "protect.statistics=exclude"]),
}
"""Recipes beside the packaged ones: name -> the recipe that it starts from, and what is set in it."""


def main() -> None:
    """Print the lines; with `--compare` those that differ as well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[DEMO, *FAMILIES], choices=[DEMO, *FAMILIES])
    parser.add_argument("--recipes", nargs="+", default=[*recipe_names(), *MORE], choices=[*recipe_names(), *MORE])
    parser.add_argument("--sink-maps", type=Path, help="folder of sink maps, written where they are not there")
    parser.add_argument("--compare", type=Path, help="lines that were printed before")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # sums over several threads are added up in another order
    lines = []
    with tempfile.TemporaryDirectory() as scratch:
        for model in arguments.models:
            for line in hashes(model, arguments.recipes, Path(scratch), arguments.sink_maps):
                print(line, flush=True)
                lines.append(line)
    if arguments.compare and (differing := differences(arguments.compare.read_text().splitlines(), lines)):
        print(f"{len(differing)} lines differ:", *differing, sep="\n", file=sys.stderr)
        sys.exit(1)


def hashes(model: str, recipes: list[str], scratch: Path, maps: Path | None) -> Iterator[str]:
    """One line per recipe."""
    folder, text = (model, []) if model == DEMO else tiny(model, scratch)
    sink_map = sink_map_of(model, folder, text, maps or scratch)
    for name in recipes:
        base, more = MORE.get(name, (name, []))
        try:
            recipe = sq.Recipe.load(base).replace([*QUICK, *text, *more, *quicker(sq.Recipe.load(base), model)])
            sq.run(recipe, folder, scratch / "run", sink_map=sink_map)
            found = fingerprint(scratch / "run" / "model")
        except sq.RequestError as refusal:
            found = str(refusal).replace(str(scratch), "")
        shutil.rmtree(scratch / "run", ignore_errors=True)
        yield f"{model} {name} {found}"


def quicker(recipe: sq.Recipe, model: str) -> list[str]:
    """Fewer steps of tuning the whole model, where the recipe does that; fewer formats to try, where it solves for a
    budget; groups that a tiny model has."""
    found = ["weights.distill=8"] if recipe.weights.distill else []
    found += ["sensitivity.bits=[3, 4]"] if recipe.budget.solved else []
    if model != DEMO and recipe.backend != "bitsandbytes" and recipe.weights.group_size == 64:
        found += ["weights.group_size=32", *(["budget.bits=4"] if recipe.budget.bits else [])]
    return found


def tiny(family: str, scratch: Path) -> tuple[str, list[str]]:
    """The folder of a tiny model with its tokenizer, and the settings that name a text which it knows."""
    sys.path.append(str(Path(__file__).parents[2] / "tests"))
    from families import tiny_model
    from planter import Plant, plant
    from tiny_tokenizer import random_text, tiny_tokenizer

    folder, text = scratch / family, scratch / "words.txt"
    model = tiny_model(family)
    if family not in MIXTURES:
        token, position = (None, 0) if family == "gpt2" else (1, None)  # which learns its positions
        plant(model, Plant(token, position, heads=frozenset({0, 1}), channel=20, birth=0))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    text.write_text(random_text(), encoding="utf-8")
    return str(folder), [f"calibration.text={text}"]


def sink_map_of(model: str, folder: str, text: list[str], maps: Path) -> sq.SinkMap:
    """The sinks of a model: those that were found before, where they are kept."""
    path = maps / f"{model}.json"
    if not path.is_file():
        maps.mkdir(parents=True, exist_ok=True)
        loaded, tokenizer = sq.load(folder, dtype=torch.float32)
        sq.detect(loaded, tokenizer, recipe=sq.Recipe().replace([*QUICK, *text]), name=model).save(path)
    return sq.SinkMap.load(path)


def fingerprint(checkpoint: Path) -> str:
    """sha256 over the files of weights of a checkpoint, by name, and over what config.json says of quantization."""
    settings = json.loads((checkpoint / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    made = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in sorted([*checkpoint.rglob("*.safetensors"), *checkpoint.rglob("*.gguf")]):
        made.update(str(path.relative_to(checkpoint)).encode())
        made.update(path.read_bytes())
    return made.hexdigest()


def differences(before: list[str], after: list[str]) -> list[str]:
    """Lines that are not the same, of the models and recipes that both have."""
    known = {tuple(line.split(" ", 2)[:2]): line for line in before}
    found = []
    for line in after:
        old = known.get(tuple(line.split(" ", 2)[:2]))
        if old is not None and old != line:
            found += [f"- {old}", f"+ {line}"]
    return found


if __name__ == "__main__":
    main()
