"""Filters are read as written, and a store finds the rows that match."""

import datetime
import fnmatch
import random
import re
import unicodedata

import pytest

from xlir.search import filters, photos
from xlir.search.filters import Term, parse

EPOCH = datetime.datetime(1970, 1, 1)


def seconds(*fields: int) -> int:
    """Seconds from 1970 to a moment given as year, month, day and perhaps more."""
    return round((datetime.datetime(*fields) - EPOCH).total_seconds())


# How filters are read


@pytest.mark.parametrize("text", ["", " ", "\t\n"])
def test_an_empty_filter_matches_all(text):
    assert parse(text) == ()


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("folder holidays", [Term("folder", "*/holidays/*")]),
        ("folder holidays/greece", [Term("folder", "*/holidays/greece/*")]),
        ("folder /holidays/greece", [Term("folder", "/holidays/greece/*")]),
        ("folder holidays/greece/", [Term("folder", "*/holidays/greece/*")]),
        ("folder //a//b//", [Term("folder", "/a/b/*")]),
        ("folder /", [Term("folder", "/*")]),
        ("folder 'My Pictures'/x", [Term("folder", "*/my pictures/x/*")]),
        ("name *.png", [Term("name", "*.png")]),
        ("name IMG_12*.JPG", [Term("name", "img_12*.jpg")]),
        ('name "two words.jpg"', [Term("name", "two words.jpg")]),
        ('name "it\'s.jpg"', [Term("name", "it's.jpg")]),
        ("name '\"x\".jpg'", [Term("name", '"x".jpg')]),
        (r"name a\b*", [Term("name", r"a\b*")]),
        (r'name "a\b c\*"', [Term("name", r"a\b c\*")]),
        ("name #1.jpg", [Term("name", "#1.jpg")]),
        ("name a;b--c.jpg", [Term("name", "a;b--c.jpg")]),
        ("name (1),{2}|3.jpg", [Term("name", "(1),{2}|3.jpg")]),
        ("name ÄRGER*", [Term("name", "ärger*")]),
        ("name A\N{COMBINING DIAERESIS}RGER", [Term("name", "ärger")]),
        ("name STRAßE", [Term("name", "strasse")]),
        ("width 1000..2000", [Term("width", least=1000, most=2000)]),
        ("width 1000..", [Term("width", least=1000)]),
        ("height ..2000", [Term("height", most=2000)]),
        ("height 480", [Term("height", least=480, most=480)]),
        ("height 0", [Term("height", least=0, most=0)]),
        ("width 007..8", [Term("width", least=7, most=8)]),
        ("width ..", [Term("width")]),
        ("not width 5", [Term("width", least=5, most=5, negated=True)]),
        ("NOT Folder x AND Name y", [Term("folder", "*/x/*", negated=True), Term("name", "y")]),
        (
            "folder and and not name not and name name",
            [Term("folder", "*/and/*"), Term("name", "not", negated=True), Term("name", "name")],
        ),
    ],
)
def test_terms(text, terms):
    assert parse(text) == tuple(terms)


def test_the_example_of_the_documentation():
    where = parse("folder holidays/greece and taken 2023-06..2023-08 and not name *.png")
    assert where == (
        Term("folder", "*/holidays/greece/*"),
        Term("taken", least=seconds(2023, 6, 1), most=seconds(2023, 8, 31, 23, 59, 59)),
        Term("name", "*.png", negated=True),
    )


