"""What a quantization method is: one class that says what it needs, what it refuses, what it costs, and solves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    import torch

    from sinkquant.artifacts.plan import Plan
    from sinkquant.artifacts.shapes import LinearShape
    from sinkquant.schemes import WeightFormat
    from sinkquant.schemes.codecs.packed import PackedWeight


class Settings(Protocol):
    """The settings that all methods share, as a plan's calibration and a recipe's weights have them.

    damping: share of the Hessian's mean diagonal that is added to it. act_order: visit columns by their share of the
    Hessian. scale_search: scales with the least loss instead of the whole range. descent: rounds of coordinate descent.
    """

    @property
    def damping(self) -> float: ...
    @property
    def act_order(self) -> bool: ...
    @property
    def scale_search(self) -> bool: ...
    @property
    def descent(self) -> int: ...


@dataclass(frozen=True)
class Problem:
    """One weight matrix to be quantized, and what is known of its inputs x.

    Attributes:
        name: the module, for messages. form: the number format that the codes are to be of.
        weight: float [rows, columns]. For a method without a Hessian, pruned weights are zero in it.
        scale_dtype: 16-bit float, what scales are stored in.
        hessian: the weighted mean of x x^T, float64 [columns, columns]; None where no rows walk.
        cross: the weighted mean of (x' - x) x^T, x' the inputs in the unquantized model, float64 [columns, columns];
            None where the method does not need it, or where it is not known.
        fused_scale: the scale of the whole tensor that the format shares among linears which engines fuse, float32 [1];
            None in formats without one.
        kept: bool [rows, columns]; where it is False the weight was pruned, and its code must be zero. None: all kept.
        factored: what a method makes of the Hessian alone, kept for other problems with the same one; None: not kept.
    """

    name: str
    form: WeightFormat
    weight: torch.Tensor
    scale_dtype: torch.dtype
    settings: Settings
    hessian: torch.Tensor | None = None
    cross: torch.Tensor | None = None
    kept: torch.Tensor | None = None
    fused_scale: torch.Tensor | None = None
    factored: dict[Any, Any] | None = None


@dataclass(frozen=True)
class Cost:
    """What it takes to solve one matrix.

    bytes: held at the worst moment beside the weight and its Hessian. operations: floating-point operations of large
    products. columns: columns that are visited one after the other. rounded: weights that are rounded at once.
    """

    bytes: float = 0.0
    operations: float = 0.0
    columns: int = 0
    rounded: int = 0


class Method(ABC):
    """Chooses the codes and scales of one weight matrix at a time.

    A package adds its own by an entry point of the group `sinkquant.methods` that names a subclass (or an instance);
    recipes then know it by its `name`.

    Attributes:
        name: as recipes and plans have it.
        needs_hessian: whether `Problem.hessian` must be there, so that calibration rows walk through the model.
        needs_unquantized_inputs: whether `Problem.cross` is to be taken, which walks a second time.
    """

    name: ClassVar[str]
    needs_hessian: ClassVar[bool] = False
    needs_unquantized_inputs: ClassVar[bool] = False

    def takes(self, form: WeightFormat) -> str:
        """Why this method cannot choose codes of a number format, as the end of a sentence; empty where it can."""
        return ""

    def refuses(self, plan: Plan) -> str:
        """What of a plan it cannot do, as one sentence that says what to change; empty where it can do all of it."""
        for name, decision in plan.modules.items():
            if decision.bits < 16 and decision.method == self.name and (why := self.takes(decision.form)):
                return f"the plan gives {name} the method {self.name!r}, which {why}; give it another one."
        return ""

    @abstractmethod
    def cost(self, shape: LinearShape, settings: Settings) -> Cost:
        """What one matrix of that shape takes."""

    @abstractmethod
    def solve(self, problem: Problem) -> PackedWeight:
        """Quantize one matrix.

        Raises:
            SinkquantError: the Hessian is not finite, or cannot be inverted.
        """

    def solve_together(self, problems: Sequence[Problem]) -> list[PackedWeight]:
        """Quantize matrices that read one input in one number format: all have the same Hessian and cross term. A
        method whose rows do not see each other may take them as one matrix."""
        return [self.solve(problem) for problem in problems]
