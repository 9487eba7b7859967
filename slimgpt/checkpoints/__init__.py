"""What models look like on disk: families, shards, the hub, and the form of a pruned checkpoint."""
