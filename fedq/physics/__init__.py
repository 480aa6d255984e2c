"""The physics of a simulated fleet: how fast devices train, what links carry, and what both take.

Values and arithmetic alone: no messages, no models. :class:`fedq.physics.clock.Clock` turns bytes
and multiply-accumulates into seconds and joules; :mod:`fedq.engines.timed` asks it.
"""
