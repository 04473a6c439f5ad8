"""Both ends of a weight sync: transports, buckets, digests and proof."""
