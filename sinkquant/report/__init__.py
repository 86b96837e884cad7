"""Report -> HTML, Markdown, JSON."""

from sinkquant.report.render import comparison, write

__all__ = ["comparison", "write"]
