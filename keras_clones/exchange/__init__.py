"""Between home and the clones: rows and mirrors out, results back.

In: shards, mirrors and a tower function.
Out: a `Layout`, a traced tower that each clone calls, results at home.
"""
