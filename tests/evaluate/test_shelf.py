"""Models stay loaded where there is room, share what is equal, and go where there is none."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import tiny_model
from transformers import PreTrainedModel

from sinkquant.evaluate.shelf import Shelf, room, share_equal, size
from sinkquant.recipe import Recipe


def _loads(count: int) -> tuple[list[Callable[[], PreTrainedModel]], list[weakref.ref[Any]], list[int]]:
    alive: list[weakref.ref[Any]] = []
    order: list[int] = []

    def loader(index: int) -> Callable[[], PreTrainedModel]:
        def load() -> PreTrainedModel:
            model = tiny_model("llama", seed=index)
            alive.append(weakref.ref(model))
            order.append(index)
            return model
        return load

    return [loader(index) for index in range(count)], alive, order


def test_with_room_every_model_is_loaded_once() -> None:
    loads, _, order = _loads(3)
    shelf = Shelf(1e12)
    found = [shelf.get(load) for load in (*loads, *loads)]
    assert order == [0, 1, 2]
    assert found[0] is found[3]
    assert found[2] is found[5]


def test_without_room_the_first_and_one_more_are_there() -> None:
    loads, alive, order = _loads(4)
    shelf = Shelf(0.0)
    for load in (*loads, loads[0], loads[1]):
        shelf.get(load)
        gc.collect()
        assert sum(one() is not None for one in alive) <= 2
    assert order == [0, 1, 2, 3, 1]
    assert shelf.beside_the_first == 1


def test_room_for_two_beside_the_first() -> None:
    loads, alive, order = _loads(4)
    shelf = Shelf(3.5 * size(tiny_model("llama")))
    for load in (*loads, loads[1], loads[3]):
        shelf.get(load)
    gc.collect()
    assert order == [0, 1, 2, 3, 1]
    assert sum(one() is not None for one in alive) == 3


def test_a_model_in_use_stays_where_another_has_to_go() -> None:
    loads, alive, _ = _loads(4)
    shelf = Shelf(3.5 * size(tiny_model("llama")))
    for load in loads[:3]:
        shelf.get(load)
    held = shelf.get(loads[1])
    shelf.get(loads[3])
    assert shelf.get(loads[1]) is held
    del held
    gc.collect()
    assert [one() is not None for one in alive] == [True, True, False, True]


def test_equal_parameters_take_their_memory_once() -> None:
    first, second = tiny_model("llama"), tiny_model("llama")
    with torch.no_grad():
        second.model.layers[0].mlp.up_proj.weight.add_(1)
    expected = second(torch.arange(8)[None]).logits
    share_equal(first, second)
    shared = [name for name, one in second.named_parameters()
              if one.data_ptr() == first.get_parameter(name).data_ptr()]
    assert len(shared) == len(list(first.named_parameters())) - 1
    assert "model.layers.0.mlp.up_proj.weight" not in shared
    assert torch.equal(second(torch.arange(8)[None]).logits, expected)


def test_half_of_what_a_run_may_take() -> None:
    assert room(Recipe().replace(["compute.memory_limit=3"])) == 1.5e9
    assert room(Recipe()) > 0


def test_on_a_gpu_its_free_memory_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (1e9, 2e9))
    assert room(Recipe().replace(["compute.memory_limit=3"])) == 0.5e9
    assert room(Recipe().replace(["compute.memory_limit=3", "compute.device=cpu"])) == 1.5e9
