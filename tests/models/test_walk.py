"""The walk block by block against a plain forward pass of the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCABULARY, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from sinkquant.errors import SinkquantError
from sinkquant.models import Decoder, Walk, open_model
from sinkquant.models.ends import outside_modules
from sinkquant.models.head import OutputHead, headless


def rows(count: int = 5, length: int = 80) -> torch.Tensor:
    return torch.randint(8, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(3))


def plain_outputs(decoder: Decoder, batch: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What every block hands on in a plain forward pass, and the losses."""
    outputs: list[torch.Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(hook) for block in decoder.blocks]
    with torch.no_grad():
        logits = decoder.model(batch, use_cache=False).logits.float()
    for handle in handles:
        handle.remove()
    return outputs, nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), batch[:, 1:], reduction="none")


@pytest.mark.parametrize(("family", "settings"), [*((family, {}) for family in FAMILIES), *(
    ("falcon_h1", {"num_hidden_layers": count}) for count in (1, 2, 3, 5))])
def test_the_walk_equals_a_plain_forward(family: str, settings: dict[str, int]) -> None:
    decoder = Decoder.of(tiny_model(family, initializer_range=0.2, **settings))
    batch = rows()
    expected, losses = plain_outputs(decoder, batch)
    walk = Walk(decoder, batch, batch_size=2)
    for step in walk.steps():
        assert torch.allclose(step.run(), expected[step.index], rtol=1e-4, atol=1e-4)
    assert torch.allclose(walk.losses(), losses, rtol=1e-4, atol=1e-4)


def test_a_step_that_is_not_run_is_run_when_the_walk_goes_on(tiny: Any) -> None:
    decoder, batch = Decoder.of(tiny), rows()
    walk = Walk(decoder, batch, batch_size=3)
    for _ in walk.steps():
        pass
    assert torch.allclose(walk.losses(), plain_outputs(decoder, batch)[1], atol=1e-4)


def test_a_change_to_a_block_shows_in_what_follows() -> None:
    decoder, batch = Decoder.of(tiny_model("llama", initializer_range=0.2)), rows()
    walk = Walk(decoder, batch, batch_size=2)
    for step in walk.steps():
        if step.index == 1:
            before = step.run().clone()
            step.block.mlp.down_proj.weight.data.zero_()
            assert not torch.allclose(step.run(), before)
    assert not decoder.blocks[1].mlp.down_proj.weight.any()
    assert torch.allclose(walk.losses(), plain_outputs(decoder, batch)[1], atol=1e-4)


def test_compute_dtype_is_float32_and_the_models_own_comes_back() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    walk = Walk(Decoder.of(model), rows(), batch_size=2)
    for step in walk.steps():
        assert step.run().dtype == torch.float32
        assert {parameter.dtype for parameter in step.block.parameters()} == {torch.float32}
    assert torch.isfinite(walk.losses()).all()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])
    assert model.training


def test_hooks_know_which_rows_are_replayed(tiny: Any) -> None:
    walk = Walk(Decoder.of(tiny), rows(5), batch_size=2)
    batches: list[slice] = []
    for step in walk.steps():
        handle = step.block.register_forward_pre_hook(
            lambda *_, step=step: batches.append(step.batch))
        step.run()
        handle.remove()
        break
    assert batches == [slice(0, 2), slice(2, 4), slice(4, 5)]


def test_outputs_that_are_not_finite_are_an_error_that_names_the_block() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data.fill_(1e38)
    model.model.layers[1].mlp.up_proj.weight.data.fill_(1e30)
    walk = Walk(Decoder.of(model), rows(), batch_size=2)
    with pytest.raises(SinkquantError, match=r"model\.layers\.1 are not finite"):
        list(walk.steps())


@pytest.mark.parametrize(("family", "settings"), [
    ("idefics3", {"scale_factor": 1, "image_token_id": 9}), ("gemma3", {"mm_tokens_per_image": 4})])
def test_towers_for_images_stay_on_disk(family: str, settings: dict[str, int], tmp_path: Path) -> None:
    kind = {"idefics3": "llama", "gemma3": "gemma3_text"}[family]
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
             "image_size": 16, "patch_size": 4}
    config = AutoConfig.for_model(family, text_config={"model_type": kind} | FAMILIES[kind], vision_config=tower,
                                  **settings)
    model, batch = AutoModelForImageTextToText.from_config(config).eval(), rows(3, 24)
    model.save_pretrained(tmp_path)
    decoder = Decoder.of(open_model(tmp_path))
    names = {id(module): name for name, module in decoder.model.named_modules()}
    outside = [names[id(module)] for module in outside_modules(decoder)]
    assert [name for name in outside if "vision" in name] == [  # one, of which transformers takes the model's device
        f"model.vision_{'model' if family == 'idefics3' else 'tower'}.embeddings.patch_embedding"]
    assert any(name.endswith("norm") for name in outside)
    walk = Walk(decoder, batch, batch_size=2)
    for _ in walk.steps():
        pass
    assert torch.allclose(walk.losses(), plain_outputs(Decoder.of(model), batch)[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "count"), [("llama", 2), ("falcon_h1", 1), ("falcon_h1", 4)])
def test_a_head_by_itself_gives_the_logits_of_the_model(family: str, count: int) -> None:
    model, batch = tiny_model(family, num_hidden_layers=count), rows(2, 24)
    with torch.no_grad():
        expected = model(batch, use_cache=False).logits
        with headless(model) as states:
            model(batch, use_cache=False)
    logits = OutputHead(model).logits(states[0].flatten(0, 1))
    torch.testing.assert_close(logits, expected.flatten(0, 1), rtol=1e-4, atol=1e-5)
