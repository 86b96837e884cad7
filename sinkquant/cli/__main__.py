"""`python -m sinkquant.cli`, for torchrun."""

from sinkquant.cli import main

main()
