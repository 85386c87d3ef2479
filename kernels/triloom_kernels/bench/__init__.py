"""Every operation against torch, torch.compile and the kernels of others: ``python -m triloom_kernels.bench``."""
