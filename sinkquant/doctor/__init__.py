"""Where `<bos>` stands in every path that text takes to a model, and what of the model is supported."""

from typing import TYPE_CHECKING

from sinkquant.lazy import make_lazy

if TYPE_CHECKING:
    from sinkquant.doctor.examine import Audit, examine

make_lazy(__name__)
