"""Which devices there are, which clone goes where, where variables live.

In: what a user asks for: numbers, device strings, a config.
Out: `PlacedClone`s with their devices, the home of each variable, shares of
rows.
"""
