"""Every backend and four families: planned bytes, exact round trips, and the same weights in the library itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from backend_cases import BACKEND_CASES
from checkpoints import weight_bytes
from families import tiny_model
from safetensors.torch import load_file
from sinkmaps import sink_map_of
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

from sinkquant.artifacts import Plan
from sinkquant.errors import RequestError
from sinkquant.formats import load, load_dense, open_checkpoint, save
from sinkquant.models import Decoder
from sinkquant.policy import make_control, make_plan
from sinkquant.quantize import quantize
from sinkquant.recipe import Recipe
from sinkquant.schemes.codecs import LibraryFiles, files_of

FAMILIES = {"llama": torch.float32, "gpt_neox": torch.float32, "gemma2": torch.bfloat16, "qwen3_moe": torch.float16}
GRID = [(family, (kinds[i % len(kinds)])) for i, family in enumerate(FAMILIES) for kinds in (
    ("nf4", "nf4-double", "fp4", "fp4-double"), ("llm.int8",), ("quanto-4", "quanto-8", "quanto-2", "quanto-float8"),
    ("gptq-3", "gptq-4"))]


def recipe_of(kind: str, text: Path, *more: str) -> Recipe:
    """A backend's recipe, with the last block left alone and few calibration rows."""
    return Recipe().replace([*BACKEND_CASES[kind], "weights.overrides=[{pattern: '*.2.*', bits: 16}]",
                             "calibration.rows=4", "calibration.length=16", f"calibration.text={text}", *more])


def quantized(kind: str, text: Path, family: str = "llama", dtype: torch.dtype = torch.float32,
              more: tuple[str, ...] = (), **overrides: Any) -> tuple[PreTrainedModel, Plan]:
    model = tiny_model(family, dtype=dtype, **overrides)
    decoder = Decoder.of(model)
    plan = make_plan(decoder.shape(family), sink_map_of(decoder, name=family), recipe_of(kind, text, *more))
    return quantize(model, plan, tiny_tokenizer()), plan


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    return torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))


