"""SinkMap + Recipe -> Plan: rules, budget, and the control of the same size. Imports no torch."""

from sinkquant.policy.edited import accept_edited
from sinkquant.policy.plan import make_control, make_plan

__all__ = ["accept_edited", "make_control", "make_plan"]
