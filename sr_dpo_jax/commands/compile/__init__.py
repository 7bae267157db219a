"""`sr-dpo compile`: the programs of a configuration, compiled for TPUs that are not there."""
