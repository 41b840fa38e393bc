"""The search page in Chromium, over HTTP, with a toy model."""

import contextlib
import os
import re
import urllib.parse

import pytest

# As in page.js.
CUTOFF = 0.05

for package in ("fastapi", "lancedb", "prometheus_client", "python_multipart", "uvicorn"):
    pytest.importorskip(package)
playwright = pytest.importorskip("playwright.sync_api")


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
    status(page, "the best first|No photo|^1 photo$")


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


def slide(page, value: float) -> None:
    """Moves the slider of the cutoff as dragging does, without the event of letting it go."""
    page.locator("#cutoff").evaluate(
        "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')); }",
        value,
    )


def test_the_slider_shows_how_many_photos_pass(page, served):
    ask(page, "rot")
    hits = served.index.search("rot", count=60)
    middle = round((hits[0].percentile + hits[-1].percentile) / 2, 2)
    assert hits[0].percentile > middle > hits[-1].percentile
    searches = []
    page.on("request", lambda request: searches.append(request.url))
    for value in (0, middle, 1):
        slide(page, value)
        passing = [hit for hit in hits if hit.percentile >= value]
        text = f"{len(passing)} of {len(hits)} photos pass"
        playwright.expect(page.locator("#passing")).to_have_text(text)
        assert page.locator("#cutoff").get_attribute("aria-valuetext") == f"{value:g}: {text}"
        assert names(page) == names_of(passing)
    assert not [url for url in searches if "/api/search" in url]
    assert "cutoff" not in page.url


def test_the_cutoff_is_in_the_address(page, served):
    ask(page, "rot")
    page.get_by_label("Cutoff").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    playwright.expect(page).to_have_url(re.compile(r"[?&]cutoff=0\.07$"))
    page.reload()
    status(page, "the best first")
    assert page.get_by_label("Cutoff").input_value() == "0.07"
    assert names(page) == names_of(served.index.search("rot", count=60, cutoff=0.07))
    page.get_by_label("Cutoff").press("ArrowLeft")
    page.get_by_label("Cutoff").press("ArrowLeft")
    playwright.expect(page).to_have_url(f"{served.url}/?q=rot")
    for odd in ("x", "7", "-1", "NaN", "%00"):
        page.goto(f"{served.url}/?q=rot&cutoff={odd}")
        status(page, "the best first")
        assert page.get_by_label("Cutoff").input_value() == "0.05"


def test_a_query_that_nothing_fits(page, served):
    words = ("rot", "blau", "grün", "Kreis", "Quadrat", "Hund", "x", "y", "z")
    best = {word: served.index.search(word, count=1)[0].percentile for word in words}
    word = min(best, key=best.get)
    assert best[word] < 0.99
    page.goto(f"{served.url}/?q={word}&cutoff=1")
    status(page, "^No photo fits.*lower cutoff to see the nearest")
    playwright.expect(page.locator("#passing")).to_have_text(re.compile("^0 of"))
    assert names(page) == []
    slide(page, 0)
    assert names(page) == names_of(served.index.search(word, count=60))


def test_queries_with_photos_have_no_cutoff(page):
    ask(page, "rot")
    playwright.expect(page.get_by_label("Cutoff")).to_be_visible()
    page.get_by_role("button", name="More like").first.click()
    playwright.expect(page.locator("#example")).to_be_visible()
    playwright.expect(page.get_by_label("Cutoff")).to_be_hidden()


def tags_of(page) -> list[str]:
    """The tags of the first photo, once they are shown."""
    tags = page.locator("#results li").first.locator(".tags a")
    playwright.expect(tags.first).to_be_visible(timeout=60_000)
    return tags.all_text_contents()


def fitting_tags(page, language: str) -> list[str]:
    """The tags of the first photo, by the API."""
    place = page.locator("#results img").first.get_attribute("src").removesuffix("/thumbnail")
    address = f"{place}/tags?language={language}&count=8&cutoff={CUTOFF}"
    found = page.evaluate("async (url) => (await fetch(url)).json()", address)
    return [one["tag"] for one in found["tags"]]


