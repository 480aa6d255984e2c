"""No privacy mechanism: the server sees each decoded update."""

from __future__ import annotations

from fedq.privacy.base import Privacy
from fedq.registry import register


@register("privacy", "none")
class NoPrivacy(Privacy):
    """The server sees each decoded update."""
