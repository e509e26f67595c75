"""How a step will flow, and what it goes by.

In: a model and `StepOptions`.
Out: a `Plan` that the step and what a user looks at both read; built models.
"""
