"""The histogram of staleness: what the servers counted, in a plot and in a line."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from types import SimpleNamespace

from horovod_jobs.report.staleness import Staleness, histogram, of_stages


def stage(name, **exchange):
    return SimpleNamespace(entry={"name": name}, meta={"details": {"exchange": exchange}})


def test_only_stages_with_a_parameter_server_are_shown():
    counted = {"10": 1, "0": 240, "2": 27, "1": 213}
    stages = [
        stage("even"),
        stage("ssp", consistency="ssp", staleness_bound=2, read_staleness_steps=counted),
        stage("async", consistency="async", staleness_bound=2, read_staleness_steps={"0": 1}),
        stage("nothing", consistency="ssp", staleness_bound=2, read_staleness_steps={}),
        SimpleNamespace(entry={"name": "report"}, meta={}),
    ]
    found = of_stages(stages)
    assert found == [Staleness("ssp", {0: 240, 1: 213, 2: 27, 10: 1}, 2), Staleness("async", {0: 1}, None)]
    assert list(found[0].reads) == [0, 1, 2, 10], "in the order of numbers, not of texts"
    assert histogram([]) == ""


def test_the_line_has_every_share():
    text = Staleness("model", {0: 240, 1: 213, 2: 27}, 2).text
    assert text == (
        "staleness in model: of 480 reads 50 % missed 0, 44.4 % missed 1, 5.62 % missed 2 steps of the slowest worker (bound 2)"
    )


def test_the_plot_is_one_svg_and_the_same_each_time():
    records = [Staleness("model <1>", {0: 240, 2: 27}, 2), Staleness("free", dict.fromkeys(range(60), 1), None)]
    text = histogram(records)
    assert text == histogram(records)
    root = ET.fromstring(text.replace("&nbsp;", " "))
    words = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"model <1>: share of 267 reads, %", "free: share of 60 reads, %", "bound of 2"} <= words
