"""Ways to compute attention that skip what no token sees: splash (TPU), triton (NVIDIA GPU), tiled (CPU)."""
