"""Fine-tuning: tasks, their text and scores, recipes, models with heads.

`python -m train.finetune` puts them together. The loop, the checkpoints and
the log are those of pre-training.
"""
