"""diagnose(): what is wrong with the gradients of a trace, where, why, and what helps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from gradlab.analysis.finding import Diagnosis, Finding
from gradlab.analysis.gradient_findings import depth_findings, growth_findings, time_findings
from gradlab.analysis.state_findings import (
    first_nonfinite,
    frozen_findings,
    nonfinite_finding,
    skipped_finding,
    unit_findings,
)
from gradlab.analysis.trace_views import usable_steps
from gradlab.errors import DataError, UsageError, unknown

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from gradlab.trace import Trace

__all__ = ["OWN_RULES", "check_rules", "diagnose"]

OWN_RULES: Final = "gradlab"


def diagnose(trace: Trace, *, rules: str = OWN_RULES) -> Diagnosis:
    """Find what is wrong with the gradients that a trace recorded.

    Scale-free evidence decides: the slope of the log norm over depth or time with its interval, then ratios, then
    changes over training. A large or small scale alone (a summed loss, a big batch, a converged net) is no finding.

    Args:
        trace: What `gl.watch` recorded: a few steps are enough; the more, the surer.
        rules: "gradlab", or the name of a published rule set (`gradlab.analysis.RULES`) to compare with.

    Returns:
        The findings, leading one first, and what the trace could not show. One sick cause gives one finding: where
        numbers are not finite, nothing after that step is judged; dead or saturated units explain a gradient that
        vanishes behind them.

    Raises:
        UsageError: No trace, or no such rules.
        DataError: The trace holds no step, or several merged runs.

    Example:
        >>> import pandas as pd
        >>> from gradlab.trace import Trace
        >>> rows = [(0, f"{n}", n, 10.0 ** (n - 9)) for n in range(10)]  # 1e-9 at the first layer, 1 at the last
        >>> layers = pd.DataFrame(rows, columns=["step", "layer", "order", "grad_norm"])
        >>> found = diagnose(Trace({"layers": layers}))
        >>> found.healthy, found.leading.title
        (False, 'vanishing through depth')
    """
    from gradlab.trace import Trace

    check_rules(rules)
    if not isinstance(trace, Trace):
        raise UsageError(f"diagnose takes a Trace (probe.trace, or gradlab.load of a saved one); got {_kind(trace)}.")
    if "merged" in trace.info:
        raise DataError("This trace merges several runs: diagnose them one by one.")
    if trace.layers.empty and trace.params.empty and trace.steps.empty:
        raise DataError("The trace is empty: no step was closed while the model was watched.")
    if rules == OWN_RULES:
        return Diagnosis(findings=tuple(_findings(trace)), notes=tuple(_notes(trace)), rules=rules)
    from gradlab.analysis.published_rules import RULES

    return Diagnosis(findings=RULES[rules](trace), rules=rules)


def check_rules(name: str) -> None:
    """Refuse a name that is no set of rules, before anything is trained or recorded for it.

    Raises:
        UsageError: There are none of that name.
    """
    from gradlab.analysis.published_rules import RULES

    if name not in (OWN_RULES, *RULES):
        raise unknown("rules", name, [OWN_RULES, *RULES])


def _kind(value: object) -> str:
    return type(value).__name__


def _findings(trace: Trace) -> list[Finding]:
    steps = usable_steps(trace)
    skipped = skipped_finding(trace)
    if skipped is not None:
        return [skipped]
    broken = first_nonfinite(trace, steps)
    if broken is not None:
        return [nonfinite_finding(trace, broken)]
    return _finite_findings(trace, steps) if len(steps) else []


def _finite_findings(trace: Trace, steps: NDArray[np.int64]) -> list[Finding]:
    training = growth_findings(trace, steps)
    units = unit_findings(trace, steps)
    depth, time = depth_findings(trace, steps), time_findings(trace, steps)
    exploding = [*training, *(finding for finding in (*depth, *time) if finding.kind == "exploding")]
    vanishing = [finding for finding in (*depth, *time) if finding.kind == "vanishing"]
    # What grows drives units into saturation; units that pass nothing back explain a gradient that ends there.
    gradients = exploding[:1] if exploding else units or vanishing
    return [*gradients, *frozen_findings(trace, steps)]


def _notes(trace: Trace) -> list[str]:
    info = trace.info
    notes = [str(note) for note in info.get("notes", ())]
    unwatched = info.get("time_not_watched") or ()
    if unwatched:
        names = ", ".join(map(str, unwatched))
        notes.append(f"Time was not watched: {names} may vanish or explode through time; use timesteps=True.")
    if info.get("not_seen"):
        names = ", ".join(f"{name or 'the model itself'} ({why})" for name, why in dict(info["not_seen"]).items())
        notes.append(f"Not seen: {names}.")
    if trace.layers["grad_norm"].isna().all():
        notes.append("No gradient was recorded: no backward pass ran while the model was watched.")
    return notes