def logits(model: Any, rows: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(rows, use_cache=False).logits


@pytest.mark.parametrize(("family", "kind"), GRID)
def test_saved_and_loaded_the_model_is_the_same_and_as_large_as_planned(
        family: str, kind: str, rows: torch.Tensor, text_file: Path, tmp_path: Path) -> None:
    model, plan = quantized(kind, text_file, family, FAMILIES[family])
    expected = logits(model, rows)  # before it is saved: a pass must not spoil what is written
    folder = save(model, tiny_tokenizer(), tmp_path / "out")
    assert weight_bytes(folder) == plan.weight_bytes
    again = load(folder)[0]
    assert torch.equal(logits(again, rows), expected)
    if kind != "llm.int8":
        assert load(folder, "float16")[0].dtype == torch.float16
    assert {name for name, decision in plan.modules.items() if decision.bits < 16}
    assert all(".2." not in name for name in plan.formats)
    with pytest.raises(RequestError, match="quantized already"):
        quantize(again, plan)
    if plan.backend == "bitsandbytes":
        plain = AutoModelForCausalLM.from_pretrained(folder)
        for module in plain.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        assert torch.equal(logits(plain, rows), expected)
    # Read block by block from the disk, the weights are the same again.
    mine = Decoder.of(open_checkpoint(folder))
    dense = load_dense(folder).state_dict()
    with mine.present([mine.model]):
        for name, tensor in mine.model.state_dict().items():
            assert dense[name].dtype == torch.int8 or torch.equal(dense[name], tensor), name


@pytest.mark.parametrize(("family", "kind"), GRID)
def test_the_control_has_the_same_bytes(family: str, kind: str, text_file: Path) -> None:
    decoder = Decoder.of(tiny_model(family, num_hidden_layers=6, **(
        {} if family != "gemma2" else {"layer_types": ["sliding_attention", "full_attention"] * 3})))
    down = [name for name in decoder.linears if name.endswith((".3.mlp.down_proj", ".3.mlp.dense_4h_to_h",
                                                               ".3.self_attn.o_proj"))][-1]
    shape, sink_map = decoder.shape(family), sink_map_of(decoder, {down: 0.9}, name=family)
    bits = "8" if kind in ("quanto-4", "quanto-2") else "16"
    recipe = Recipe().replace([*BACKEND_CASES[kind], "protect.channels=module", f"protect.bits={bits}"])
    plan = make_plan(shape, sink_map, recipe)
    assert plan.modules[down].bits == int(bits)
    control = make_control(shape, sink_map, recipe, plan)
    assert control.backend == plan.backend == recipe.backend
    assert control.weight_bytes == pytest.approx(plan.weight_bytes, rel=0.01)
    assert {form.storage for form in control.formats.values()} == {form.storage for form in plan.formats.values()}


@pytest.mark.parametrize("kind", ["nf4", "llm.int8"])
def test_bitsandbytes_loads_on_the_cpu_where_there_is_a_gpu(kind: str, text_file: Path, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    def update(_: Any, asked: Any) -> Any:
        return asked or {"": "meta"}  # as with "cuda": a place of its own choice, where none is named

    for quantizer in (Bnb4BitHfQuantizer, Bnb8BitHfQuantizer):
        monkeypatch.setattr(quantizer, "update_device_map", update)
    model, _ = quantized(kind, text_file)  # the trial loads a tiny one
    files = files_of("bitsandbytes")
    assert isinstance(files, LibraryFiles)
    found = files.reload(type(model), save(model, tiny_tokenizer(), tmp_path / "out"), torch.float32)
    assert found is not None
    assert {tensor.device.type for tensor in found.values()} == {"cpu"}


@pytest.mark.parametrize("kind", ["quanto-8", "quanto-float8"])
def test_quantos_own_loader_gives_the_same_model(kind: str, rows: torch.Tensor, text_file: Path,
                                                 tmp_path: Path) -> None:
    from optimum.quanto import QuantizedModelForCausalLM

    model, _ = quantized(kind, text_file)
    folder = save(model, tiny_tokenizer(), tmp_path / "out")
    assert torch.equal(logits(QuantizedModelForCausalLM.from_pretrained(folder), rows), logits(model, rows))


@pytest.mark.parametrize(("kind", "width"), [("quanto-2", 256), ("quanto-4", 192), ("quanto-4", 64), ("quanto-8", 64)])
def test_quanto_itself_writes_the_same_tensors(kind: str, width: int, text_file: Path, tmp_path: Path) -> None:
    from optimum.quanto import freeze, qint2, qint4, qint8
    from optimum.quanto import quantize as quantize_by_quanto

    sizes = {"hidden_size": width, "num_attention_heads": 4, "intermediate_size": 128}
    model, plan = quantized(kind, text_file, more=(), **sizes)
    folder = save(model, tiny_tokenizer(), tmp_path / "out")
    theirs = tiny_model("llama", **sizes)
    kind_of = {"quanto-2": qint2, "quanto-4": qint4, "quanto-8": qint8}[kind]
    quantize_by_quanto(theirs, weights=kind_of, exclude=["lm_head", "*.2.*"])
    freeze(theirs)
    expected, found = theirs.state_dict(), load_file(folder / "model.safetensors")
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    groups = {decision.group_size for name, decision in plan.modules.items() if name.endswith("0.self_attn.q_proj")}
    assert groups == {-1 if width == 64 else 96 if width == 192 else 128}


def test_plain_transformers_refuses_quanto_instead_of_giving_random_weights(text_file: Path, tmp_path: Path) -> None:
    folder = save(quantized("quanto-8", text_file)[0], tiny_tokenizer(), tmp_path / "out")
    with pytest.raises(ValueError, match=r"quanto_qmap\.json"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_gptq_files_name_what_stays_and_hold_the_grid(text_file: Path, tmp_path: Path) -> None:
    model, plan = quantized("gptq-4", text_file, dtype=torch.bfloat16)
    folder = save(model, tiny_tokenizer(), tmp_path / "out")
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (settings["bits"], settings["group_size"], settings["sym"], settings["desc_act"]) == (4, 32, True, False)
    left = {name for name, decision in plan.modules.items() if decision.bits == 16}
    assert {name.replace("\\", "")[3:-1] for name in settings["dynamic"]} == left | {"lm_head"}
    assert "modules_in_block_to_quantize" not in settings  # the last block is left alone, the others are not
    found = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    # An independent reading: eight codes to a word, low bits first, zeros stored less one.
    words, zeros = found[f"{name}.qweight"].numpy().view("uint32"), found[f"{name}.qzeros"].numpy().view("uint32")
    weight = model.get_parameter(f"{name}.weight").data
    for column in range(128):
        for row in range(column % 7, 64, 7):
            code = int(words[column // 8, row] >> 4 * (column % 8) & 15)
            zero = int(zeros[column // 32, row // 8] >> 4 * (row % 8) & 15) + 1
            value = (code - zero) * found[f"{name}.scales"][column // 32, row].float()
            assert value.bfloat16() == weight[row, column]


def test_a_width_that_64_does_not_divide_stays_in_16_bits_with_the_reason(text_file: Path) -> None:
    odd = {"hidden_size": 96, "intermediate_size": 128}
    _, plan = quantized("nf4", text_file, **odd)
    decision = plan.modules["model.layers.0.mlp.up_proj"]
    assert decision.bits == 16
    assert "64 does not divide the 96 input columns" in decision.reason
    assert plan.modules["model.layers.0.mlp.down_proj"].bits == 4
    with pytest.raises(RequestError, match="bitsandbytes can hold nothing of LlamaForCausalLM"):
        quantized("nf4", text_file, hidden_size=96, intermediate_size=224)


def test_a_missing_library_is_named(text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sinkquant.schemes import packages

    monkeypatch.setattr(packages, "installed", lambda module: False)
    with pytest.raises(RequestError, match=r"backend bitsandbytes needs the package bitsandbytes.*pip install"):
        quantized("nf4", text_file)
    with pytest.raises(RequestError, match="backend quanto needs the package optimum-quanto"):
        quantized("quanto-4", text_file)
    quantized("gptq-3", text_file)  # needs nobody


@pytest.fixture(scope="module")
def quanto_folder(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(quantized("quanto-4", text_file)[0], tiny_tokenizer(), tmp_path_factory.mktemp("quanto") / "out")


def test_broken_maps_of_types_are_refused(quanto_folder: Path) -> None:
    path = quanto_folder / "quanto_qmap.json"
    before = path.read_text()
    for content, message in [("{", "no readable quanto_qmap"), ('{"x": {"weights": "qint4", "activations": "qint8"}}',
                                                                 "activations qint8"),
                             ('{"x": {"weights": "qint4"}}', "packs x, which the model")]:
        path.write_text(content)
        with pytest.raises(RequestError, match=message):
            load(quanto_folder)
    path.write_text(before)
    load(quanto_folder)
