"""Several merges of the same models side by side: cost, distances, scores.

``recipes`` says what is compared. ``runner`` does it step by step and resumes after an interruption; ``cache``
keeps finished steps. ``distances`` and ``scores`` measure a model, ``programs`` starts the programs that score.
``report``, ``plots`` and ``pages/compare.html`` show the results.
"""