@pytest.mark.parametrize(
    ("dates", "least", "most"),
    [
        ("2023", (2023, 1, 1), (2023, 12, 31)),
        ("2023-06", (2023, 6, 1), (2023, 6, 30)),
        ("2023-6", (2023, 6, 1), (2023, 6, 30)),
        ("2024-02", (2024, 2, 1), (2024, 2, 29)),
        ("1900-02", (1900, 2, 1), (1900, 2, 28)),
        ("2023-12", (2023, 12, 1), (2023, 12, 31)),
        ("2023-06-15", (2023, 6, 15), (2023, 6, 15)),
        ("2024-2-29", (2024, 2, 29), (2024, 2, 29)),
        ("2021..2023-06", (2021, 1, 1), (2023, 6, 30)),
        ("2023-06-15..2023-07", (2023, 6, 15), (2023, 7, 31)),
        ("2023-07..2023", (2023, 7, 1), (2023, 12, 31)),
        ("2023..2023-01-01", (2023, 1, 1), (2023, 1, 1)),
        ("2023..", (2023, 1, 1), None),
        ("..2023-06", None, (2023, 6, 30)),
        ("..", None, None),
        ("0001..9999", (1, 1, 1), (9999, 12, 31)),
        ("1969-12-31", (1969, 12, 31), (1969, 12, 31)),
    ],
)
def test_dates(dates, least, most):
    (term,) = parse(f"taken {dates}")
    assert term.least == (None if least is None else seconds(*least))
    assert term.most == (None if most is None else seconds(*most, 23, 59, 59))


def test_each_day_of_some_years_follows_the_one_before():
    day, expected = datetime.date(2023, 1, 1), seconds(2023, 1, 1)
    while day.year < 2025:
        (term,) = parse(f"taken {day.isoformat()}")
        assert (term.least, term.most) == (expected, expected + 24 * 3600 - 1)
        day, expected = day + datetime.timedelta(days=1), expected + 24 * 3600


def test_bounds_beyond_any_photo():
    (term,) = parse(f"width 1..{10**30}")
    assert (term.least, term.most) == (1, filters.LARGEST)
    (term,) = parse(f"width {'0' * 50}12..{'9' * 10_000}")
    assert (term.least, term.most) == (12, filters.LARGEST)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("beach", "has a term that does not begin with folder, name, taken, width, height"),
        ("and", "has a term that does not begin"),
        ("not", "has a term that does not begin"),
        ("not not folder x", "has a term that does not begin"),
        ("path x", "has a term that does not begin"),
        ("folder=x", "has a term that does not begin"),
        ("and folder x", "has a term that does not begin"),
        ("folder", "lacks a value for folder"),
        ("not name", "lacks a value for name"),
        ("folder x and name", "lacks a value for name"),
        ("folder x and", "is not valid at 'and'"),
        ("folder x and and name y", "has a term that does not begin"),
        ("folder x name y", "is not valid at 'name'"),
        ("folder x or name y", "is not valid at 'or'"),
        (
            "folder My Pictures",
            "at 'Pictures': join terms with 'and', and put values with spaces in quotes",
        ),
        ("name it's", "has a quote that is not closed"),
        ('name "x', "has a quote that is not closed"),
        ("width big", "width takes whole numbers such as 1000..2000, not 'big'"),
        ("width -5", "not '-5'"),
        ("width 1.5", "not '1.5'"),
        ("width 1...5", "not '.5'"),
        ("width 1..2..3", "not '2..3'"),
        ("width ١٢", "not '١٢'"),
        ("width ²", "not '²'"),
        ("height 1e3", "height takes whole numbers"),
        ("height ''", "not ''"),
        ("width 1_000", "not '1_000'"),
        ("width 5..4", "width 5..4 begins after it ends"),
        (
            "taken june",
            "taken takes dates such as 2023, 2023-06 or 2023-06-15..2023-07, not 'june'",
        ),
        ("taken 2023-13", "not '2023-13'"),
        ("taken 2023-00", "not '2023-00'"),
        ("taken ..2023-00", "not '2023-00'"),
        ("taken 2023-0-5..", "not '2023-0-5'"),
        ("taken 2023-06-00", "not '2023-06-00'"),
        ("taken ..2023-06-00", "not '2023-06-00'"),
        ("taken 2023-06-31", "not '2023-06-31'"),
        ("taken 2023-02-29", "not '2023-02-29'"),
        ("taken ..2023-02-29", "not '2023-02-29'"),
        ("taken 0000", "not '0000'"),
        ("taken 23", "not '23'"),
        ("taken 12023", "not '12023'"),
        ("taken 2023-06-15T12:00", "not '2023-06-15T12:00'"),
        ("taken 2023-06-15-1", "not '2023-06-15-1'"),
        ("taken ２０２３", "not '２０２３'"),
        ("taken 2023-06..2022", "taken 2023-06..2022 begins after it ends"),
    ],
)
def test_errors_name_what_is_wrong(text, part):
    with pytest.raises(ValueError, match=re.escape(part)) as error:
        parse(text)
    assert len(str(error.value).splitlines()) == 1


