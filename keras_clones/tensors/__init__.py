"""Tensors: split, joined, packed, sent, added up, and read in their graph.

In: tensors, nests of them, device strings.
Out: the same, elsewhere or in other parts. Nothing here knows of models.
"""
