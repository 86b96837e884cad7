"""Does protection pay on this model, and is the result good enough?"""

from __future__ import annotations

from typing import Literal

from sinkquant.artifacts.report import Fidelity, Paired, Row, Verdict
from sinkquant.errors import RequestError
from sinkquant.recipe import Gate, Recipe

RESULTS = ("sink_aware", "quantized")
"""What the row that a gate is of may be called: ours, or a checkpoint that sinkquant did not write."""
Answer = Literal["pays", "does not pay", "no difference shown", "not measured"]
Recovery = dict[str, dict[str, dict[str, float]]]


def require_gate(recipe: Recipe) -> None:
    """Refuse bounds that nothing will be measured for.

    Raises:
        RequestError: the recipe leaves out what one of them is of.
    """
    bounds = [name for name, bound in recipe.gate.model_dump().items() if bound is not None]
    if bounds and recipe.evaluate.skip:
        raise RequestError(f"gate.{bounds[0]} is a bound on the evaluation, which evaluate.skip leaves out; leave out "
                           "one of the two.")
    of_sinks = [name for name in bounds if name in ("max_head_divergence", "min_massive_overlap", "sinks")]
    if of_sinks and not recipe.evaluate.fidelity:
        raise RequestError(f"gate.{of_sinks[0]} is a bound on sink fidelity, which evaluate.fidelity=false leaves out; "
                           "leave out one of the two.")


def judge(rows: list[Row], paired: list[Paired], recovery: Recovery, fidelity: Fidelity | None,
          gate: Gate) -> Verdict:
    """The verdict of a report: from the KL divergence of the sink-aware row against the control's, and the gate."""
    failures = gate_failures(rows, recovery, fidelity, gate)
    outcome: Literal["passed", "failed"] | None = None
    if any(bound is not None for bound in gate.model_dump().values()):
        outcome = "failed" if failures else "passed"
    answer, sentence, details = _answer(rows, paired)
    return Verdict(answer=answer, sentence=sentence, details=[*details, *_mechanisms(rows, paired)], gate=outcome,
                   failures=failures)


def _answer(rows: list[Row], paired: list[Paired]) -> tuple[Answer, str, list[str]]:
    """The answer, one sentence of two figures, and the sentence with their difference."""
    by_name = {row.name: row for row in rows}
    pair = next((p for p in paired if (p.task, p.a, p.b) == ("divergence", "control", "sink_aware")), None)
    if pair is None:
        reason = "there is no control beside the result"
        if "control" in by_name and "sink_aware" in by_name:
            reason = ("the evaluation text holds but one row" if "divergence" in by_name["control"].tasks
                      else "there is no unquantized model beside the two")
        return "not measured", f"Whether protection pays was not measured: {reason}.", []
    aware, control = (by_name[name].tasks["divergence"]["kl"].value for name in ("sink_aware", "control"))
    size = _size(by_name["sink_aware"].weight_bytes / by_name["control"].weight_bytes - 1)
    figures = f"{_short(aware)} nats of KL divergence per token"
    details = [f"With protection {aware:.4g} nats, without {control:.4g}: the difference is {pair.difference:.2g}, "
               f"95 % interval {pair.low:.2g} to {pair.high:.2g}."]
    if pair.low > 0:
        less = f"{_short(100 * (1 - aware / control))} % less than the control {size}"
        return "pays", f"Protection pays on this model: {figures}, {less}.", details
    if pair.high < 0:
        more = f"{_short(100 * (aware / control - 1))} % more than the control {size}" if control > 0 else (
            f"and none with the control {size}")
        return "does not pay", f"Protection does not pay on this model: {figures}, {more}.", details
    return "no difference shown", (f"No difference was shown on this model: {figures} with protection, "
                                   f"{_short(control)} for the control {size}."), details


def _short(value: float) -> str:
    """Two digits, or three: what a reader keeps in mind."""
    return f"{value:.2g}" if value < 99.5 else f"{value:.0f}"


MECHANISMS = {"pruned": "For the pruning alone", "weights": "For the weights alone", "cache": "For the KV cache alone"}


def _mechanisms(rows: list[Row], paired: list[Paired]) -> list[str]:
    """What protection does to each mechanism on its own, where both were quantized."""
    by_name = {row.name: row for row in rows}
    sentences = []
    for name, what in MECHANISMS.items():
        pair = next((p for p in paired if (p.task, p.a, p.b) == ("divergence", f"{name}_control", name)), None)
        if pair is None:
            continue
        aware, control = (by_name[row].tasks["divergence"]["kl"].value for row in (name, f"{name}_control"))
        pays = "pays" if pair.low > 0 else "does not pay" if pair.high < 0 else "shows no difference"
        sentences.append(f"{what} it {pays}: {aware:.4g} against {control:.4g} nats, 95 % interval of the difference "
                         f"{pair.low:.2g} to {pair.high:.2g}.")
    return sentences


