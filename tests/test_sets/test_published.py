"""Published test sets: files in their documented layout, and the numbers that were published."""

import dataclasses
import gzip
import json
import pathlib
import re

import pytest

from configs import base
from input_pipeline import test_sets
from input_pipeline.test_sets import (
    chinese,
    crossmodal3600,
    flores_languages,
    multi30k,
    published,
    xflickrco,
)
from input_pipeline.test_sets.captioned_photos import from_pairs, photo_key, with_photos_of_folder
from tests.runs import REPOSITORY
from tests.test_data import config_of, jpeg
from xlir import data

PUBLISHED = {
    one.name: one
    for one in (
        *(crossmodal3600.SET, xflickrco.SET),
        *multi30k.SETS,
        *flores_languages.SETS,
        *chinese.SETS,
    )
}


def write(folder: pathlib.Path, files: dict[str, str]) -> pathlib.Path:
    for name, text in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return folder


def small(name, **numbers):
    """A published set of which other numbers of photos and captions are expected."""
    return dataclasses.replace(PUBLISHED[name], **numbers)


def xm3600_line(key: str, captions: dict[str, list[str]]) -> str:
    texts = {code: ["x"] for code in crossmodal3600.LANGUAGES} | captions
    fields = {
        code: {"caption": of_one, "caption/tokenized": of_one, "caption/tokenized/lowercase": []}
        for code, of_one in texts.items()
    }
    line = {"image/key": key, "image/locale": "en"} | fields
    return json.dumps(line, ensure_ascii=False) + "\n"


def test_crossmodal3600(tmp_path):
    """Photos have one to three captions of a language."""
    lines = xm3600_line("0a1b", {"de": ["Ein Hund.", "Ein Tier."], "quz": ["Allqu"]})
    lines += xm3600_line("ffff", {"de": ["Drei", "Vier", "Fünf"]})
    folder = write(tmp_path, {"captions.jsonl": lines})
    found = small("crossmodal3600", photos=2, captions=2 * 36 + 3).checked(folder)
    assert found.filenames == ["0a1b.jpg", "ffff.jpg"]
    assert len(found.captions) == 36
    assert next(iter(found.captions)) == "en"
    assert found.captions["de"] == ["Ein Hund.", "Ein Tier.", "Drei", "Vier", "Fünf"]
    assert found.image_of["de"] == [0, 0, 1, 1, 1]
    assert found.captions["quz"] == ["Allqu", "x"]
    with pytest.raises(ValueError, match=r"Crossmodal-3600: it has 2 photos, not 3,600"):
        PUBLISHED["crossmodal3600"].checked(folder)
    with pytest.raises(ValueError, match=r"it has 75 captions, not 261,375"):
        small("crossmodal3600", photos=2).checked(folder)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 is not JSON"),
        ("[]", "line 1 is not a JSON object"),
        ("{}", "without a 'image/key'"),
        ('{"image/key": "a", "ar": {}}', "without a 'caption'"),
    ],
)
def test_a_damaged_file_of_captions_is_named(tmp_path, line, message):
    folder = write(tmp_path, {"captions.jsonl": line})
    with pytest.raises(ValueError, match=message) as error:
        PUBLISHED["crossmodal3600"].checked(folder)
    assert "captions.jsonl" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_missing_folder_says_where_the_files_come_from(name, tmp_path):
    one = PUBLISHED[name]
    with pytest.raises(FileNotFoundError, match=re.escape(one.origin)):
        one.checked(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError):
        one.checked(tmp_path)


def test_the_published_numbers():
    numbers = {
        name: (len(one.languages), one.photos, one.captions) for name, one in PUBLISHED.items()
    }
    assert numbers == {
        "crossmodal3600": (36, 3600, 261375),
        "xflickrco": (8, 2000, 2000),
        "multi30k_2016": (4, 0, 1000),
        "multi30k_2017": (3, 0, 1000),
        "multi30k_2017_coco": (3, 0, 461),
        "multi30k_2018": (4, 0, 1071),
        "xtd200": (0, 1000, 1000),
        "flickr30k_200": (0, 1000, 1000),
        "flickr8k_cn": (2, 1000, 5000),
        "flickr8k_cn_translated": (2, 1000, 5000),
        "coco_cn": (1, 1000, 0),
    }


