"""Does protection pay on this model, and is the result good enough?"""

from __future__ import annotations

from sinkquant.artifacts.report import Fidelity, Paired, Row, Verdict
from sinkquant.recipe import Gate


def judge(rows: list[Row], paired: list[Paired], recovery: dict[str, dict[str, dict[str, float]]],
          fidelity: Fidelity | None, gate: Gate) -> Verdict:
    """The verdict of a report: from the KL divergence of the sink-aware row against the control's, and the gate."""
    failures = gate_failures(rows, recovery, fidelity, gate)
    outcome = None
    if any(bound is not None for bound in gate.model_dump().values()):
        outcome = "failed" if failures else "passed"
    answer, sentence = _answer(rows, paired)
    return Verdict(answer=answer, sentence=sentence, gate=outcome, failures=failures)  # type: ignore[arg-type]


def _answer(rows: list[Row], paired: list[Paired]) -> tuple[str, str]:
    pair = next((p for p in paired if (p.task, p.a, p.b) == ("divergence", "control", "sink_aware")), None)
    if pair is None:
        return "not measured", "Whether protection pays was not measured: there is no control beside the result."
    by_name = {row.name: row for row in rows}
    aware, control = (by_name[name].tasks["divergence"]["kl"].value for name in ("sink_aware", "control"))
    sizes = by_name["sink_aware"].weight_bytes / by_name["control"].weight_bytes - 1
    figures = (f"mean KL divergence from the unquantized model is {aware:.4g} nats with protection and {control:.4g} "
               f"for the sink-unaware control ({_size(sizes)}); the difference is {pair.difference:.2g}, "
               f"95 % interval {pair.low:.2g} to {pair.high:.2g}")
    if pair.low > 0:
        return "pays", f"Protection pays on this model: {figures}, {1 - aware / control:.0%} less."
    if pair.high < 0:
        return "does not pay", f"Protection does not pay on this model: {figures}."
    return "no difference shown", f"No difference was shown on this model: {figures}."


def _size(difference: float) -> str:
    return "same size" if abs(difference) < 5e-4 else f"size within {abs(difference):.1%}"


def gate_failures(rows: list[Row], recovery: dict[str, dict[str, dict[str, float]]], fidelity: Fidelity | None,
                  gate: Gate) -> list[str]:
    """The bounds of the recipe's gate that the sink-aware row breaks, in words."""
    row = next((row for row in rows if row.name == "sink_aware"), None)
    failures = []
    if row is not None and gate.max_divergence is not None and "divergence" in row.tasks:
        found = row.tasks["divergence"]["kl"].value
        if found > gate.max_divergence:
            failures.append(f"KL divergence {found:.4g} nats is over gate.max_divergence {gate.max_divergence:g}")
    if gate.min_recovery is not None:
        for task, metrics in recovery.get("sink_aware", {}).items():
            failures += [f"recovery {value:.4f} of {task} {metric} is under gate.min_recovery {gate.min_recovery:g}"
                         for metric, value in metrics.items() if value < gate.min_recovery]
    if gate.max_sink_rate_change is not None and fidelity is not None:
        rates = fidelity.sink_rate
        if "unquantized" in rates and "sink_aware" in rates:
            change = abs(rates["sink_aware"]["0.3"] - rates["unquantized"]["0.3"])
            if change > gate.max_sink_rate_change:
                failures.append(f"the sink rate changed by {change:.3f}, over gate.max_sink_rate_change "
                                f"{gate.max_sink_rate_change:g}")
    return failures
