"""The whole recipe: YAML <-> Python without loss."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, Field, ValidationError, model_validator

from sinkquant.errors import RequestError
from sinkquant.methods import need_hessian
from sinkquant.recipe.budget import LIMITS, Budget, SensitivitySettings
from sinkquant.recipe.cache import KVCache, KVCacheScheme
from sinkquant.recipe.explain import explain, near_miss
from sinkquant.recipe.measuring import CalibrationText, Compute, Detection, Evaluation, Gate
from sinkquant.recipe.section import Section, Statistics, read_assignment, read_yaml
from sinkquant.recipe.weights import Activations, Protect, Prune, Weights
from sinkquant.resources import recipe_folder
from sinkquant.schemes import DEFAULT_BACKEND
from sinkquant.schemes.registry import known_backend

DEFAULT_RECIPE = "w4-kv2-sink"
"""What `run` and `plan` do where no recipe is named."""


class Recipe(Section):
    """The whole request. `Recipe()` has the default of every key; `Recipe.load` reads a file or a packaged name.

    `backend`: whose files the checkpoint is made of. What a backend cannot hold is refused before anything is computed.
    `engine`: what is to run the checkpoint (docs/guides/engines.md). A plan that it does not run is refused, with what
    the engine table says; a budget without a solver of its own is then solved for among the formats that it runs.
    """

    name: str = "custom"
    description: str = ""
    seed: int = Field(default=0, ge=0, lt=2 ** 32)
    backend: Annotated[str, AfterValidator(known_backend)] = DEFAULT_BACKEND
    engine: Literal["any", "vllm-cuda", "vllm-cpu", "llama.cpp", "transformers"] = "any"
    compute: Compute = Field(default_factory=Compute)
    calibration: CalibrationText = Field(default_factory=CalibrationText)
    detect: Detection = Field(default_factory=Detection)
    prune: Prune = Field(default_factory=Prune)
    weights: Weights = Field(default_factory=Weights)
    activations: Activations = Field(default_factory=Activations)
    protect: Protect = Field(default_factory=Protect)
    budget: Budget = Field(default_factory=Budget)
    sensitivity: SensitivitySettings = Field(default_factory=SensitivitySettings)
    kv_cache: KVCache | None = None
    kv_cache_scheme: KVCacheScheme | None = None
    evaluate: Evaluation = Field(default_factory=Evaluation)
    gate: Gate = Field(default_factory=Gate)

    @model_validator(mode="after")
    def _budget_for_the_engine(self) -> Self:
        budget = self.budget
        if self.engine != "any" and budget.engine == "any" and budget.limited and budget.solver != "even":
            # Not by assignment, which would validate again.
            self.__dict__["budget"] = budget.model_copy(update={"engine": self.engine})
        return self

    @property
    def methods(self) -> set[str]:
        """Names of all methods that it asks for; none where all weights are left alone."""
        if "*" in self.weights.ignore:
            return set()
        return {self.weights.method, *(one.method for one in self.weights.overrides if one.method)}

    @property
    def statistics(self) -> Statistics:
        """What tokens weigh: `protect.statistics`, or the policy that measured best; "all" where no token is protected.

        Wanda looks at single columns, in which RSQ's weighting (arXiv 2503.01820) of every token leaves less than a
        boosted sink (docs/guides/pruning.md). Methods that move an error between columns do better with the sink alone,
        and GPTQ after Wanda moves the errors of the zeros too. Rounding behind AWQ's scales does worse with a boosted
        sink (evals/results/smollm2.md): scales that suit one token suit the others less.
        """
        if not self.protect.tokens:
            return "all"
        if self.protect.statistics or need_hessian(self.methods):
            return self.protect.statistics or "boost"
        if self.prune.method == "wanda":
            return "attention"
        return "all" if self.weights.smooth == "awq" else "boost"

    @classmethod
    def load(cls, source: str | os.PathLike[str]) -> Self:
        """Read a YAML file, or the packaged recipe of that name (with or without ".yaml").

        Raises:
            RequestError: no such recipe, not YAML, an unknown key or a value out of range.
        """
        path = Path(os.path.expanduser(source))
        if not path.is_file():
            packaged = recipe_folder() / f"{Path(source).name.removesuffix('.yaml')}.yaml"
            if not packaged.is_file() or path.parent != Path("."):
                names = recipe_names()
                raise RequestError(f"there is no recipe {str(source)!r}{near_miss(path.stem, names)}; "
                                   f"the packaged ones are {', '.join(names)}.")
            path = packaged
        try:
            data = read_yaml(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise RequestError(f"cannot read {path}: {error.strerror or error}.") from error
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise RequestError(f"{path} is not YAML: {' '.join(str(error).split()).rstrip('.')}.") from error
        return cls.parse({} if data is None else data, str(path))

    @classmethod
    def parse(cls, data: Any, where: str = "the recipe") -> Self:
        """Validate a decoded recipe; errors name the key, and the near miss of an unknown one."""
        if not isinstance(data, dict):
            raise RequestError(f"{where} must be a mapping of keys to values.")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise RequestError(f"{where}: {explain(cls, error)}.") from error

    @classmethod
    def for_comparison(cls) -> Self:
        """How checkpoints are compared where nothing else is asked: no tasks, and all documents of those that are."""
        return cls().changed(evaluate={"tasks": [], "sample": None})

    @property
    def needs_sensitivities(self) -> bool:
        """Whether its plan is made from what formats were measured to lose."""
        return self.budget.solved or self.solves_cache or self.solves_inputs

    @property
    def named_engine(self) -> str:
        """The engine that is to run the checkpoint: the recipe's, or else its budget's."""
        return self.engine if self.engine != "any" else self.budget.engine

    @property
    def solves_inputs(self) -> bool:
        """Whether there is a budget of what inputs are rounded to."""
        return self.activations.bits is not None

    @property
    def solves_cache(self) -> bool:
        """Whether the KV cache has a budget of its own."""
        return self.kv_cache is not None and self.kv_cache.bits is not None

    @property
    def tries_weights(self) -> bool:
        """Whether sensitivities are of weights: a budget of the cache alone, or of inputs, needs nothing of them."""
        return self.budget.solved or not (self.solves_cache or self.solves_inputs)

    @property
    def kv_tried(self) -> list[int]:
        """The numbers of bits that heads of the KV cache are tried in."""
        return list(self.sensitivity.kv_bits) or ([2, 3, 4, 8] if self.solves_cache else [])

    def to_yaml(self) -> str:
        """The whole recipe as YAML, defaults written out; `Recipe.parse(yaml.safe_load(text))` gives it back."""
        # Not allow_unicode: PyYAML then writes a next-line character as one that it reads back as a space.
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def _as_asked(self) -> dict[str, Any]:
        """All keys, without the engine that the budget took from the recipe, which may get another."""
        data = self.model_dump(mode="json")
        if self.budget.engine == self.engine:
            data["budget"]["engine"] = "any"
        return data

    def changed(self, **sections: Any) -> Self:
        """A copy with other values: `changed(weights={"bits": 3}, seed=1)`. A section keeps what is not named; one that
        is off, as `kv_cache` may be, starts from its defaults.

        Raises:
            RequestError: an unknown key, a value out of range.
        """
        return type(self).parse(_merged(self._as_asked(), sections))

    def replace(self, assignments: Iterable[str]) -> Self:
        """A copy with `key.path=value` assignments applied, as `--set` takes them. A limit of the budget takes the
        place of the one that the recipe names.

        Raises:
            RequestError: an assignment without "=", an unknown key, a value out of range.
        """
        data = self._as_asked()
        read = [read_assignment(assignment, type(self)) for assignment in assignments]
        if any(path[:-1] == ["budget"] and path[-1] in LIMITS and value is not None for path, value in read):
            data["budget"] |= dict.fromkeys(LIMITS)
        for path, value in read:
            *sections, leaf = path
            target = data
            for depth, part in enumerate(sections):
                inner = target.get(part)
                if part in ("kv_cache", "kv_cache_scheme") and inner is None:  # sections that may be off
                    inner = target[part] = {}
                if not isinstance(inner, dict):
                    raise RequestError(f"--set: {'.'.join(sections[: depth + 1])!r} is not a section of the recipe"
                                       f"{near_miss(part, [k for k, v in target.items() if isinstance(v, dict)])}.")
                target = inner
            target[leaf] = value
        return type(self).parse(data, "--set")


def _merged(old: dict[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(old)
    for key, value in new.items():
        inner = found.get(key)
        found[key] = _merged(inner or {}, value) if isinstance(value, Mapping) else value
    return found


def recipe_names() -> list[str]:
    """Names of the packaged recipes, sorted."""
    return sorted(path.stem for path in recipe_folder().glob("*.yaml"))
