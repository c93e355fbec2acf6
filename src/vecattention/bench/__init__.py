"""Times of selection, attention and the whole call on a GPU, beside dense attention and the other methods.

Nothing is timed before its error against float64 has been measured on sampled rows, or its lists have been compared
with the reference's; every number becomes a record.
"""
