"""What pruning saves: FLOPs by every convention, latency phase by phase, memory."""
