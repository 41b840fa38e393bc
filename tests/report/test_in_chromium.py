"""The report in Chromium, opened as a file."""

import pytest

from tests.report.conftest import HOSTILE
from xlir.report import writer

pytest.importorskip("playwright.sync_api")


@pytest.fixture(scope="module")
def file(report_run, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "report.html"
    writer.write(report_run, file, report_run)
    return file


@pytest.fixture(params=[(1280, "light"), (390, "dark")], ids=str)
def page(request, browser, file):
    width, scheme = request.param
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda line: errors.append(line.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(file.as_uri())
    yield page
    page.close()
    assert not errors
    assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]


def test_the_page_is_accessible_and_filters_its_examples(page, harm):
    width = page.viewport_size["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (width == 1280)
    for summary in page.locator("summary").all():
        summary.click()
    assert harm(page) == []

    shown = page.locator(".examples > li:visible")
    assert shown.count() == 12
    page.get_by_role("button", name="Show all").click()
    assert page.locator(".count").text_content() == f"{shown.count()} of {shown.count()} examples"
    page.locator("select[name=language]").select_option("ar")
    page.locator("select[name=kind]").select_option("worst")
    assert set(shown.locator(".query").evaluate_all("all => all.map((one) => one.lang)")) == {"ar"}
    assert shown.locator(".query").first.evaluate("one => getComputedStyle(one).direction") == "rtl"
    page.locator("select[name=kind]").select_option("")
    page.locator("select[name=language]").select_option("")
    page.locator("input[name=text]").fill("<SCRIPT>document")
    assert HOSTILE in shown.locator(".query").all_text_contents()
    page.locator("input[name=text]").fill("nothing is like this")
    assert page.locator(".nothing").is_visible()
    assert page.title() == "Report of run <b>one"
    assert harm(page) == []
