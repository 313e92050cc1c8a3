"""``python -m fusion_trainer``, and ``accelerate launch -m fusion_trainer``."""

from fusion_trainer.cli import main

main(prog_name="fusion-trainer")
