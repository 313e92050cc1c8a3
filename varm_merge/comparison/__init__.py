"""Merge the same models by several recipes, and report cost, distances and scores side by side.

``recipes`` reads or writes the recipes. ``runner`` does every step once and resumes after an interruption;
``cache`` stores the results of steps. ``distances``, ``scores`` and ``tasks`` measure a model. ``columns``,
``report`` and ``plots`` show the results.
"""
