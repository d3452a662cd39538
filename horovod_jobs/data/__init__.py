"""Data sets, their splits, sharding over ranks and augmentation."""
