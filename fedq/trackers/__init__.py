"""Where a run's figures may go besides its directory: one file per service, registered by name."""

from fedq.trackers.base import Tracker, tracking

__all__ = ["Tracker", "tracking"]
