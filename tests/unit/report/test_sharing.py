"""The plot of uneven shares: made of what the balancer records, and left out where nothing was balanced."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from types import SimpleNamespace

from horovod_jobs.report.sharing import Sharing, of_stages, shares_over_time


def stage(name, exchange):
    return SimpleNamespace(entry={"name": name}, meta={"details": {"exchange": exchange}})


def record(step, *shares, step_ms=10.0):
    return {"step": step, "shares": list(shares), "ms_a_sample": [1.0] * len(shares), "step_ms": step_ms}


HISTORY = [record(20, 0.5, 0.5), record(40, 0.6, 0.4, step_ms=9.0), record(60, 0.65, 0.35, step_ms=8.0)]


def test_only_stages_that_were_balanced_are_shown():
    stages = [
        stage("even", {"balance": {}}),
        stage("balanced", {"balance": {"history": HISTORY}}),
        stage("server", {}),
        SimpleNamespace(entry={"name": "report"}, meta={}),
        SimpleNamespace(entry={"name": "old"}, meta={"details": {"exchange": None}}),
    ]
    assert of_stages(stages) == [Sharing("balanced", HISTORY)]
    assert shares_over_time([]) == ""


def test_the_plot_is_one_svg_with_a_line_a_rank_and_the_same_each_time():
    many = Sharing("wide", [record(20, *[0.1] * 10)])
    text = shares_over_time([Sharing("model <1>", HISTORY), many])
    assert text == shares_over_time([Sharing("model <1>", HISTORY), many])
    root = ET.fromstring(text.replace("&nbsp;", " "))
    words = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"rank 0", "rank 1", "model <1>: share of the batch, %", "wide: time of a step, ms"} <= words
    assert "rank 9" not in words, "ten ranks have lines and no legend"
    assert root.get("aria-label") == "Shares of the batch by rank in model <1>, wide"