def test_any_text_is_a_filter_or_a_plain_error():
    generator = random.Random(0)
    pieces = ["folder", "name", "taken", "width", "and", "not", "x", "2023", "..", "1", "-", "'"]
    pieces += ['"', "\\", "*", " ", " ", " ", "\n", "\0", "İ", "/", ";", "--", "\udcff"]
    good = 0
    for _ in range(5000):
        text = "".join(generator.choices(pieces, k=generator.randrange(12)))
        try:
            good += bool(parse(text))
        except ValueError as error:
            message = str(error)
            assert len(message.splitlines()) == 1, message
            assert "Error" not in message, message
    assert good > 10


# What a store finds with a filter

LETTERS = ["a", "b", "A", "%", "_", "\\", "'", '"', ".", "-", ";", " ", "\n", "[", "]", "?", "^"]
LETTERS += ["$", "(", ")", "|", "{", "}", "ß", "Ä", "ä", "İ", "ı", "i", "I", "ΐ", "σ", "ς", "Σ"]
LETTERS += ["한", "\N{COMBINING DIAERESIS}", "🏖", "\u200b", "#", "+", "~", "`", "/"]
NAMES = ["Ärger", "ÄRGER", "ärger", "İstanbul", "istanbul", "Istanbul", "ISTANBUL", "straße"]
NAMES += ["STRASSE", "100%", "a_b", "aXb", "a%b", r"a\b", "a'b", "it's", "O'Brien", "-- x", "; y"]
NAMES += [unicodedata.normalize("NFD", name) for name in ("Ärger", "한국", "İstanbul")]
NAMES += ["한국", "' OR 1=1 --", "') OR ('1'='1", "x'; DROP TABLE photos; --", "%", "_", "\\", "'"]


def a_name(generator: random.Random) -> str:
    """A file or folder name, of characters that are special to some layer below."""
    if generator.random() < 0.4:
        return generator.choice(NAMES)
    letters = generator.choices(LETTERS, k=generator.randint(1, 5))
    return "".join(letters).replace("/", "").strip(".") or "x"


def generated_rows(count: int) -> list[dict]:
    generator = random.Random(1)
    rows = []
    for number in range(count):
        depth = generator.randrange(4)
        path = "/" + "/".join([*(a_name(generator) for _ in range(depth)), a_name(generator)])
        rows.append(
            {
                "id": f"{number}",
                "path": path,
                "taken": generator.choice(
                    [
                        generator.randrange(-(10**9), 2 * 10**9),
                        seconds(2023, 6, 15) + generator.choice((-1, 0, 86399, 86400)),
                        seconds(2023, generator.randint(1, 12), generator.randint(1, 28)),
                    ]
                ),
                "width": generator.choice((0, 1, 99, 100, 101, 4000, filters.LARGEST)),
                "height": generator.choice((0, 480, 481, 3000)),
            }
        )
    return rows


ROWS = generated_rows(400)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A LanceDB store of `ROWS`."""
    pytest.importorskip("lancedb")
    import numpy as np
    import pyarrow as pa

    from xlir.search.stores import schema
    from xlir.search.stores.lance import LanceStore

    columns = {key: [row[key] for row in ROWS] for key in ROWS[0]}
    columns["folder"] = [photos.folder_of(row["path"]) for row in ROWS]
    columns["name"] = [photos.name_of(row["path"]) for row in ROWS]
    columns["size"] = columns["modified"] = [0] * len(ROWS)
    columns["thumbnail"] = [b""] * len(ROWS)
    columns["vector"] = list(np.tile(np.float16([1, 0]), (len(ROWS), 1)))
    made = LanceStore(tmp_path_factory.mktemp("store"), 2, create=True)
    made.add(pa.table(columns, schema=schema(2)))
    return made


def found(store, where: str) -> set[str]:
    """The ids of the rows that match; each way to ask the store must agree."""
    terms = parse(where)
    scanned = [name for batch in store.scan(["id"], terms) for name in batch["id"].to_pylist()]
    assert len(set(scanned)) == len(scanned) == store.count(terms)
    return set(scanned)


def caseless(text: str) -> str:
    """Unicode's canonical caseless form (D145 of the standard)."""
    decomposed = unicodedata.normalize("NFD", text)
    return unicodedata.normalize("NFD", decomposed.casefold())


