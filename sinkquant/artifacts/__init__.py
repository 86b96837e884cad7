"""The typed, versioned JSON files that the stages hand to one another.

model + text -> `SinkMap` -> `Plan` -> checkpoint -> `Report`; beside them `Diagnosis`, of any model.
Nothing here imports torch.
"""

from sinkquant.artifacts.base import Artifact
from sinkquant.artifacts.comparison import Comparison
from sinkquant.artifacts.diagnosis import Diagnosis
from sinkquant.artifacts.explanation import Explanation
from sinkquant.artifacts.fidelity import SinkFidelity
from sinkquant.artifacts.frontier import Frontier, FrontierPoint
from sinkquant.artifacts.kv import KVCachePlan, KVLayer, KVSink, MassiveCarriers
from sinkquant.artifacts.plan import Calibration, ModuleDecision, Plan, PredictedLoss, Transform, WeighedSink
from sinkquant.artifacts.report import Forecast, Measure, Paired, Report, Row
from sinkquant.artifacts.sensitivity import EndLoss, FormatLoss, KVLoss, Ranking, Sensitivity, Terms, UnitSensitivity
from sinkquant.artifacts.shapes import EndShape, KVLayerShape, LinearShape, ModelShape
from sinkquant.artifacts.sinkmap import (
    Channel,
    Emergence,
    Head,
    ModelFacts,
    ModuleStatistics,
    OutlierChannel,
    OutlierPrefix,
    ResidualSink,
    SinkCriterion,
    SinkKind,
    SinkMap,
    SinkToken,
    SinkVerdict,
    SuperWeight,
    TokenizationFacts,
)
