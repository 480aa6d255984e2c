"""Model zoo: one file per network; see :class:`fedq.models.base.Model`."""

from fedq.models.base import Model, count_parameters, create

__all__ = ["Model", "count_parameters", "create"]
