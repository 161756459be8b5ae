"""What pruning saves: FLOPs by every convention, latency of each phase, memory."""
