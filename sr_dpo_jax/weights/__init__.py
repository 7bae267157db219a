"""Hugging Face safetensors <-> parameters: families (one table each, both ways) -> directory, read in that order."""
