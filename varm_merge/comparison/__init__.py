"""Several merges of the same models side by side: what they cost, where they end, how well they do.

``entries`` says what is compared, ``run`` does it step by step and goes on where it was stopped, ``steps`` keeps
what was done; ``distances`` and ``evaluation`` measure a model, ``programs`` start the programs that do;
``report``, ``plots`` and ``pages/compare.html`` tell what came of it.
"""
