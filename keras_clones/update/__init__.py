"""Updating variables, in the fastest way that comes to what Keras comes to.

In: optimizers that are about to update, and gradients.
Out: variables and slots, assigned by a kernel of TensorFlow's, by a function
that XLA compiles, or as Keras does it.
"""
