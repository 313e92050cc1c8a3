"""Search for the parameters of a merge with the lowest loss on held-out text.

``parameters`` says which numbers of a recipe are searched and writes them into it, ``scorer`` merges and scores
without writing weights, ``search`` chooses what to try next, ``tune`` does all of it, and ``report`` shows it.
"""
