"""Pairwise knowledge fusion: from source LLMs and chat data to the target checkpoints that VaRM merges.

The stages (FusionChat, arXiv 2402.16107, sections 3.1 and 3.2) are representation extraction, token and
vocabulary alignment, and fine-tuning of the pivot on the fused distributions. The package and
``varm_merge`` never import each other: they meet in files, a target checkpoint and a mergekit recipe.
"""
