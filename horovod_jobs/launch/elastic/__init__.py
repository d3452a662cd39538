"""Elastic worlds: a driver that starts, watches and replaces ranks, and forms a new world of those that are there (docs/elastic.md).

``roster`` decides and is pure; ``rendezvous`` listens; ``spawn`` starts processes; ``discovery`` says where they may run; ``driver``
joins them. ``rounds`` is the other side: what a rank does between two worlds.
"""
