"""The page: complete in itself, with escaped texts; and what happens if a part is missing."""

import base64
import dataclasses
import hashlib
import html.parser
import re

import numpy as np
import pytest

from tests.report.conftest import HOSTILE, evaluated, with_sets
from tests.runs import run_main
from xlir.report import charts, pictures, writer
from xlir.report.markup import tag
from xlir.report.scores import Scored


class Page(html.parser.HTMLParser):
    """The elements, the headings and the text of a page; checks that all elements are closed."""

    VOID = ("meta", "input")

    def __init__(self, file):
        super().__init__()
        self.open, self.tags, self.headings, self.words, self.links = [], [], [], [], []
        self.feed(file.read_text(encoding="utf8"))
        self.close()
        assert not self.open
        self.text = " ".join(self.words)

    def handle_starttag(self, name, attributes):
        self.tags.append(name)
        self.links += [value for key, value in attributes if key in ("href", "src", "action")]
        if name not in self.VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


@pytest.fixture(scope="module")
def page(report_run, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "report.html"
    writer.write(report_run, file)
    return file


def test_the_sections_and_their_numbers(page, report_run):
    read = Page(page)
    assert read.headings == [
        *("In short", "Training", "Curves", "Recall by language", "Examples", "Hubs"),
        *("Where languages part", "Tags (flickr8k-tagging)", "Speed and memory"),
    ]
    english = Scored.of(report_run.sets[0]).results()["en"]["text_to_image"]
    assert f"{100 * english['R@10']:.1f}" in read.words
    low, high = english["intervals"]["R@10"]
    assert f"{100 * low:.1f} to {100 * high:.1f}" in read.words
    for part in ("1,234 photos, 5,678 captions", "Afro-Asiatic, Arabic script", "2.00 GiB at most"):
        assert part in read.text
    assert "/secret" not in read.text


def test_texts_are_escaped_and_nothing_is_loaded(page):
    read = Page(page)
    assert HOSTILE in read.text
    assert (read.tags.count("script"), read.tags.count("style")) == (1, 1)
    assert not {"img", "link", "iframe", "b"} & set(read.tags)
    assert "run <b>one" in read.text
    assert all(link.startswith("#") for link in read.links)
    assert page.stat().st_size < 500_000


def test_the_policy_allows_only_the_pages_own_style_and_script(page):
    text = page.read_text(encoding="utf8")
    (policy,) = re.findall('Content-Security-Policy" content="([^"]+)"', text)
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert (rules["default-src"], rules["img-src"]) == ("'none'", "data:")
    for name in ("style", "script"):
        (content,) = re.findall(f"<{name}>(.*?)</{name}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[f"{name}-src"] == f"'sha256-{digest}'"
    # The policy forbids attributes with style or script, so there must be none.
    assert not re.search(r"<[^>]+ (style|on\w+)=", text.split("<body>")[1])


def test_two_runs_side_by_side(report_run, photos, tmp_path):
    other = with_sets(report_run, evaluated(photos, noise=0.9))
    other = dataclasses.replace(other, workdir=tmp_path / "other")
    writer.write(report_run, tmp_path / "report.html", other)
    read = Page(tmp_path / "report.html")
    assert "Compared with other" in read.headings
    means = [
        Scored.of(run.sets[0]).results()["zero-shot"]["text_to_image"]["R@10"]
        for run in (report_run, other)
    ]
    assert f"{100 * (means[0] - means[1]):+.1f}" in read.words


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"name": "other"}, "no test set in common .the first has shapes; the second has other"),
        ({"fingerprint": "changed"}, "their test sets shapes have other photos or captions"),
    ],
)
def test_runs_with_other_test_sets_are_not_compared(report_run, tmp_path, change, reason):
    (one,) = report_run.sets
    other = dataclasses.replace(one, data=dataclasses.replace(one.data, **change))
    with pytest.raises(ValueError, match=reason):
        writer.write(report_run, tmp_path / "report.html", with_sets(report_run, other))
    assert not list(tmp_path.iterdir())


def test_a_run_without_test_sets_or_records(report_run, tmp_path):
    bare = dataclasses.replace(report_run, workdir=tmp_path, sets=())
    writer.write_at_end(bare)
    assert Page(tmp_path / writer.REPORT_FILE).headings == ["Training"]


def test_a_report_that_cannot_be_written_does_not_fail_a_finished_run(report_run, tmp_path, caplog):
    (tmp_path / writer.REPORT_FILE).mkdir()
    writer.write_at_end(dataclasses.replace(report_run, workdir=tmp_path, sets=()))
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("the report is not written: ")
    assert "\n" not in line


def test_photos_beyond_the_largest_size_are_left_out(photos, monkeypatch):
    shown = pictures.Pictures()
    files = [photos / "images" / f"{row:02d}.jpg" for row in range(3)]
    assert 'class="photo p0"' in shown.show(("set", 0), files[0], "one")
    monkeypatch.setattr(pictures, "MOST_BYTES", shown._bytes)
    assert 'class="photo"' in shown.show(("set", 1), files[1], "two")
    assert 'class="photo p0"' in shown.show(("set", 0), files[0], "one again")
    assert shown.left_out == 1
    assert shown.style().count("data:image/jpeg") == 1


@pytest.mark.parametrize("values", [(0.0,), (-3.0, 2.0), (1e-9, 2e-9), (1e9, 3e9)])
def test_an_axis_encloses_its_values(values):
    axis = charts._Axis(min(values), max(values), 10, 100)
    places = [place for place, _ in axis.labels()]
    assert places[0] == pytest.approx(10)
    assert places[-1] == pytest.approx(100)
    assert 2 <= len(places) <= 7
    assert all(10 <= axis.at(value) <= 100 for value in values)
    assert np.isfinite(places).all()


def test_attributes_are_escaped():
    assert tag("p", "<", title='"><b>', hidden=True, id=None) == (
        '<p title="&quot;&gt;&lt;b&gt;" hidden>&lt;</p>'
    )


def test_the_verb(workdir, tmp_path):
    """The run's own report is there since its end; the verb writes it anew, and compares."""
    assert "Curves" in Page(workdir / writer.REPORT_FILE).headings
    file = tmp_path / "report.html"
    process = run_main("report", f"--workdir={workdir}", f"--against={workdir}", f"--to={file}")
    assert process.stdout == f"written: {file}\n"
    assert "Compared with tiny" in Page(file).headings
    for flags, reason in (
        (["--to=/none/report.html"], "there is no folder /none"),
        ([f"--against={tmp_path}"], "is not the folder of a training run"),
    ):
        process = run_main("report", f"--workdir={workdir}", *flags, check=False)
        assert process.returncode == 1
        assert reason in process.stderr.splitlines()[-1]