def like(text: str, pattern: str) -> bool:
    """Whether a text matches a pattern in which only `*` is special."""
    escaped = re.sub(r"([\[?])", r"[\1]", caseless(pattern))
    return fnmatch.fnmatchcase(caseless(text), escaped)


def in_folder(path: str, names: str) -> bool:
    """Whether a path is below nested folders of these names."""
    parts = caseless(path).strip("/").split("/")[:-1]
    wanted = [part for part in caseless(names).split("/") if part]
    starts = [0] if names.startswith("/") else range(len(parts) + 1)
    return any(parts[start : start + len(wanted)] == wanted for start in starts)


def day_of(row: dict) -> datetime.date:
    return (EPOCH + datetime.timedelta(seconds=row["taken"])).date()


def quoted(value: str) -> str:
    """A value in quotes for a filter. Its single quotes are put in double quotes."""
    return "".join(f"'{part}'" if part != "'" else '"\'"' for part in re.split("(')", value))


def random_term(generator: random.Random):
    """A term, and a function that tells whether a row matches it."""
    kind = generator.choice(["folder", "name", "taken", "width", "height"])
    row = generator.choice(ROWS)
    if kind == "folder":
        parts = row["path"].strip("/").split("/")[:-1] or ["none"]
        start = generator.randrange(len(parts))
        names = "/".join(parts[start : start + generator.randint(1, 2)])
        if generator.random() < 0.3:
            names = f"/{names}"
        changed = generator.choice((str, str.upper, str.lower, in_other_form))(names)
        return f"folder {quoted(changed)}", lambda row: in_folder(row["path"], changed)
    if kind == "name":
        name = row["path"].rsplit("/", 1)[1]
        name = generator.choice((str, str.upper, str.lower, in_other_form))(name)
        # The text is cut between whole letters: an accent belongs to the letter before it.
        name = unicodedata.normalize("NFC", name)
        start, end = sorted(generator.choices(range(len(name) + 1), k=2))
        forms = [name, f"{name[:start]}*", f"*{name[start:]}", f"{name[:start]}*{name[end:]}"]
        pattern = generator.choice([*forms, f"*{name[start:end]}*", a_name(generator)])
        return f"name {quoted(pattern)}", lambda row: like(row["path"].rsplit("/", 1)[1], pattern)
    if kind == "taken":
        first, last = sorted(day_of(generator.choice(ROWS)) for _ in range(2))
        form = generator.randrange(4)
        text = [f"{first}..{last}", f"{first}..", f"..{last}", f"{first}"][form]
        matches = [
            lambda row: first <= day_of(row) <= last,
            lambda row: first <= day_of(row),
            lambda row: day_of(row) <= last,
            lambda row: day_of(row) == first,
        ][form]
        return f"taken {text}", matches
    least, most = sorted(generator.choice((0, 1, 100, 480, 4000, 10**10)) for _ in range(2))
    return f"{kind} {least}..{most}", lambda row: min(least, filters.LARGEST) <= row[kind] <= most


def in_other_form(text: str) -> str:
    return unicodedata.normalize("NFD", text)


def test_a_store_finds_what_filters_say(store):
    """Hundreds of filters over hundreds of rows, compared with plain Python."""
    generator = random.Random(2)
    some = 0
    for _ in range(200):
        terms, checks = [], []
        for _ in range(generator.choice((1, 1, 2, 3))):
            text, check = random_term(generator)
            negated = generator.random() < 0.3
            terms.append(f"not {text}" if negated else text)
            checks.append((check, negated))
        where = " and ".join(terms)
        expected = {
            row["id"] for row in ROWS if all(check(row) != negated for check, negated in checks)
        }
        assert found(store, where) == expected, where
        some += 0 < len(expected) < len(ROWS)
    assert some > 100


