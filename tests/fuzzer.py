"""Broken and odd inputs by the thousand: whatever reads a user's file or value either does, or says why not in a
sentence. Everything else that is raised is a crash.

    PYTHONPATH=tests python tests/fuzzer.py --minutes 15 [--seed 0] [--only recipes]

prints inputs, refusals and crashes for every target, and how to see a crash again. `test_fuzz.py` runs the first few
inputs of every target.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from families import tiny_model
from gguf_files import write_gguf
from sinkmaps import sink_map_of
from tiny_tokenizer import random_text, tiny_tokenizer

from sinkquant.artifacts import Plan, SinkMap
from sinkquant.errors import SinkquantError
from sinkquant.models import Decoder, load_tokenizer, open_model, read_text, resolve, token_rows
from sinkquant.models.progress import no_progress_bars
from sinkquant.policy import make_plan
from sinkquant.policy.edited import accept_edited
from sinkquant.recipe import Recipe, recipe_names
from sinkquant.resources import recipe_folder

ODD: list[Any] = [None, True, -1, 0, 1, 2, 3, 64, 1e308, float("nan"), 1 << 70, -0.5, "", "x", "-1", "none", "é\u2028",
                  "a" * 5000, "../x", "*", "re:(", "hub:", "-", "~", "{}", [], [[]], [1, "x"], {}, {"x": {}}, ["*"],
                  "int8", "16-bit", "gptq", "2:4", 2.5]
"""Values that stand where something else was meant."""
PIECES = [b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"PAR1", b"\x1f\x8b", b"[", b"{", b'{"text": "w9 w10"}\n', b"\r\n",
          b"w9 w17 . " * 40, b'{"messages": [{"role": "user"}]}\n', b'{"text": null}\n', b"[1, 2]\n", b"<|doc|>\n",
          b'"w9"\n', b"a,b\n1,2\n", "\u2028\u0085é\U0001f600".encode(), b"\xc3", b"NaN", b'{"a": [' * 50]
Target = Callable[[random.Random, "Fixtures"], None]


@dataclass(frozen=True)
class Fixtures:
    """What inputs are made from: `folder`, a whole model; `gguf`, a file; `decoder`; `scratch`, free to be filled."""

    folder: Path
    gguf: Path
    text: Path
    decoder: Decoder
    sink_map: SinkMap
    scratch: Path

    @classmethod
    def make(cls, place: Path) -> Fixtures:
        """Everything in a folder that is there."""
        folder = place / "model"
        model = tiny_model("llama")
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        write_gguf(place / "model.gguf")
        (place / "text.txt").write_text(random_text(2000), encoding="utf-8")
        (place / "scratch").mkdir()
        decoder = Decoder.of(model)
        return cls(folder, place / "model.gguf", place / "text.txt", decoder, sink_map_of(decoder), place / "scratch")

    def copy(self) -> Path:
        """The model's folder once more, free to be broken."""
        target = self.scratch / "model"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(self.folder, target)
        return target


def odd_json(rng: random.Random, value: Any) -> Any:
    """JSON with one to three places changed: another value, one that is gone, one more."""
    root = {"": json.loads(json.dumps(value))}
    for _ in range(rng.randint(1, 3)):
        holder: Any = root
        key: Any = ""
        while isinstance(holder[key], dict | list) and holder[key] and rng.random() < 0.8:
            holder = holder[key]
            key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
        action = rng.random()
        if action < 0.7 or holder is root:
            holder[key] = rng.choice(ODD)
        elif action < 0.85:
            del holder[key]
        elif isinstance(holder, dict):
            holder[rng.choice(["x", "bits", "text", "model_type", "group_size"])] = rng.choice(ODD)
        else:
            holder.append(rng.choice([*ODD, holder[0]]))
        if "" not in root or not isinstance(root[""], dict | list):
            break
    return root.get("")


