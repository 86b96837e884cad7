"""Ways in which one matrix is wrong: what is recognised in the numbers is confirmed by putting nothing but it right."""

from sinkquant.explain.patterns.finding import Evidence, Finding
from sinkquant.explain.patterns.known import findings