@pytest.mark.parametrize("name", NAMES)
def test_each_name_is_found_by_itself_alone(store, name):
    expected = {
        row["id"] for row in ROWS if caseless(row["path"].rsplit("/", 1)[1]) == caseless(name)
    }
    assert found(store, f"name {quoted(name)}") == expected
    assert found(store, f"not name {quoted(name)}") == {row["id"] for row in ROWS} - expected


def test_case_and_the_form_of_accents_make_no_difference(store):
    same = [found(store, f"name {name}") for name in ("Ärger", "ÄRGER", "A\u0308rger", "ärger")]
    assert same[0]
    assert all(one == same[0] for one in same)
    assert found(store, "name STRASSE") == found(store, "name straße") != set()
    assert found(store, "name İstanbul") == found(store, "name İSTANBUL") != set()
    assert found(store, "name istanbul") == found(store, "name ISTANBUL") != set()
    # By the rules of Unicode that hold for all languages, the dot of "İ" stays.
    assert not found(store, "name istanbul") & found(store, "name İstanbul")


INJECTIONS = [
    "'",
    "''",
    "' OR 1=1 --",
    "') OR ('1'='1",
    "x' OR name LIKE '%",
    "'; DROP TABLE x; --",
]
INJECTIONS += [
    "\\' OR 1=1 --",
    "\\",
    "\\\\",
    "\\' ESCAPE '",
    "' ESCAPE '\\' OR TRUE --",
    "/*",
    "*/",
]
INJECTIONS += ["%", "_", "%%", "\\%", "\\_", "\0", "x\0' OR 1=1", "$1", "{0}", "`", '"name"', "?1"]
INJECTIONS += ["’", "＇ OR 1=1", "\N{ZERO WIDTH SPACE}", "\n", "--", ";", "0x27", "U&'\\0027'"]


@pytest.mark.parametrize("value", INJECTIONS)
@pytest.mark.parametrize("column", ["name", "folder"])
def test_values_are_never_read_as_sql(store, column, value):
    """A value matches only itself; `*` is the only character with a meaning."""
    for pattern in (value, f"{value}*", f"a{value}", f"*{value}' --"):
        if column == "name":
            expected = {row["id"] for row in ROWS if like(row["path"].rsplit("/", 1)[1], pattern)}
        elif "*" in pattern:
            continue
        else:
            expected = {row["id"] for row in ROWS if in_folder(row["path"], pattern)}
        assert found(store, f"{column} {quoted(pattern)}") == expected
    assert store.count() == len(ROWS)


def test_long_filters_and_values(store):
    assert found(store, f"name {'x' * 10_000}") == set()
    assert found(store, " and ".join(["not name none"] * 100)) == {row["id"] for row in ROWS}
    assert found(store, f"name {'*a' * 20}") == set()


@pytest.mark.parametrize("size", [filters.LARGEST, filters.LARGEST + 1, 2**63, 2**64, 10**30])
def test_bounds_of_any_size(store, size):
    everything = {row["id"] for row in ROWS}
    widest = {row["id"] for row in ROWS if row["width"] == filters.LARGEST}
    assert found(store, f"width ..{size}") == everything
    assert found(store, f"width {size}..") == widest
    assert found(store, f"not width {size}..") == everything - widest
    assert found(store, f"height {size}..") == set()


def test_bounds_that_are_both_missing_match_all(store):
    assert found(store, "taken ..") == {row["id"] for row in ROWS}
    assert found(store, "not width ..") == set()


def test_a_search_considers_only_what_the_filter_says(store):
    import numpy as np

    where = parse("width 100..101 and not name *a*")
    [hits] = store.search(np.float32([[1, 0]]), len(ROWS), ["id"], where)
    assert (
        set(hits.rows["id"].to_pylist()) == found(store, "width 100..101 and not name *a*") != set()
    )
