"""Pairwise knowledge fusion: from source LLMs and chat data to the target checkpoints that VaRM merges.

The stages (FusionChat, arXiv 2402.16107, sections 3.1 and 3.2) are representation extraction, token and
vocabulary alignment, and fine-tuning of the pivot on the fused distributions. The package and
``varm_merge`` never import each other: they meet in files, a target checkpoint and a mergekit recipe.
"""

from varm_common.moved import keep_old_names

__all__: list[str] = []

keep_old_names(
    {
        "fusion_trainer.errors": "varm_common.errors",
        "fusion_trainer.files": "varm_common.files",
        "fusion_trainer.models": "varm_common.models",
        "fusion_trainer.tokens": "fusion_trainer.text.tokenizer",
        "fusion_trainer.conversations": "fusion_trainer.data.conversations",
        "fusion_trainer.dialogues": "fusion_trainer.data.dialogues",
        "fusion_trainer.prepare": "fusion_trainer.data.prepare",
        "fusion_trainer.templates": "fusion_trainer.data.templates",
        "fusion_trainer.batches": "fusion_trainer.training.batches",
        "fusion_trainer.evaluate": "fusion_trainer.training.evaluate",
        "fusion_trainer.fusion": "fusion_trainer.training.fusion",
        "fusion_trainer.loss": "fusion_trainer.training.loss",
        "fusion_trainer.train": "fusion_trainer.training.train",
        "fusion_trainer.trainer": "fusion_trainer.training.trainer",
    }
)
