"""What a run would take: bytes, FLOPs, communication."""
