"""SinkMap + Recipe -> Plan: rules, budget, and the control of the same size. Imports no torch."""

from sinkquant.policy.carried import check_recipe
from sinkquant.policy.choices import check_same_model
from sinkquant.policy.edited import accept_edited
from sinkquant.policy.frontier import make_frontier
from sinkquant.policy.headers import plan_from_shapes, require_distill, require_plannable
from sinkquant.policy.plan import make_control, make_plan
from sinkquant.policy.solvable import check_solvable
from sinkquant.policy.tensor_types import check_tensor_types, tensor_types
from sinkquant.policy.transforms import require_transforms
