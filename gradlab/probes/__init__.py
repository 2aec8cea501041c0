"""What is recorded: probes that know any nn.Module and no net or task of ours."""

from gradlab.probes.schedule import Schedule, log_spaced
from gradlab.probes.watch import LayerSelection, Probe, watch

__all__ = ["LayerSelection", "Probe", "Schedule", "log_spaced", "watch"]
