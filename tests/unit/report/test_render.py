"""The page, the card and the table: their figures are the run's, they are self-contained, and odd input stays text."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
import yaml

from horovod_jobs import formats
from horovod_jobs.report import collect, render_html, render_model_card, render_terminal_table, summary
from horovod_jobs.report.collect import _name_of
from horovod_jobs.report.drawing import Box, draw_graph, layers
from horovod_jobs.report.model_card import card_metadata
from horovod_jobs.report.plots import learning_curves, trade_offs
from horovod_jobs.report.table import main_table
from horovod_jobs.report.words import bytes_note, interval, summary_sentences


@pytest.fixture(scope="module")
def run_dir(sample, tmp_path_factory):
    return sample.write_sample(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def data(run_dir):
    return collect(run_dir)


@pytest.fixture(scope="module")
def page(data):
    return render_html(data)


def sections(page):
    return re.findall(r"<h2>(.*?)</h2>", page)


def test_page_has_every_section_and_the_figures(page):
    assert sections(page) == [
        "Models",
        "Accuracy against size and latency",
        "Accuracy by class, from teacher to int8 student",
        "Confusion matrix of int8 student",
        "Learning curves",
        "Job graph",
        "Time and footprint by stage",
        "Stages",
        "Reproduce it",
    ]
    for figure in ("91.20", "89.80", "242,762", "0.110 / 0.132", "2.33", "± 0.56 points", "381 g/kWh (DEU)"):
        assert figure in page
    assert "&#39;name=a b&#39;" in page  # the command is quoted for a shell
    assert "horovod_jobs.data.fashion_mnist" in page  # the config
    assert "mpi4py not installed" in page


def test_how_the_energy_was_found_is_said_once_and_the_shaded_row_explained(page):
    assert page.count("RAM by installed memory") == 1
    assert "The shaded row is the final model" in page
    assert page.count('<tr class="final">') == 1
    assert "on Measured CPU." in page


def test_what_it_takes_to_repeat_the_run(data, page):
    assert "PYTHONPATH=&#39;a b&#39; horovod-jobs experiment=main" in page
    for text in (page, render_model_card(data)):
        assert "Data digest: " + "ab" * 32 in text
        assert "cd" * 20 + ", with changes that were not committed" in text
    older = replace(data, manifest={key: value for key, value in data.manifest.items() if key != "origin"})
    assert "Data digest" not in render_html(older)


def test_without_a_meter_nothing_is_said_of_energy(data):
    nothing = {"energy_kwh": None, "co2_kg": None, "cost_usd": None, "footprint_method": "not metered"}
    bare = replace(
        data,
        stages=[replace(s, entry={**s.entry, **nothing}) for s in data.stages],
        models=[replace(r, energy_kwh=None, co2_kg=None, cost_usd=None, method="not metered") for r in data.models],
        manifest={**data.manifest, "totals": {**data.manifest["totals"], "artifacts": nothing}},
        footprint={"hosts": 1},
    )
    page = render_html(bare)
    assert "No meter was configured" in page
    assert "energy was not metered." in page
    assert "Time is of the stage that made the model." in page
    for wrong in ("PUE", "counted once", "Energy", "CO2e,", "Cost,"):
        assert wrong not in page
    assert "on Measured CPU." in page
    assert "No meter was configured" in render_model_card(bare)


def test_classes_that_are_numbers_are_called_classes(data):
    rows = [replace(row, worst_class=_name_of(2, [str(i) for i in range(10)])) for row in data.models]
    shown = replace(data, models=rows)
    for text in (
        render_html(shown).replace("\u00a0", " "),
        render_terminal_table(shown, width=300),
        render_model_card(shown),
    ):
        assert "70.0 % (class 2)" in text
    assert "accuracy is lowest for class 2, 70.00 %" in " ".join(summary_sentences(shown))
    assert "70.0 % (Shirt)" in render_terminal_table(data, width=300)


def test_one_unit_of_money_a_table(data):
    table = main_table(data)
    column = [row[table.columns.index("Cost, µUSD")] for row in table.rows]
    assert column == ["582", "159", "252", "35.9"]


def curve_words(*curves):
    root = ET.fromstring(learning_curves(curves).replace("&nbsp;", " "))
    return [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]


def test_curves_have_the_tables_names_and_a_distilled_model_its_own_panel(data, page):
    assert [curve.label for curve in data.curves] == ["teacher", "student without distillation", "student"]
    words = curve_words(*data.curves)
    assert {"Training loss", "Training loss, distillation", "Validation accuracy, %"} <= set(words)
    assert "student without distillation" in words
    assert "plain" not in words
    assert "has a panel of its own" in page
    assert "Training loss, distillation" not in curve_words(*data.curves[:2])


def test_one_epoch_has_one_tick(data):
    short = replace(data.curves[0], history=data.curves[0].history[:1])
    words = curve_words(short)
    below = words[: words.index("Epoch")]
    assert [word for word in below if re.fullmatch(r"[\d.]+", word)] == ["1"]


def test_equal_models_are_both_seen(data):
    """Markers are open: one does not cover another."""
    twins = [replace(data.models[i], label=f"twin {i}", metrics=data.models[1].metrics) for i in (1, 2)]
    svg = trade_offs([data.models[0], *twins])
    markers = re.findall(r"PathCollection.*?</g>", svg, flags=re.DOTALL)
    assert len(markers) >= 6
    assert all("fill: none" in marker for marker in markers)


def test_a_rank_that_was_lost_is_named(data):
    assert not any("ended on the way" in sentence for sentence in summary_sentences(data))
    world = {**data.manifest["world"], "lost": [{"rank": 1, "host": "node7"}]}
    first = summary_sentences(replace(data, manifest={**data.manifest, "world": world}))[0]
    assert "Rank 1 on node7 ended on the way, and the others went on without it." in first


def test_page_is_self_contained(page):
    assert "<script" not in page
    assert not re.search(r'\b(src|data)="', page)
    links = set(re.findall(r'(?:href|url\()[="\']*([^"\')\s]+)', page))
    assert all(link.startswith("#") for link in links), links
    assert "@import" not in page


def test_page_is_well_formed_and_its_ids_are_unique(page):
    for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        ET.fromstring(svg)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    for target in re.findall(r'(?:url\(#|href="#)([^)"]+)', page):
        assert target in ids


def test_page_is_the_same_every_time(data, page):
    assert render_html(data) == page


def test_sections_without_figures_vanish(sample, tmp_path):
    only_model = render_html(collect(sample.write_sample(tmp_path / "a", only={"teacher", "eval_teacher", "report"})))
    assert "Accuracy by class" not in only_model
    assert "Accuracy against" not in only_model
    assert "Confusion matrix of teacher" in only_model
    only_train = render_html(collect(sample.write_sample(tmp_path / "b", only={"teacher"})))
    assert sections(only_train) == [
        "Learning curves",
        "Job graph",
        "Time and footprint by stage",
        "Stages",
        "Reproduce it",
    ]


def test_a_failed_run_shows_its_error(sample, tmp_path):
    page = render_html(collect(sample.write_sample(tmp_path, status="failed")))
    assert "the loss is not finite (step 12)" in page
    assert 'class="status failed"' in page


def test_markup_in_names_stays_text(sample, tmp_path):
    data = collect(sample.write_sample(tmp_path, name="<script>alert(1)</script> [b]$x_1$|*"))
    evil = '<img src="x"> [red]a[/red] $y^2$ | b'
    data = replace(data, models=[replace(row, label=evil, class_names=[evil] * 10) for row in data.models])
    page = render_html(data)
    assert "<script" not in page
    assert "<img" not in page
    assert "[red]a[/red]" in render_terminal_table(data, width=300)
    card = render_model_card(data)
    assert "<script>" not in card.split("---", 2)[2]
    assert yaml.safe_load(card.split("---\n")[1])["model-index"][0]["name"].startswith("<script>")
    cells = [re.sub(r"\\\|", "", line).count("|") for line in card.splitlines() if line.startswith("| ")]
    assert cells
    assert set(cells) == {13, 3}  # twelve columns, and two in the table of classes


def test_sentences(data):
    text = " ".join(summary_sentences(data))
    assert "9 ran, 1 was reused" in text
    assert (
        "classifies 89.80 % of the 10,000 test samples correctly, 1.40 percentage points fewer than the teacher" in text
    )
    assert "10.3 times fewer parameters" in text
    assert "At batch 1 its median latency is 0.110 ms in onnxruntime; the teacher's is 0.610 ms in torch." in text
    assert "Distillation raised the student's accuracy by 1.00 points" in text
    assert "within the sampling error" not in text  # 1.00 points is more than 0.59
    assert "1.14 mUSD (estimated), reused" in text
    assert "accuracy is lowest for Shirt, 70.00 %" in text


def test_a_change_within_the_sampling_error_is_called_so(data):
    models = [
        replace(r, metrics={**r.metrics, "accuracy": {"plain": 0.897, "student": 0.898}.get(r.stage, 0.9)})
        for r in data.models
    ]
    text = " ".join(summary_sentences(replace(data, models=models)))
    assert "raised the student's accuracy by 0.10 points" in text
    assert "within the sampling error" in text


def test_interval(data):
    assert interval(data.models[0]) == pytest.approx(1.96 * (0.912 * 0.088 / 10_000) ** 0.5)


def test_bytes_note_tells_when_the_graph_outweighs_the_weights(data):
    note = bytes_note(data)
    assert "In int8 student the graph outweighs the tensors." in note
    assert "From student to int8 student the tensors shrink 4.0-fold and the file 1.9-fold." in note
    assert f"{data.models[3].file_bytes:,} bytes, of which 23,530" in note


def test_card_metadata(data):
    data = replace(data, license="apache-2.0")
    card = render_model_card(data)
    assert card.startswith("---\n")
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata == card_metadata(data)
    assert metadata["license"] == "apache-2.0"
    assert metadata["library_name"] == "onnx"
    assert metadata["datasets"] == ["fashion_mnist"]
    assert metadata["tags"] == ["horovod", "image-classification", "knowledge-distillation", "quantized"]
    result = metadata["model-index"][0]["results"][0]
    assert result["task"] == {"type": "image-classification"}
    assert result["dataset"] == {"type": "fashion_mnist", "name": "fashion_mnist", "split": "test"}
    assert result["metrics"][0] == {"type": "accuracy", "value": pytest.approx(0.898), "name": "Accuracy"}
    emissions = metadata["co2_eq_emissions"]
    # Teacher, student and int8 led to the final model; the plain student and the evaluations did not.
    assert emissions["emissions"] == pytest.approx((152.3 + 66.0 + 9.4) * 55 / 3.6e6 * 380.95)
    assert emissions["source"].startswith("estimated")
    assert emissions["geographical_location"] == "DEU"
    assert emissions["training_type"] == "pre-training"


def test_card_leaves_out_emissions_that_are_not_known(data):
    stages = [replace(s, entry={**s.entry, "co2_kg": None}) if s.entry["name"] == "teacher" else s for s in data.stages]
    assert "co2_eq_emissions" not in card_metadata(replace(data, stages=stages))


@pytest.mark.parametrize("width", [300, 160, 100, 60, 40])
def test_terminal_table_fits_and_has_every_figure(data, width):
    text = render_terminal_table(data, width=width)
    assert max(map(len, text.splitlines())) <= width
    for figure in ("91.20 %", "89.80 %", "242,762", "2.33"):
        assert figure in text
    assert "\x1b" not in text


def test_summary_names_the_report(run_dir, data, tmp_path, sample):
    assert "horovod-runs report" in summary(run_dir)
    (run_dir / "report.html").write_text("x")
    assert f"Report: {run_dir / 'report.html'}" in summary(run_dir)
    (run_dir / "report.html").unlink()
    bare = sample.write_sample(tmp_path, only={"teacher"})
    assert render_terminal_table(collect(bare)) == ""
    assert summary(bare).startswith("Run:")


def test_graph_layers_and_drawing():
    needs = {"a": [], "b": ["a"], "c": ["a", "b"], "d": ["c", "elsewhere/x"], "e": []}
    assert layers(needs) == {"a": 0, "b": 1, "c": 2, "d": 3, "e": 0}
    boxes = [Box(name, f"train & <{name}>", "ran", sources) for name, sources in needs.items()]
    root = ET.fromstring(draw_graph(boxes))
    rects = [(float(r.get("x")), float(r.get("y"))) for r in root.iter("{http://www.w3.org/2000/svg}rect")]
    assert len(set(rects)) == 5
    paths = [p for p in root.iter("{http://www.w3.org/2000/svg}path") if p.get("marker-end")]
    assert len(paths) == 4
    assert draw_graph([]) == ""


def test_graph_survives_a_cycle_in_a_damaged_manifest():
    boxes = [Box("a", "", "ran", ["b"]), Box("b", "", "ran", ["a"])]
    ET.fromstring(draw_graph(boxes))


def test_long_edges_pass_no_box():
    """A graph whose last stage needs the first: the edge's lane lies in no box of the columns between."""
    needs = {"a": [], "b": ["a"], "c": ["b"], "d": ["c", "a"]}
    root = ET.fromstring(draw_graph([Box(n, "", "ran", s) for n, s in needs.items()]))
    boxes = [
        tuple(float(r.get(k)) for k in ("x", "y", "width", "height"))
        for r in root.iter("{http://www.w3.org/2000/svg}rect")
    ]
    for path in root.iter("{http://www.w3.org/2000/svg}path"):
        numbers = [tuple(map(float, pair)) for pair in re.findall(r"L([\d.]+) ([\d.]+)", path.get("d"))]
        for x, y in numbers:
            assert not any(bx < x - 1 < bx + w and by < y < by + h for bx, by, w, h in boxes)


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (formats.percent, 0.91234, "91.23 %"),
        (formats.percent, None, "–"),
        (formats.points, -0.0123, "−1.23"),
        (formats.points, 0.004, "+0.40"),
        (formats.points, -0.00001, "0.00"),
        (formats.integer, 1234567, "1,234,567"),
        (formats.size, 999, "999 B"),
        (formats.size, 50690, "50.7 kB"),
        (formats.size, 2_500_000, "2.5 MB"),
        (formats.duration, 9.44, "9.44 s"),
        (formats.duration, 59.9999, "60 s"),
        (formats.duration, 75.3, "1 min 15 s"),
        (formats.duration, 3725, "1 h 02 min"),
        (formats.duration, 0, "0 s"),
        (formats.significant, 0.0000123, "0.0000123"),
        (formats.significant, 123456.0, "123,000"),
        (formats.milliseconds, 0.61, "0.610"),
        (formats.milliseconds, 123.4, "123"),
        (formats.milliseconds, 12345.0, "12,300"),
        (formats.energy, 0.0054, "5.4 Wh"),
        (formats.energy, 2.0, "2 kWh"),
        (formats.energy, 0.0, "0 kWh"),
        (formats.energy, None, "–"),
        (formats.mass, 0.000886, "886 mg"),
        (formats.money, 0.00114, "1.14 mUSD"),
        (formats.money, 0.00000613, "6.13 µUSD"),
        (formats.money, 12.3, "12.3 USD"),
        (formats.three_digits, 210.04, "210"),
        (formats.three_digits, 5.4, "5.40"),
        (formats.three_digits, 0.0, "0"),
        (formats.three_digits, -0.61, "−0.610"),
    ],
)
def test_formats(function, value, text):
    assert function(value) == text
