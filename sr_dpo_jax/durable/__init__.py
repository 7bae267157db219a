"""The parts that let a run survive: checkpoints, their digests, the lease, signals, watchdog, files written whole."""
