"""fedq: federated learning with quantized updates for IoT fleets."""

from fedq.errors import ConfigError, DecodeError, FedqError
from fedq.layout import Layout
from fedq.registry import available, build

__version__ = "0.1.0"

__all__ = ["ConfigError", "DecodeError", "FedqError", "Layout", "available", "build"]
