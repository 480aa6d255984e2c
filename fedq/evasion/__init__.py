"""Attacks on inputs: small changes that make a network err, as registered values.

``fedq.robustness`` evaluates with them, adversarial training trains against one.
"""
