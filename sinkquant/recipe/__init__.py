"""Recipe: what the user asks for. Strict, typed, YAML <-> Python without loss."""

from sinkquant.recipe.budget import Budget, SensitivitySettings
from sinkquant.recipe.cache import KVCache, KVCacheScheme, KVOverride
from sinkquant.recipe.explain import near_miss
from sinkquant.recipe.measuring import CalibrationText, Compute, Detection, Evaluation, Gate
from sinkquant.recipe.recipe import DEFAULT_RECIPE, Recipe, recipe_names
from sinkquant.recipe.section import Section
from sinkquant.recipe.weights import Activations, ModuleOverride, Protect, Prune, Weights