def test_multi30k(tmp_path):
    """COCO's list has the number of the caption behind the name, and may name a photo twice."""
    raw, stem = "data/task1/raw", "test_2017_mscoco"
    names = ["COCO_val2014_000000000042.jpg#7", "COCO_train2014_000000000009.jpg#8"]
    names.append("COCO_val2014_000000000042.jpg#9")
    files = {f"data/task1/image_splits/{stem}.txt": "\n".join(names) + "\n"}
    files |= {
        f"{raw}/{stem}.{code}.gz": f"{code} 1\n{code} 2\n{code} 3\n" for code in ("en", "de", "fr")
    }
    found = small("multi30k_2017_coco", captions=3).checked(write(tmp_path, files))
    assert list(found.captions) == ["en", "de", "fr"]
    assert found.filenames == [name.partition("#")[0] for name in names[:2]]
    assert (found.captions["fr"], found.image_of["fr"]) == (["fr 1", "fr 2", "fr 3"], [0, 1, 0])
    with pytest.raises(ValueError, match="it has 3 captions in en, not 461"):
        PUBLISHED["multi30k_2017_coco"].checked(tmp_path)
    write(tmp_path, {f"{raw}/{stem}.fr.gz": "1\n2\n"})
    with pytest.raises(ValueError, match=r"mscoco\.fr\.gz has 2 lines, and .* has 3"):
        PUBLISHED["multi30k_2017_coco"].checked(tmp_path)
    (tmp_path / raw / f"{stem}.fr.gz").write_bytes(gzip.compress(b"1\n2\n3\n")[:-9])
    with pytest.raises(ValueError, match=r"fr\.gz is damaged"):
        PUBLISHED["multi30k_2017_coco"].checked(tmp_path)


def test_multi30k_of_2016_has_the_captions_of_shared_flickr8k(shared, tmp_path):
    """The photos of Flickr8k among them, in four languages, as Multi30k lays them out."""
    source = shared / "flickr8k" / "multilingual_test"
    names = (source / "test_image_names.txt").read_text().splitlines()
    # Multi30k names photos as Flickr30k does.
    listed = "\n".join(photo_key(name) for name in names) + "\n"
    files = {"data/task1/image_splits/test_2016_flickr.txt": listed}
    for code in ("en", "de", "fr", "cs"):
        text = (source / f"test_captions_{code}.txt").read_text()
        files[f"data/task1/raw/test_2016_flickr.{code}.gz"] = text
    found = small("multi30k_2016", captions=899).checked(write(tmp_path, files))
    test_set = with_photos_of_folder(found, shared / "flickr8k" / "images")
    assert [file.name for file in test_set.images] == names
    assert {len(texts) for texts in test_set.captions.values()} == {899}


def test_xflickrco(tmp_path):
    """Photos may come in another order in another language."""
    names = ["1007129816.jpg", "COCO_val2014_000000391895.jpg"]
    files = {}
    for code in xflickrco.LANGUAGES:
        lines = [
            json.dumps({"sentences": [f"{code} {name}"], "id": 1, "img_path": name})
            for name in (names if code != "zh" else names[::-1])
        ]
        files[f"annotations/{code}/test.jsonl"] = "\n".join(lines) + "\n"
    folder = write(tmp_path, files)
    found = small("xflickrco", photos=2, captions=2).checked(folder)
    assert set(found.filenames) == set(names)
    for code in ("de", "zh"):
        for row, caption in zip(found.image_of[code], found.captions[code], strict=True):
            assert caption == f"{code} {found.filenames[row]}"
    with pytest.raises(ValueError, match="it has 2 photos, not 2,000"):
        PUBLISHED["xflickrco"].checked(folder)


@pytest.mark.parametrize(
    ("name", "names_file"), [("xtd200", "test_image_names.txt"), ("flickr30k_200", "filenames.txt")]
)
def test_sets_in_200_languages(name, names_file, tmp_path):
    files = {names_file: "a.jpg\nb.jpg\n", "eng_Latn.txt": "A dog\nA cat\n", "notes.txt": "x\n"}
    files |= {"deu_Latn.txt": "Hund\nKatze\n", "zho_Hans.txt": "狗\n猫\n"}
    one = small(name, photos=2, captions=2)
    found = one.checked(write(tmp_path, files))
    assert list(found.captions) == ["en", "deu_Latn", "zho_Hans"]
    assert found.captions["zho_Hans"] == ["狗", "猫"]
    assert one.entry().authors == "translated by a machine"
    write(tmp_path, {"deu_Latn.txt": "Hund\n"})
    with pytest.raises(ValueError, match=r"deu_Latn\.txt has 1 lines, and .* has 2"):
        one.checked(tmp_path)


