"""Measurements that the README quotes. Each module is a script: ``python -m benchmarks.NAME [--quick] [--json PATH]``."""
