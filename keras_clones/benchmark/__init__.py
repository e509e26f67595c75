"""The benchmark: `python -m keras_clones benchmark`.

In: models, peers and numbers of clones.
Out: times, bytes and transfers of a step, as a table, a picture and a file.
"""
