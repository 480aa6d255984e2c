"""How the aggregated, quantized model behaves under attack, and what it and its updates leak.

``fedq evaluate RUN`` runs a suite of registered evaluations on one run and writes a card.
"""
