"""Where `<bos>` stands in every path that text takes to a model, and what of the model is supported."""

from sinkquant.doctor.examine import Audit, examine

__all__ = ["Audit", "examine"]
