"""All detectors, in the order in which they are asked: what one reads stands before it."""

from __future__ import annotations

from sinkquant.detect.ablation import NoOpHeads
from sinkquant.detect.channels import Channels
from sinkquant.detect.detector import Detector
from sinkquant.detect.emergence import EmergenceBlock
from sinkquant.detect.experts import Experts
from sinkquant.detect.heads import Heads
from sinkquant.detect.modules import Modules
from sinkquant.detect.outliers import OutlierTokens
from sinkquant.detect.rates import Rates
from sinkquant.detect.residual_sinks import ResidualSinks
from sinkquant.detect.roles import HeadRoles
from sinkquant.detect.sinks import Sinks
from sinkquant.detect.super_weights import SuperWeights
from sinkquant.detect.verdict import WhetherSinks
from sinkquant.extensions import brought, loaded_class
from sinkquant.models import Decoder
from sinkquant.recipe import Recipe

BUILT_IN: tuple[type[Detector], ...] = (
    Rates, Sinks, Channels, ResidualSinks, EmergenceBlock, Heads, HeadRoles, NoOpHeads, Modules, Experts,
    OutlierTokens, SuperWeights, WhetherSinks)
GROUP = "sinkquant.detectors"
"""The group of entry points that other packages bring detectors by."""


def detectors_of(decoder: Decoder, recipe: Recipe) -> list[Detector]:
    """New detectors for one detection: those built in, then those of installed packages by name.

    Raises:
        RequestError: a package brings something else.
    """
    names = sorted(brought(GROUP))
    outside = [(name, loaded_class(GROUP, name, Detector)) for name in names]  # type: ignore[type-abstract]
    return [one(decoder, recipe) for one in BUILT_IN] + [one(decoder, recipe, name) for name, one in outside]
