"""A step that runs once, on the global batch: its layer calls run on clones.

In: a step as a function, and the calls of layers that it makes.
Out: what these calls return on one device, with a way back for tapes.
"""
