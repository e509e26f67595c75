"""What a user passes to `fit`.

In: a training model, and TensorFlow's profile of its steps.
Out: verdicts, timelines and summaries.
"""
