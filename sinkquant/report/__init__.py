"""Report -> HTML, Markdown, JSON."""

from sinkquant.report.render import comparison, page, write