def odd_bytes(rng: random.Random, content: bytes, front: int = 1 << 30) -> bytes:
    """Bytes with one to four places changed, near the front: flipped, cut off, put in, repeated."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(min(len(data), front) + 1)
        action = rng.randrange(6)
        if action == 0 and data:
            data[min(place, len(data) - 1)] = rng.randrange(256)
        elif action == 1:
            del data[place:]
        elif action == 2:
            data[place:place] = rng.choice(PIECES)
        elif action == 3:
            del data[place:place + rng.choice((1, 2, 8, 100))]
        elif action == 4:
            data[place:place] = data[place:place + rng.choice((1, 8, 64))]
        else:
            data[place:place + 8] = rng.choice((0, 1, 1 << 31, (1 << 64) - 1, (1 << 63) - 1)).to_bytes(8, "little")
    return bytes(data)


def recipes(rng: random.Random, given: Fixtures) -> None:
    """Values of a recipe, by assignment and by file; what is accepted becomes a plan."""
    recipe = Recipe.load(rng.choice(recipe_names()))
    if rng.random() < 0.5:
        path = given.scratch / "recipe.yaml"
        named = yaml.safe_load((recipe_folder() / f"{rng.choice(recipe_names())}.yaml").read_text(encoding="utf-8"))
        text = yaml.safe_dump(odd_json(rng, named)).encode()
        path.write_bytes(odd_bytes(rng, text) if rng.random() < 0.3 else text)
        recipe = Recipe.load(path)
    else:
        whole = recipe.model_dump(mode="json")
        section = rng.choice(list(whole))
        inner = whole[section]
        key = f"{section}.{rng.choice(list(inner))}" if isinstance(inner, dict) and inner else section
        value = rng.choice(ODD)
        recipe = recipe.replace([f"{key}={value if isinstance(value, str) else json.dumps(value)}"])
    assert Recipe.parse(yaml.safe_load(recipe.to_yaml())) == recipe
    plan = make_plan(given.decoder.shape("tiny"), given.sink_map, recipe)
    Plan.parse(json.loads(plan.to_json()), "the plan")


def plans(rng: random.Random, given: Fixtures) -> None:
    """An edited plan, and a sink map that was written to."""
    recipe = Recipe().replace(["weights.group_size=32"])
    shape = given.decoder.shape("tiny")
    path = given.scratch / "artifact.json"
    if rng.random() < 0.5:
        plan = make_plan(shape, given.sink_map, recipe)
        path.write_text(json.dumps(odd_json(rng, json.loads(plan.to_json()))), encoding="utf-8")
        accept_edited(Plan.load(path), shape)
    else:
        path.write_text(json.dumps(odd_json(rng, json.loads(given.sink_map.to_json()))), encoding="utf-8")
        make_plan(shape, SinkMap.load(path), recipe)


def artifacts(rng: random.Random, given: Fixtures) -> None:
    """The bytes of a sink map."""
    path = given.scratch / "map.json"
    path.write_bytes(odd_bytes(rng, given.sink_map.to_json().encode()))
    SinkMap.load(path)


def weights(rng: random.Random, given: Fixtures) -> None:
    """The header of a safetensors file, and its JSON."""
    folder = given.copy()
    path = folder / "model.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    if rng.random() < 0.5:
        header = json.dumps(odd_json(rng, json.loads(content[8:8 + size]))).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size:])
    else:
        path.write_bytes(odd_bytes(rng, content, size))
    opened(folder)


def configurations(rng: random.Random, given: Fixtures) -> None:
    """config.json, and the indices and settings that stand beside it."""
    folder = given.copy()
    path = folder / "config.json"
    content = path.read_text(encoding="utf-8")
    if rng.random() < 0.8:
        path.write_text(json.dumps(odd_json(rng, json.loads(content))), encoding="utf-8")
    else:
        path.write_bytes(odd_bytes(rng, content.encode()))
    opened(folder)


def files(rng: random.Random, given: Fixtures) -> None:
    """Files that are missing, empty, folders, of another name, or one too many."""
    folder = given.copy()
    for _ in range(rng.randint(1, 2)):
        path = rng.choice(sorted(folder.iterdir()))
        action = rng.randrange(5)
        if path.is_dir():
            shutil.rmtree(path)
        elif action == 0:
            path.unlink()
        elif action == 1:
            path.write_bytes(b"")
        elif action == 2:
            path.unlink()
            path.mkdir()
        elif action == 3:
            path.rename(folder / rng.choice(["weights.safetensors", "model.bin", "x.gguf", "vocab.json"]))
        else:
            name = rng.choice(["adapter_config.json", "model.safetensors.index.json", "tokenizer_config.json",
                               "adapter_model.safetensors", "chat_template.jinja", "generation_config.json"])
            (folder / name).write_text(rng.choice(["", "{}", "[]", "null", '{"weight_map": {"x": "../y"}}',
                                                   '{"base_model_name_or_path": "."}', "{{ x"]), encoding="utf-8")
    opened(folder)


def tokenizers(rng: random.Random, given: Fixtures) -> None:
    """tokenizer.json and tokenizer_config.json."""
    folder = given.copy()
    path = folder / rng.choice(["tokenizer.json", "tokenizer_config.json"])
    content = path.read_text(encoding="utf-8")
    if rng.random() < 0.7:
        path.write_text(json.dumps(odd_json(rng, json.loads(content))), encoding="utf-8")
    else:
        path.write_bytes(odd_bytes(rng, content.encode()))
    tokenizer = load_tokenizer(folder)
    token_rows(tokenizer, read_text(str(given.text), "calibration", tokenizer), 2, 32, vocabulary=128)


def texts(rng: random.Random, given: Fixtures) -> None:
    """What a text may be found to be."""
    path = given.scratch / rng.choice(["text.txt", "text.jsonl", "text.json", "text.csv", "text.parquet", "text"])
    path.write_bytes(odd_bytes(rng, b"".join(rng.choices(PIECES, k=rng.randint(0, 6)))))
    tokenizer = tiny_tokenizer()
    token_rows(tokenizer, read_text(str(path), "calibration", tokenizer), 2, 32, vocabulary=128)


def gguf(rng: random.Random, given: Fixtures) -> None:
    """The header of a GGUF file."""
    content = given.gguf.read_bytes()
    path = given.scratch / "broken.gguf"
    path.write_bytes(odd_bytes(rng, content, 4000))
    resolve(str(path))


def opened(folder: Path) -> None:
    """What every command does with a folder before it computes anything."""
    place = resolve(str(folder))
    tokenizer = load_tokenizer(place)
    model = open_model(place)
    decoder = Decoder.of(model)
    shape = decoder.shape("fuzzed")
    make_plan(shape, sink_map_of(decoder), Recipe().replace(["weights.group_size=-1"]))
    with decoder.present([decoder.blocks[0]]):
        tokenizer("w9")


TARGETS: dict[str, Target] = {target.__name__: target for target in (
    recipes, plans, artifacts, weights, configurations, files, tokenizers, texts, gguf)}


@dataclass
class Tally:
    """Of one target."""

    inputs: int = 0
    refused: int = 0
    crashes: dict[str, int] = field(default_factory=dict)
    """How it crashed -> the seed of the first input that did."""


def tried(target: Target, seed: int, given: Fixtures, tally: Tally) -> None:
    """Run one input."""
    tally.inputs += 1
    try:
        with warnings.catch_warnings(), no_progress_bars():
            warnings.simplefilter("ignore")
            target(random.Random(seed), given)
    except SinkquantError as error:
        tally.refused += 1
        said = str(error)
        if "\n" in said or not said.endswith((".", ")")):
            tally.crashes.setdefault(f"no sentence: {said[:200]!r}", seed)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)
        ours = [one for one in where if "sinkquant/" in one.filename]
        last = ours[-1] if ours else where[-1]
        how = f"{type(error).__name__} in {Path(last.filename).name}:{last.lineno}"
        if tally.crashes.setdefault(how, seed) == seed:
            print(f"seed {seed}: {type(error).__name__}: {str(error)[:200]!r}", file=sys.stderr, flush=True)


def main() -> None:
    """Fuzz for some minutes, all targets in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--seed", type=int, default=0, help="of the first input; inputs count up from it")
    parser.add_argument("--only", choices=sorted(TARGETS), help="one target")
    asked = parser.parse_args()
    tallies = {name: Tally() for name in TARGETS if asked.only in (None, name)}
    until, seed = time.monotonic() + 60 * asked.minutes, asked.seed
    with tempfile.TemporaryDirectory() as place:
        given = Fixtures.make(Path(place))
        while time.monotonic() < until:
            for name, tally in tallies.items():
                before = len(tally.crashes)
                tried(TARGETS[name], seed, given, tally)
                if len(tally.crashes) > before:
                    print(f"{name}, seed {seed}: {list(tally.crashes)[-1]}", file=sys.stderr, flush=True)
            seed += 1
    for name, tally in tallies.items():
        print(f"{name}: {tally.inputs} inputs, {tally.refused} refused, {len(tally.crashes)} crashes")


if __name__ == "__main__":
    main()
