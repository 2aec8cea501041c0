"""What a person sees of the gradients while a net trains: snapshots of recorded numbers, drawn in the terminal."""

from gradlab.live.snapshot import LayerGroup, Snapshot, offered, offered_snapshot
from gradlab.live.view import LiveView

__all__ = ["LayerGroup", "LiveView", "Snapshot", "offered", "offered_snapshot"]
