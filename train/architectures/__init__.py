"""Small training runs of architectures beyond LLaMA, one file each."""
