"""What ludic keeps on a disk, and what it may show: checksummed folders, JSON lines, keys, the run's lock. No torch."""
