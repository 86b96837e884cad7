"""model + text -> SinkMap: which tokens, heads, channels and weights are the attention sink of a model."""

from sinkquant.detect.detect import detect
from sinkquant.detect.detector import Detector, Found, Survey