def _size(difference: float) -> str:
    return "of the same size" if abs(difference) < 5e-4 else f"(size within {abs(difference):.1%})"


def gate_failures(rows: list[Row], recovery: Recovery, fidelity: Fidelity | None, gate: Gate) -> list[str]:
    """The bounds of the recipe's gate that the sink-aware row breaks, in words; or the only row, by whatever name,
    beside the unquantized one.

    A bound that was not measured is not kept: nothing passes a gate unseen.
    """
    if all(bound is None for bound in gate.model_dump().values()):
        return []
    failures = []
    others = [row for row in rows if row.name != "unquantized"]
    result = next((row for row in others if row.name in RESULTS or len(others) == 1), None)
    if result is None:
        return ["the gate is of the sink-aware row, which is not here"]
    if gate.max_divergence is not None:
        tasks = result.tasks
        if "divergence" not in tasks:
            failures.append("gate.max_divergence was not measured: it needs the unquantized model beside the result")
        elif (found := tasks["divergence"]["kl"].value) > gate.max_divergence:
            failures.append(f"KL divergence {found:.4g} nats is over gate.max_divergence {gate.max_divergence:g}")
    if gate.min_recovery is not None:
        base = next((row.tasks for row in rows if row.name == "unquantized"), {})
        failures += [f"{task} {metric} of the result is not finite, so that gate.min_recovery is not kept"
                     for task, found in result.tasks.items()
                     for metric in base.get(task, {}) if metric not in found]
        kept = recovery.get(result.name, {})
        undefined = [f"recovery of {task} {metric} is not defined for {base[task][metric].value:.4g} unquantized and "
                     f"{found[metric].value:.4g}: gate.min_recovery is not kept"
                     for task, found in result.tasks.items()
                     for metric in base.get(task, {}) if metric in found and metric not in kept.get(task, {})]
        if not kept and not undefined:
            failures.append("gate.min_recovery was not measured: it needs the unquantized model beside the result")
        failures += undefined
        for task, metrics in kept.items():
            failures += [f"recovery {value:.4f} of {task} {metric} is under gate.min_recovery {gate.min_recovery:g}"
                         for metric, value in metrics.items() if value < gate.min_recovery]
    failures += _sink_failures(result.name, fidelity, gate)
    if gate.max_sink_rate_change is not None:
        rates = fidelity.sink_rate if fidelity is not None else {}
        if not {"unquantized", result.name} <= set(rates):
            failures.append("gate.max_sink_rate_change was not measured: no sink rates stand beside the result")
        elif (change := abs(rates[result.name]["0.3"] - rates["unquantized"]["0.3"])) > gate.max_sink_rate_change:
            failures.append(f"the sink rate changed by {change:.3f}, over gate.max_sink_rate_change "
                            f"{gate.max_sink_rate_change:g}")
    return failures


def _sink_failures(row: str, fidelity: Fidelity | None, gate: Gate) -> list[str]:
    """The bounds on a row's comparison with the unquantized model."""
    bounds = {"max_head_divergence": gate.max_head_divergence, "min_massive_overlap": gate.min_massive_overlap,
              "sinks": gate.sinks}
    found = fidelity.comparisons.get(row) if fidelity is not None else None
    if found is None:
        return [f"gate.{name} was not measured: sink fidelity needs the unquantized model beside the result"
                for name, bound in bounds.items() if bound is not None]
    failures = []
    divergence, overlap = (found.check(name).value for name in ("head_divergence", "massive_overlap"))
    if gate.max_head_divergence is not None and (divergence is None or divergence > gate.max_head_divergence):
        failures.append(f"the divergence of the heads' sink mass is {divergence:.4g} nats, over "
                        f"gate.max_head_divergence {gate.max_head_divergence:g}")
    if gate.min_massive_overlap is not None and overlap is not None and overlap < gate.min_massive_overlap:
        failures.append(f"the massive activations overlap by {overlap:.3f}, under gate.min_massive_overlap "
                        f"{gate.min_massive_overlap:g}")
    allowed = {"kept": ("kept", "no sinks"), "changed": ("kept", "changed", "no sinks")}
    if gate.sinks is not None and found.verdict not in allowed[gate.sinks]:
        failures.append(f"the sinks are {found.verdict}, and gate.sinks asks for {gate.sinks!r}")
    return failures
