"""Pairwise knowledge fusion: from source LLMs and chat data to the target checkpoints that VaRM merges.

The stages (FusionChat, arXiv 2402.16107, sections 3.1 and 3.2) are representation extraction, token and
vocabulary alignment, and fine-tuning of the pivot on the fused distributions. The package and
``varm_merge`` never import each other: they meet in files, a target checkpoint and a mergekit recipe.
"""

from varm_common.moved import keep_old_names

__all__: list[str] = []

MOVED = {
    "varm_common": ("errors", "files", "models"),
    "fusion_trainer.data": ("conversations", "dialogues", "prepare", "templates"),
    "fusion_trainer.training": ("batches", "evaluate", "fusion", "loss", "train", "trainer"),
}
"""Modules that were in this folder, by the package that they are in now."""

keep_old_names({"fusion_trainer.tokens": "fusion_trainer.text.tokenizer"})
keep_old_names({f"fusion_trainer.{name}": f"{new}.{name}" for new, names in MOVED.items() for name in names})
