"""Stages 4 and 5, train and evaluate: fusion, loss, trainer."""
