"""Run PyTorch models that do not fit in the memory you allow, under a cap that is never crossed."""
