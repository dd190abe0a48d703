"""The models: a LLaMA, BERT-like encoders, their attention."""
