"""Reads multilingual test sets, as published and as saved by various text editors."""

import errno
import os
import shutil

import pytest

from input_pipeline.test_sets import line_aligned, xtd10
from input_pipeline.test_sets.captioned_photos import find_photos
from input_pipeline.test_sets.xtd10 import is_xtd10


@pytest.fixture
def write(tmp_path):
    """Writes a folder of files, text or bytes, and returns it."""

    def write_folder(**files):
        folder = tmp_path / "set"
        for name, content in {"names": "a.jpg\nb.jpg\n", **files}.items():
            path = name.split("/")
            stem = "test_image_names" if path[-1] == "names" else f"test_captions_{path[-1]}"
            file = folder.joinpath(*path[:-1], f"{stem}.txt")
            file.parent.mkdir(parents=True, exist_ok=True)
            if content is not None:
                file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return folder

    return write_folder


def test_line_i_of_every_file_belongs_to_photo_i(write):
    test_set = line_aligned.read(write(en="A dog.\nA cat.\n", de="Ein Hund.\nEine Katze.\n"))
    assert test_set.name == "set"
    assert test_set.filenames == ["a.jpg", "b.jpg"]
    assert test_set.captions == {
        "en": ["A dog.", "A cat."],
        "de": ["Ein Hund.", "Eine Katze."],
    }


@pytest.mark.parametrize(
    "content",
    [
        "One.\r\nTwo.\r\n",
        "One.\r\nTwo.",
        "One.\nTwo.",
        "One.\r\nTwo.\n",
        "One.\nTwo.\n\n\r\n",
        "\ufeffOne.\nTwo.\n",
        "\ufeffOne.\r\nTwo.",
        "One. \n\tTwo.\n",
    ],
    ids=repr,
)
def test_line_ends_byte_order_mark_and_final_newline_do_not_matter(write, content):
    assert line_aligned.read(write(en=content)).captions["en"] == ["One.", "Two."]


def test_names_may_have_crlf_and_byte_order_mark(write):
    assert line_aligned.read(write(names="\ufeffa.jpg\r\nb.jpg", en="1\n2")).filenames == [
        "a.jpg",
        "b.jpg",
    ]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x0b", "\x0c", "\x1c", "\x85"])
def test_other_separators_inside_a_caption_do_not_split_it(write, separator):
    captions = [f"one{separator}dog", "two dogs"]
    assert line_aligned.read(write(en="\n".join(captions))).captions["en"] == captions


def test_differing_counts_name_every_file_and_its_count(write):
    folder = write(en="1\n2\n", de="1\n2\n3\n", zh="1\n")
    with pytest.raises(ValueError, match="different numbers of lines") as error:
        line_aligned.read(folder)
    for part in ("image_names.txt 2", "captions_en.txt 2", "_de.txt 3", "_zh.txt 1"):
        assert part in str(error.value)


@pytest.mark.parametrize("content", ["1\n\n3\n", "1\r\n\r\n3\r\n", "1\n  \n3\n"])
def test_an_empty_line_inside_is_named_with_its_number(write, content):
    with pytest.raises(ValueError, match=r"test_captions_de\.txt: line 2 is empty"):
        line_aligned.read(write(names="a\nb\nc\n", en="1\n2\n3\n", de=content))


def test_an_empty_file_is_named(write):
    with pytest.raises(ValueError, match=r"test_captions_de\.txt: line 1 is empty"):
        line_aligned.read(write(en="1\n2\n", de=""))


def test_jp_is_japanese(write):
    assert list(line_aligned.read(write(en="1\n2", jp="一\n二")).captions) == ["en", "ja"]


@pytest.mark.parametrize("second", ["ja", "JP", "STAIR/jp"])
def test_a_language_twice_is_refused(write, second):
    with pytest.raises(ValueError, match="two caption files of language 'ja'"):
        line_aligned.read(write(en="1\n2", jp="1\n2", **{second: "1\n2"}))


def test_english_is_first_and_the_others_follow_by_code(write):
    folder = write(zh="1\n2", en="1\n2", ar="1\n2", **{"MIC/de": "1\n2"})
    assert list(line_aligned.read(folder).captions) == ["en", "ar", "de", "zh"]


@pytest.mark.parametrize("code", ["es-419", "zh_cn"])
def test_no_caption_file_is_passed_over(write, code):
    assert list(line_aligned.read(write(en="1\n2", **{code: "1\n2"})).captions) == ["en", code]


def test_a_set_needs_no_english(write):
    assert list(line_aligned.read(write(zh="1\n2", de="1\n2")).captions) == ["de", "zh"]


