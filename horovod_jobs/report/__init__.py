"""A run made readable: an HTML page, a model card, and a table for the console.

``collect`` gathers a run's figures; ``render_html``, ``render_model_card`` and ``render_terminal_table`` show them.
"""

from __future__ import annotations

from horovod_jobs.report.collect import Curve, ModelRow, ReportData, StageView, collect
from horovod_jobs.report.html import render_html
from horovod_jobs.report.model_card import render_model_card
from horovod_jobs.report.terminal import render_terminal_table, summary

__all__ = [
    "Curve",
    "ModelRow",
    "ReportData",
    "StageView",
    "collect",
    "render_html",
    "render_model_card",
    "render_terminal_table",
    "summary",
]
