"""What every stage needs, imported once: the stages of a run are forked off it."""

import gc

import fusion_trainer.alignment.align
import fusion_trainer.representations.extract
import fusion_trainer.training.evaluate
import fusion_trainer.training.train  # noqa: F401

__all__: list[str] = []

gc.freeze()  # what is imported is never collected, and not looked through either
