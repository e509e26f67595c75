"""The train, test and predict step: one global batch, from data to logs.

In: a model, `StepOptions` and a batch.
Out: logs or outputs, with every variable updated.
"""
