"""`sr-dpo inspect`: a model's architecture, tokenizer and memory before a run, without a device."""