def test_a_photo_twice_is_refused(write):
    with pytest.raises(ValueError, match=r"test_image_names\.txt names a\.jpg twice"):
        line_aligned.read(write(names="a.jpg\nb.jpg\na.jpg\n", en="1\n2\n3\n"))


def test_no_list_of_names(write):
    with pytest.raises(FileNotFoundError, match=r"one test_image_names\.txt, found none"):
        line_aligned.read(write(names=None, en="1\n2"))


def test_two_lists_of_names(write):
    with pytest.raises(FileNotFoundError, match=r"one test_image_names\.txt, found 2"):
        line_aligned.read(write(en="1\n2", **{"copy/names": "a.jpg\nb.jpg\n"}))


def test_no_captions(write):
    with pytest.raises(FileNotFoundError, match="holds no test_captions_LANG"):
        line_aligned.read(write())


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        line_aligned.read(tmp_path / "nowhere")


@pytest.mark.parametrize("content", ["Größe\n2".encode("latin-1"), "1\n2".encode("utf-16")])
def test_another_encoding_is_named(write, content):
    with pytest.raises(ValueError, match=r"test_captions_de\.txt is not UTF-8"):
        line_aligned.read(write(en="1\n2", de=content))


def test_other_files_are_left_alone(write):
    folder = write(en="1\n2")
    (folder / "LICENSE.md").write_text("terms")
    (folder / "test_notes.txt").write_text("one\ntwo\nthree\n")
    assert list(line_aligned.read(folder).captions) == ["en"]


def test_the_working_folder_gives_its_name(write, monkeypatch):
    monkeypatch.chdir(write(en="1\n2"))
    assert line_aligned.read(".").name == "set"


def test_photos_are_found_in_nested_folders_in_the_sets_order(write, tmp_path):
    test_set = line_aligned.read(write(names="é 1.jpg\nb.jpg\nc.jpg\n", en="1\n2\n3\n"))
    photos = tmp_path / "photos"
    places = [photos / "val2014" / "é 1.jpg", photos / "b.jpg", photos / "x" / "y" / "c.jpg"]
    for file in [*places, photos / "x" / "other.jpg"]:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    assert find_photos(test_set, photos) == places


def test_missing_photos_are_counted_and_named(write, tmp_path):
    names = [f"{i}.jpg" for i in range(6)]
    test_set = line_aligned.read(write(names="\n".join(names), en="\n".join(names)))
    (tmp_path / "2.jpg").touch()
    with pytest.raises(FileNotFoundError, match=r"5 of the 6 .*: 0\.jpg, 1\.jpg, 3\.jpg, \.\.\."):
        find_photos(test_set, tmp_path)


