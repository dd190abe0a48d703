"""Fine-tuning: tasks, examples, models with heads, scores, recipes.

`python -m train.finetune` is the command. The training loop, the checkpoints
and the log are shared with pre-training, in `train/run/`.
"""
