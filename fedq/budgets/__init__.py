"""How many levels each client's codec has in each round: one file each, found by the registry."""

from fedq.budgets.base import Budget, Candidate, History

__all__ = ["Budget", "Candidate", "History"]
