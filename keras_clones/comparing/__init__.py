"""`compare`: whether a model trains the same on clones, and how fast.

In: a compiled model, or a function that makes it, and its data.
Out: a `Comparison`, of copies alone: the model stays as it is.
"""
