"""Report -> HTML, Markdown, JSON."""

from sinkquant.report.render import comparison, page, write

__all__ = ["comparison", "page", "write"]
