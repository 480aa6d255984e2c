"""No privacy mechanism: the server sees each decoded update."""

from __future__ import annotations

from fedq.privacy.base import Privacy
from fedq.registry import register


@register("privacy", "none")
class NoPrivacy(Privacy):
    """The server sees each decoded update, and no epsilon is stated.

    Rounding at random, dithered or not, is no mechanism: an update that lies on the grid comes back
    as it was, and two updates may have no output in common.
    """
