"""Hugging Face safetensors <-> parameters: families (one table each, both ways), layout, directory, read, write."""
