"""Quantization: recipes (what becomes an integer, and how) and backends (which file a runtime gets)."""