def test_no_folder_of_photos(write, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder of photos .*nowhere"):
        find_photos(line_aligned.read(write(en="1\n2")), tmp_path / "nowhere")


def test_xtd10_as_published(shared):
    test_set = line_aligned.read(shared / "xtd10")
    assert test_set.name == "xtd10"
    assert " ".join(test_set.captions) == "en de es fr it ja ko pl ru tr zh"
    assert {len(part) for part in (test_set.filenames, *test_set.captions.values())} == {1000}
    assert "train2014" in test_set.filenames[799]
    assert "val2014" in test_set.filenames[800]
    assert test_set.captions["de"][147].startswith("Could not translate")


def test_flickr8k_multilingual(shared):
    test_set = line_aligned.read(shared / "flickr8k" / "multilingual_test")
    assert list(test_set.captions) == ["en", "cs", "de", "fr", "zh"]
    assert {len(part) for part in (test_set.filenames, *test_set.captions.values())} == {899}
    photos = find_photos(test_set, shared / "flickr8k")
    assert [photo.name for photo in photos] == test_set.filenames


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, as on a machine on which the licence was not shown yet."""
    monkeypatch.setenv("XLIR_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def clone(shared, tmp_path):
    """XTD10 as a clone of its repository: it has the English file in two folders."""
    folder = tmp_path / "clone"
    shutil.copytree(shared / "xtd10", folder, copy_function=shutil.copyfile)
    # The copied files may be read-only.
    for place in [folder, *folder.rglob("*")]:
        place.chmod(0o755)
    shutil.copyfile(folder / "XTD10/test_1kcaptions_en.txt", folder / "MIC/test_1kcaptions_en.txt")
    return folder


def test_xtd10_is_checked_and_has_eleven_languages(clone, shared, cache):
    test_set = xtd10.read_captions(clone)
    assert test_set.name == "xtd10"
    assert test_set == line_aligned.read(shared / "xtd10")
    assert is_xtd10(clone)
    assert all(test_set.image_of[language] == list(range(1000)) for language in test_set.captions)


def test_junk_lines_are_dropped_in_german_only(clone, cache):
    whole, clean = xtd10.read_captions(clone), xtd10.read_captions(clone, drop_junk=True)
    assert clean.name == "xtd10-without-junk"
    assert {code: len(texts) for code, texts in clean.captions.items()} == {
        code: 994 if code == "de" else 1000 for code in whole.captions
    }
    rows = clean.image_of["de"]
    assert [whole.captions["de"][row] for row in rows] == clean.captions["de"]
    dropped = [whole.captions["de"][row] for row in range(1000) if row not in rows]
    untranslated = "Could not translate"
    assert dropped == [untranslated, untranslated, "?", untranslated, "?", "dfgdfg"]


@pytest.mark.parametrize("name", ["XTD10/test_1kcaptions_ko.txt", "XTD10/test_image_names.txt"])
def test_an_altered_file_is_named_with_the_command_that_gets_it(clone, cache, name):
    file = clone / name
    file.write_bytes(file.read_bytes() + b"\n")
    with pytest.raises(ValueError, match=f"{file.name}; get XTD10 again with git clone") as error:
        xtd10.read_captions(clone)
    assert "\n" not in str(error.value)


def test_a_missing_file_or_folder_is_named_with_the_command_that_gets_it(clone, cache, tmp_path):
    (clone / "STAIR" / "test_1kcaptions_jp.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks test_1kcaptions_jp\.txt; .* git clone"):
        xtd10.read_captions(clone)
    with pytest.raises(FileNotFoundError, match=r"no captions of XTD10 in .*nowhere.* git clone"):
        xtd10.read_captions(tmp_path / "nowhere")


@pytest.fixture
def mirror(clone, tmp_path, monkeypatch):
    """A local copy of the server, which has the files under their commits."""
    folder = tmp_path / "mirror"
    for commit, paths in xtd10.COMMITS.items():
        for path in paths:
            (folder / commit / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(clone / path, folder / commit / path)
    monkeypatch.setattr(xtd10, "RAW_URL", folder.as_uri())
    return folder


def test_download_gets_what_a_clone_has(mirror, clone, cache, tmp_path):
    xtd10.download(tmp_path / "new")
    assert xtd10.read_captions(tmp_path / "new") == xtd10.read_captions(clone)
    assert (tmp_path / "new" / "LICENSE.md").read_bytes() == (clone / "LICENSE.md").read_bytes()
    shutil.rmtree(mirror)
    xtd10.download(tmp_path / "new")  # all files exist already


def test_a_download_that_differs_is_refused_and_not_kept(mirror, tmp_path):
    (file,) = mirror.rglob("test_1kcaptions_jp.txt")
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"test_1kcaptions_jp\.txt is not the file"):
        xtd10.download(tmp_path / "new")
    assert not list((tmp_path / "new").rglob("*jp*"))


def test_a_download_on_a_full_disk_leaves_nothing(mirror, tmp_path, monkeypatch):
    def fail(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        xtd10.download(tmp_path / "new")
    assert not [path for path in (tmp_path / "new").rglob("*") if path.is_file()]


def test_a_download_without_a_network_says_what_to_do(mirror, tmp_path):
    shutil.rmtree(mirror)
    with pytest.raises(
        OSError, match=r"can't download .*git clone .*--config\.evals\.xtd10\.captions=DIR"
    ):
        xtd10.download(tmp_path / "new")


def test_the_licence_is_shown_once(clone, cache, caplog):
    for _ in range(2):
        xtd10.read_captions(clone)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "noncommercial research only" in message
    assert str(clone / "LICENSE.md") in message


def test_the_names_kept_in_the_package_are_xtd10s(shared):
    names = line_aligned.read(shared / "xtd10").filenames
    ids = xtd10.origins()
    assert [f"COCO_{origin}_{number:012d}.jpg" for number, origin in ids.items()] == names


def test_a_photo_is_known_in_any_folder_and_by_coco_2017s_name():
    origins = {
        "COCO_train2014_000000061844.jpg": "train2014",
        "train2014/COCO_train2014_000000061844.jpg": "train2014",
        "000000061844.jpg": "train2014",
        "COCO_val2014_000000129945.jpg": "val2014",
        "COCO_train2014_000000000009.jpg": None,
        "000000061844.png": None,
        "61844.jpg": None,
        "": None,
    }
    assert {name: xtd10.origin(name) for name in origins} == origins
