"""What one clone runs in: its input, its variables, its draws, its changes.

In: a clone's rows, mirrors, seeds and numbers, as `TowerInput`.
Out: what its layers assigned, added and left, with how that merges.
"""
