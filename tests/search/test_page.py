"""The search page in Chromium, over HTTP, with a toy model."""

import contextlib
import os
import re
import urllib.parse

import pytest

CHROMIUM = "/usr/bin/chromium"
# As in page.js.
CUTOFF = 0.05

for package in ("fastapi", "lancedb", "prometheus_client", "python_multipart", "uvicorn"):
    pytest.importorskip(package)
playwright = pytest.importorskip("playwright.sync_api")
if not os.access(CHROMIUM, os.X_OK):
    pytest.skip(f"needs Chromium as {CHROMIUM}", allow_module_level=True)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        flags = ["--no-sandbox", "--disable-background-networking"]
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield chromium
        chromium.close()


@contextlib.contextmanager
def opened(browser, url: str, **options):
    """A page; afterwards, checks that it asked for nothing elsewhere and had no error."""
    page = browser.new_page(**options)
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(url)
    yield page
    page.close()
    assert not errors
    hosts = {urllib.parse.urlsplit(one).hostname for one in asked if not one.startswith("blob:")}
    assert hosts == {"127.0.0.1"}


@pytest.fixture
def page(browser, served):
    with opened(browser, served.url) as page:
        yield page


def status(page, text: str) -> None:
    playwright.expect(page.locator("#status")).to_have_text(re.compile(text))


def ask(page, query: str) -> None:
    page.get_by_label("What the photos should show").fill(query)
    page.keyboard.press("Enter")
    status(page, "the best first|No photo|the best$")


def names(page) -> list[str]:
    return page.locator("#results .name").all_text_contents()


def names_of(hits) -> list[str]:
    return [os.path.basename(hit.path) for hit in hits]


def filters(page) -> None:
    page.get_by_text("Filters").click()


def test_a_german_query(page, served):
    status(page, "^Describe a photo")
    ask(page, "ein roter Kreis")
    assert names(page) == names_of(served.index.search("ein roter Kreis", count=60, cutoff=CUTOFF))
    image = page.locator("#results img").first
    assert image.get_attribute("alt") == names(page)[0]
    assert image.get_attribute("loading") == "lazy"
    image.evaluate("image => image.decode()")
    assert "q=ein+roter+Kreis" in page.url
    assert page.title().startswith("ein roter Kreis")


def test_an_arabic_query_runs_from_right_to_left(page, served):
    ask(page, "دائرة حمراء")
    assert names(page) == names_of(served.index.search("دائرة حمراء", count=60, cutoff=CUTOFF))
    assert page.locator("#q").evaluate("box => getComputedStyle(box).direction") == "rtl"
    page.locator("#q").fill("rot")
    assert page.locator("#q").evaluate("box => getComputedStyle(box).direction") == "ltr"


def test_a_photo_as_query(page, served):
    photo = next(served.photos.rglob("05.jpg"))
    page.locator("#photo").set_input_files(photo)
    status(page, "the best first")
    assert names(page) == names_of(served.index.search(photo.read_bytes(), count=60, cutoff=CUTOFF))
    assert page.locator("#example-text").text_content() == "Like 05.jpg"
    ask(page, "rot")
    together = served.index.search("rot", photo.read_bytes(), count=60, cutoff=CUTOFF)
    assert names(page) == names_of(together)
    page.get_by_role("button", name="Remove").click()
    playwright.expect(page.locator("#example")).to_be_hidden()


def test_a_dropped_photo(page, served):
    page.evaluate(
        """async () => {
          const answer = await fetch("/api/search?q=rot&count=1");
          const [hit] = (await answer.json()).hits;
          const photo = await (await fetch(hit.thumbnail)).blob();
          const data = new DataTransfer();
          data.items.add(new File([photo], "dropped.jpg", { type: "image/jpeg" }));
          document.body.dispatchEvent(
            new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
        }"""
    )
    status(page, "the best first")
    assert page.locator("#example-text").text_content() == "Like dropped.jpg"


def test_filters(page, served):
    ask(page, "rot")
    filters(page)
    page.get_by_label("Folder").fill("Ελλάδα & co")
    page.keyboard.press("Enter")
    hits = served.index.search("rot", count=60, cutoff=CUTOFF, where="folder 'Ελλάδα & co'")
    assert hits
    status(page, f"^{len(hits)} photo")
    assert names(page) == names_of(hits)
    page.get_by_label("Taken from").fill("1999-01-01")
    page.get_by_label("until").fill("1999-12-31")
    page.keyboard.press("Enter")
    status(page, "^No photo fits")
    assert "folder=" in page.url
    assert names(page) == []
    for odd in ('a "b\\', "a 'b", "\"'"):
        page.get_by_label("Folder").fill(odd)
        with page.expect_response(lambda answer: "where=" in answer.url) as response:
            page.keyboard.press("Enter")
        assert response.value.status == 200
        status(page, "^No photo fits")


def test_what_photos_should_not_show(page, served):
    ask(page, "rot")
    filters(page)
    page.get_by_label("Should not show").fill("blau")
    with page.expect_response(lambda answer: "not=blau" in answer.url):
        page.keyboard.press("Enter")
    status(page, "the best first")
    assert names(page) == names_of(
        served.index.search("rot", without=["blau"], count=60, cutoff=CUTOFF)
    )


def test_more_like_this_and_the_back_button(page, served):
    ask(page, "rot")
    before = names(page)
    page.get_by_role("button", name=f"More like {before[3]}").click()
    playwright.expect(page.locator("#example")).to_be_visible()
    identifier = re.search(r"like=([0-9a-f]{20})$", page.url)[1]
    found = served.index.find(served.index.vector(identifier), 60)
    playwright.expect(page.locator("#results .name")).to_have_text(names_of(found))
    assert before[3] in [hit.path.rsplit("/")[-1] for hit in found if hit.cosine > 0.999]
    page.go_back()
    playwright.expect(page.locator("#q")).to_have_value("rot")
    playwright.expect(page.locator("#results .name").first).to_have_text(before[0])
    assert names(page) == before
    page.reload()
    status(page, "the best first")
    assert names(page) == before


def test_a_problem_is_told_in_words(browser, served):
    page = browser.new_page()
    page.goto(f"{served.url}/?like=x")
    status(page, "^That did not work: like")
    page.close()


def test_names_are_text_and_never_code(page, served):
    page.goto(f"{served.url}/?q=%3Cimg%20src%3Dx%20onerror%3Dalert(1)%3E")
    status(page, "the best first")
    assert page.locator("#q").input_value() == "<img src=x onerror=alert(1)>"
    assert page.locator("img[src=x]").count() == 0


def test_the_keyboard_reaches_everything(page):
    ask(page, "rot")
    page.locator("#q").focus()
    reached = []
    for _ in range(6):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert reached == ["BUTTON", "photo", "SUMMARY", "A", "BUTTON", "A"]
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.evaluate(outline) == "solid"


def test_every_field_has_a_label(page):
    filters(page)
    unnamed = page.evaluate(
        "[...document.querySelectorAll('input')].filter(one => !one.labels.length).length"
    )
    assert unnamed == 0
    assert page.locator("#status").get_attribute("aria-live") == "polite"


@pytest.mark.parametrize("width", [320, 390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_width_needs_scrolling_sideways(browser, served, width, scheme):
    options = {"viewport": {"width": width, "height": 800}, "color_scheme": scheme}
    with opened(browser, f"{served.url}/?q=rot&folder=greece", **options) as page:
        status(page, "the best first")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
