"""What makes a run survive: checkpoints and their digests, the lease, signals, the watchdog, files written whole."""