def test_tags_in_two_languages(browser, served):
    with opened(browser, f"{served.url}/?q=rot", locale="de-AT") as page:
        status(page, "the best first")
        assert page.get_by_label("Tags in").input_value() == "de"
        button = page.get_by_role("button", name=re.compile("^Tags of")).first
        button.press("Enter")
        german = tags_of(page)
        assert german == fitting_tags(page, "de")
        assert button.get_attribute("aria-expanded") == "true"
        page.get_by_label("Tags in").select_option(label="العربية")
        playwright.expect(page.locator(".tags a[lang=ar]").first).to_be_visible(timeout=60_000)
        assert tags_of(page) == fitting_tags(page, "ar") != german
        direction = "link => getComputedStyle(link).direction"
        assert page.locator(".tags a").first.evaluate(direction) == "rtl"
        page.reload()
        playwright.expect(page.get_by_label("Tags in")).to_have_value("ar")
        page.get_by_label("Tags in").select_option("de")
        button.click()
        page.locator(".tags a", has_text=german[0]).first.click()
        playwright.expect(page.locator("#q")).to_have_value(german[0])
        status(page, "the best first|No photo|^1 photo$")
        found = served.index.search(german[0], count=60, cutoff=CUTOFF)
        assert names(page) == names_of(found) != []
        button.click()
        playwright.expect(page.locator(".tags:visible")).to_have_count(1)
        button.click()
        playwright.expect(page.locator(".tags:visible")).to_have_count(0)


def test_without_names_the_page_offers_no_tags(browser, served):
    page = browser.new_page()
    page.route("**/api/languages", lambda route: route.fulfill(json={"languages": []}))
    page.goto(f"{served.url}/?q=rot")
    status(page, "the best first")
    playwright.expect(page.get_by_label("Tags in")).to_be_hidden()
    assert page.get_by_role("button", name=re.compile("^Tags of")).count() == 0
    page.close()


def test_more_like_this_and_the_back_button(page, served):
    ask(page, "rot")
    before = names(page)
    page.get_by_role("button", name=f"More like {before[3]}").click()
    playwright.expect(page.locator("#example")).to_be_visible()
    identifier = re.search(r"like=([0-9a-f]{20})$", page.url)[1]
    found = served.index.find(served.index.vector(identifier)[None], 60)[0]
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
    for _ in range(9):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    start = ["BUTTON", "photo", "SUMMARY", "cutoff", "language"]
    assert reached == [*start, "A", "BUTTON", "BUTTON", "A"]
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.evaluate(outline) == "solid"


def test_every_field_has_a_label(page):
    filters(page)
    unnamed = page.evaluate(
        "[...document.querySelectorAll('input, select')].filter(one => !one.labels.length).length"
    )
    assert unnamed == 0
    assert page.locator("#status").get_attribute("aria-live") == "polite"


@pytest.mark.parametrize("width", [320, 390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_width_needs_scrolling_sideways(browser, served, width, scheme):
    options = {"viewport": {"width": width, "height": 800}, "color_scheme": scheme}
    with opened(browser, f"{served.url}/?q=rot&folder=greece", **options) as page:
        page.get_by_role("button", name=re.compile("^Tags of")).first.click()
        assert tags_of(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(255, 255, 255)") == (scheme == "light")


def test_axe_finds_text_without_contrast_and_fields_without_labels(page, harm):
    page.locator("#status").evaluate("text => { text.style.color = '#ddd'; }")
    page.locator("label[for=q]").evaluate("label => label.remove()")
    page.locator("#q").evaluate("field => field.removeAttribute('placeholder')")
    assert {one.split()[0] for one in harm(page)} == {"color-contrast", "label"}


@pytest.mark.parametrize(
    "options", [{}, {"color_scheme": "dark"}, {"viewport": {"width": 390, "height": 800}}], ids=str
)
def test_the_page_is_accessible(browser, served, options, harm):
    harms = {}
    with opened(browser, served.url, locale="de", **options) as page:
        status(page, "^Describe")
        harms["empty"] = harm(page)
        ask(page, "rot")
        harms["results"] = harm(page)
        page.get_by_role("button", name=re.compile("^Tags of")).first.click()
        tags_of(page)
        harms["tags"] = harm(page)
        filters(page)
        harms["filters"] = harm(page)
        page.get_by_label("until").fill("1999-12-31")
        page.keyboard.press("Enter")
        status(page, "^No photo fits")
        harms["nothing"] = harm(page)
        page.goto(f"{served.url}/?q=rot&cutoff=1")
        status(page, "the best first|No photo|^1 photo$")
        harms["cutoff"] = harm(page)
        slide(page, 0)
        page.get_by_role("button", name="More like").first.click()
        playwright.expect(page.locator("#example")).to_be_visible()
        harms["example"] = harm(page)
    assert not any(harms.values()), harms
