"""LLaMA, BERT and RoBERTa in Flax NNX, and what they share."""
