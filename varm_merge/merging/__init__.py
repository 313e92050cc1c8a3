"""The merge: units, statistics, weights, and the method that mergekit calls."""
