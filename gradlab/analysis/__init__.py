"""Numbers in, frozen results out: theory, decay fits and verdicts on claims; torch is never imported here.

Names are resolved on first use, so that importing this package costs neither scipy nor pandas.

Example:
    >>> from gradlab import analysis
    >>> round(analysis.gradient_gain("relu", weight_var=2.0), 6)
    1.0
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradlab.analysis.activations import ACTIVATIONS, Activation, piecewise_linear
    from gradlab.analysis.architecture_theory import conv_parameters, multiply_adds, receptive_field
    from gradlab.analysis.claims import (
        Claim,
        Verdict,
        claims_from_json,
        claims_to_json,
        decide_exact,
        decide_greater,
        decide_theory,
        decide_threshold,
        mean_interval,
        not_decided,
    )
    from gradlab.analysis.correlations import DepthScale, correlation_fixed_point, correlation_map, depth_scale
    from gradlab.analysis.decay import DecayFit, fit_decay
    from gradlab.analysis.diagnosis import diagnose
    from gradlab.analysis.finding import Diagnosis, Evidence, Finding
    from gradlab.analysis.finite_width import LogNormLaw, finite_width_log_norm
    from gradlab.analysis.normalization_theory import (
        batchnorm_gradient_gain,
        residual_batchnorm_share,
        residual_variance_growth,
    )
    from gradlab.analysis.phases import PhaseDiagram, critical_line, phase_diagram
    from gradlab.analysis.published_rules import RULES
    from gradlab.analysis.recurrent_theory import PascanuBounds, pascanu_bounds
    from gradlab.analysis.theory import (
        fixed_point,
        gain_profile,
        gradient_gain,
        length_map,
        valid_tap_fraction,
        vgg_b_he_ratio,
    )
    from gradlab.analysis.time_decay import gradient_half_life

__all__ = [
    "ACTIVATIONS",
    "RULES",
    "Activation",
    "Claim",
    "DecayFit",
    "DepthScale",
    "Diagnosis",
    "Evidence",
    "Finding",
    "LogNormLaw",
    "PascanuBounds",
    "PhaseDiagram",
    "Verdict",
    "batchnorm_gradient_gain",
    "claims_from_json",
    "claims_to_json",
    "conv_parameters",
    "correlation_fixed_point",
    "correlation_map",
    "critical_line",
    "decide_exact",
    "decide_greater",
    "decide_theory",
    "decide_threshold",
    "depth_scale",
    "diagnose",
    "finite_width_log_norm",
    "fit_decay",
    "fixed_point",
    "gain_profile",
    "gradient_gain",
    "gradient_half_life",
    "length_map",
    "mean_interval",
    "multiply_adds",
    "not_decided",
    "pascanu_bounds",
    "phase_diagram",
    "piecewise_linear",
    "receptive_field",
    "residual_batchnorm_share",
    "residual_variance_growth",
    "valid_tap_fraction",
    "vgg_b_he_ratio",
]

_MODULES = {
    "activations": ("ACTIVATIONS", "Activation", "piecewise_linear"),
    "architecture_theory": ("conv_parameters", "multiply_adds", "receptive_field"),
    "claims": (
        "Claim",
        "Verdict",
        "claims_from_json",
        "claims_to_json",
        "decide_exact",
        "decide_greater",
        "decide_theory",
        "decide_threshold",
        "mean_interval",
        "not_decided",
    ),
    "correlations": ("DepthScale", "correlation_fixed_point", "correlation_map", "depth_scale"),
    "decay": ("DecayFit", "fit_decay"),
    "diagnosis": ("diagnose",),
    "finding": ("Diagnosis", "Evidence", "Finding"),
    "finite_width": ("LogNormLaw", "finite_width_log_norm"),
    "normalization_theory": ("batchnorm_gradient_gain", "residual_batchnorm_share", "residual_variance_growth"),
    "phases": ("PhaseDiagram", "critical_line", "phase_diagram"),
    "published_rules": ("RULES",),
    "recurrent_theory": ("PascanuBounds", "pascanu_bounds"),
    "theory": (
        "fixed_point",
        "gain_profile",
        "gradient_gain",
        "length_map",
        "valid_tap_fraction",
        "vgg_b_he_ratio",
    ),
    "time_decay": ("gradient_half_life",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
