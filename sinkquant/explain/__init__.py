"""Where the loss of a quantized model comes from: ranked causes, each with the counterfactual that was measured."""

from sinkquant.explain.explain import explain
