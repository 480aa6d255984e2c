"""What the server learns from a cohort's models: one file each, found by the registry."""

from fedq.distillation.base import Member, ServerDistillation

__all__ = ["Member", "ServerDistillation"]
