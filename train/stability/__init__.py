"""Long runs of a small model: does anything drift, does anything get lost?"""
