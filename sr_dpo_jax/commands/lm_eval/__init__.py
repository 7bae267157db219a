"""`sr-dpo lm-eval`: tasks of lm-evaluation-harness with the model on the mesh."""
