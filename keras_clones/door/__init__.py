"""`clone_model` and its kin: the only room that changes a user's model.

In: a `keras.Model` and what is asked for it.
Out: the same model with steps of its own, and its `Deployment`.
"""
