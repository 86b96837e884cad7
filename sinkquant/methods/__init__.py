"""Quantization methods, each one class in one file.

Nothing here imports torch before a matrix is solved: recipes, plans and predictions ask a method what it needs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator

from sinkquant.errors import RequestError
from sinkquant.extensions import brought, loaded
from sinkquant.methods.contract import Cost, Method, Problem, Settings
from sinkquant.methods.gptaq import GPTAQMethod
from sinkquant.methods.gptq import GPTQMethod
from sinkquant.methods.rounding import Rounding

if TYPE_CHECKING:
    from sinkquant.artifacts.plan import Plan

BUILT_IN: tuple[Method, ...] = (Rounding(), GPTQMethod(), GPTAQMethod())
GROUP = "sinkquant.methods"
"""The group of entry points that other packages bring methods by."""
UNTOUCHED = "none"
"""What stands in a plan in place of a method where a linear stays in 16 bits."""


def method_named(name: str) -> Method:
    """The method of that name, built in or from an installed package; those built in come first.

    Raises:
        RequestError: there is none.
    """
    for method in BUILT_IN:
        if method.name == name:
            return method
    if name in brought(GROUP):
        return _loaded(name)
    raise RequestError(f"there is no quantization method {name!r}; use {_in_words(method_names())}, or install the "
                       "package that brings it.")


def method_names() -> list[str]:
    """Names of all methods, those of installed packages after those built in."""
    built_in = [method.name for method in BUILT_IN]
    return built_in + sorted(set(brought(GROUP)) - set(built_in))


def methods_of(names: Iterable[str]) -> list[Method]:
    """The methods of some linears, each once; linears that stay in 16 bits have none."""
    return [method_named(name) for name in sorted(set(names) - {UNTOUCHED})]


def need_hessian(names: Iterable[str]) -> bool:
    """Whether any of these methods takes a Hessian."""
    return any(method.needs_hessian for method in methods_of(names))


def need_unquantized_inputs(names: Iterable[str]) -> bool:
    """Whether any of these methods takes what the unquantized model would feed a linear."""
    return any(method.needs_unquantized_inputs for method in methods_of(names))


def require_methods(plan: Plan) -> None:
    """Refuse a plan that asks of a method what it cannot do."""
    for method in methods_of(decision.method for decision in plan.modules.values()):
        if why := method.refuses(plan):
            raise RequestError(why)


def known_method(name: str) -> str:
    """The name, where there is such a method. Raises ValueError, as pydantic wants it."""
    if name not in (method.name for method in BUILT_IN) and name not in (names := method_names()):
        raise ValueError(f"Input should be {_in_words(names)}")
    return name


def _known_or_untouched(name: str) -> str:
    return name if name == UNTOUCHED else known_method(name)


MethodName = Annotated[str, AfterValidator(known_method)]
"""A method in a recipe."""
AnyMethod = Annotated[str, AfterValidator(_known_or_untouched)]
"""A method in a plan, or "none"."""


def _loaded(name: str) -> Method:
    method = loaded(GROUP, name, Method)  # type: ignore[type-abstract]
    if method.name != name:
        raise RequestError(f"the entry point {name!r} of {GROUP} is no sinkquant.methods.Method of that name; mend the "
                           "package that brings it.")
    return method


def _in_words(names: list[str]) -> str:
    quoted = [repr(name) for name in names]
    return f"{', '.join(quoted[:-1])} or {quoted[-1]}"