def test_flickr8k_cn_and_coco_cn(tmp_path):
    """Only the captions of the test split are read."""
    files = {
        "data/flickr8ktest.txt": "1_ab\n2_cd\n",
        "data/flickr8kenc.caption.txt": "1_ab.jpg#enc#0 A dog .\n2_cd.jpg#enc#0 A cat .\n",
        "data/flickr8kzhc.caption.txt": "2_cd.jpg#zhc#0 猫\n3_ef.jpg#zhc#0 鸟\n1_ab.jpg#zhc#1 狗\n",
        "data/flickr8kzhmtest.captions.txt": "1_ab.jpg#zhm#0 狗狗\n2_cd.jpg#zhm#1 猫 猫\n",
        "coco-cn_test.txt": "COCO_val2014_000000000042\n",
        "imageid.human-written-caption.txt": "COCO_val2014_000000000042#0\t一只 狗\n"
        "COCO_val2014_000000000042#1\t狗\nCOCO_train2014_000000000009#0\t猫\n",
    }
    folder = write(tmp_path, files)
    written = small("flickr8k_cn", photos=2, captions=2).checked(folder)
    assert written.filenames == ["1_ab.jpg", "2_cd.jpg"]
    assert (written.captions["zh"], written.image_of["zh"]) == (["猫", "狗"], [1, 0])
    assert written.captions["en"] == ["A dog .", "A cat ."]
    translated = small("flickr8k_cn_translated", photos=2, captions=2).checked(folder)
    assert translated.captions["zh"] == ["狗狗", "猫 猫"]
    coco = small("coco_cn", photos=1).checked(folder)
    assert coco.filenames == ["COCO_val2014_000000000042.jpg"]
    assert (coco.captions, coco.image_of) == ({"zh": ["一只 狗", "狗"]}, {"zh": [0, 0]})
    write(folder, {"imageid.human-written-caption.txt": "COCO_val2014_000000000042 一\n"})
    with pytest.raises(ValueError, match="line 1 is not NAME#NUMBER CAPTION"):
        small("coco_cn", photos=1).checked(folder)


def test_captions_of_one_photo_may_be_apart():
    found = from_pairs("x", {"de": [("b", "1"), ("a", "2"), ("b", "3")]})
    assert (found.filenames, found.image_of) == (["b", "a"], {"de": [0, 1, 0]})


def test_the_names_of_a_photo_have_one_key():
    same = ("COCO_val2014_000000000042.jpg", "COCO_train2014_000000000042.jpg", "000000000042.jpg")
    assert {photo_key(f"val2014/{name}") for name in same} == {"000000000042.jpg"}
    assert photo_key("1007129816_e794419615.jpg") == photo_key("1007129816.jpg")
    assert photo_key("images/0a1b.jpg") == "0a1b.jpg"


def test_a_published_set_is_named_on_the_command_line_and_kept_out_of_training(
    photos, tmp_path, monkeypatch
):
    """Photos of the test set are in the training split under another name."""
    monkeypatch.setenv("XLIR_CACHE", str(tmp_path / "cache"))
    names = ["COCO_val2014_000000000042.jpg", "COCO_val2014_000000000043.jpg"]
    karpathy = tmp_path / "train" / "dataset_x.json"
    files = {"coco-cn_test.txt": "".join(f"{name[:-4]}\n" for name in names)}
    files["imageid.human-written-caption.txt"] = "".join(f"{name[:-4]}#0\t狗\n" for name in names)
    captions = write(tmp_path / "coco_cn", files)
    (captions / "val2014").mkdir()
    for name in names:
        (captions / "val2014" / name).write_bytes(jpeg())
    karpathy.parent.mkdir()
    entries = []
    for name, split in (("000000000042.jpg", "train"), ("7.jpg", "train"), ("8.jpg", "val")):
        (karpathy.parent / name).write_bytes(jpeg(len(entries)))
        entries.append({"filename": name, "split": split, "sentences": [{"raw": name}]})
    karpathy.write_text(json.dumps({"images": entries}))
    config = config_of(karpathy.parent, "captions")
    monkeypatch.setitem(chinese.ENTRIES, "coco_cn", small("coco_cn", photos=2).entry())
    (test_set,) = data.test_sets(config, f"coco_cn:{captions}")
    assert (test_set.name, list(test_set.filenames)) == ("coco_cn", names)
    assert [file.name for file in test_set.images] == names
    assert data.training_photos(
        config_of(karpathy.parent, "captions", evals={"a": base.test_set("split", split="val")})
    ).filenames == ["000000000042.jpg", "7.jpg"]
    config.evals.chinese = base.test_set("coco_cn", captions=str(captions))
    assert data.training_photos(config).filenames == ["7.jpg"]


def test_the_page_of_test_sets_has_a_line_for_each_published_set():
    page = (REPOSITORY / "docs" / "test_sets.md").read_text()
    for type in test_sets.TYPES:
        entry = test_sets.find(type)
        (line,) = [line for line in page.splitlines() if line.startswith(f"| `{type}`")]
        assert entry.authors in line
        assert entry.origin in page
    assert published.MACHINE in page
