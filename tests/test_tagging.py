"""Compares the tagger with brute force; tests `tag` and `eval --task=tagging`."""

import dataclasses
import io
import json
import os
import pathlib
import re
import runpy
import shutil
import subprocess
import types

import numpy as np
import pytest
from PIL import Image

from configs import base
from input_pipeline import vocabularies
from input_pipeline.datasets import emoji
from input_pipeline.tokenizers import byte_tokenizer
from tests.runs import REPOSITORY, run_main
from tests.test_main import NO_JAX, refusal
from tests.test_photo_limits import odd_files, png, within
from xlir import embed, encoder, evaluate_tagging, figures, metrics, reference_photos, tagging
from xlir.commands import tag

SHAPES = "en\tde\ncircle\tKreis|Scheibe\nsquare\tQuadrat\nline\tStrich\nred\trot\nblue\tblau\n"


def unit(rng, *shape):
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


class FakeEncoder(encoder.Encoder):
    """Embeds each text at a random point, which is always the same for the same text."""

    tokenizer = byte_tokenizer()

    def __init__(self):
        pass

    def encode_text(self, texts):
        return np.concatenate([unit(np.random.default_rng(list(t.encode())), 1, 8) for t in texts])


@pytest.fixture
def vocabulary():
    rows = [("dog", "hound"), ("cat",), ("tree", "bush", "shrub"), ("car",)]
    return vocabularies.Vocabulary(
        "small", [first for first, *_ in rows], {"en": rows, "xx": [(r[0].upper(),) for r in rows]}
    )


@pytest.fixture
def reference():
    rng = np.random.default_rng(0)
    return reference_photos.Reference(unit(rng, 60, 8), unit(rng, 200, 8))


def test_scores_are_csls_by_brute_force(vocabulary, reference):
    fake = FakeEncoder()
    tagger = tagging.Tagger(fake, vocabulary, "en", reference)
    images = unit(np.random.default_rng(1), 5, 8)
    for column, names in enumerate(vocabulary.names_in("en")):
        texts = [template.format(n) for n in names for template in tagging.TEMPLATES["en"]]
        text = fake.encode_text(texts).mean(axis=0)
        text /= np.linalg.norm(text)
        np.testing.assert_allclose(tagger.embeddings[column], text, rtol=1e-5)
    for row, image in enumerate(images):
        for column, text in enumerate(tagger.embeddings):
            near_text = sorted(float(text @ other) for other in reference.training)[-10:]
            near_image = [float(image @ other) for other in tagger.embeddings]  # only four
            expected = image @ text - np.mean(near_text) / 2 - np.mean(near_image) / 2
            assert tagger.scores(images)[row, column] == pytest.approx(expected, abs=1e-5)


def test_a_language_without_prompts_has_bare_names(vocabulary):
    tagger = tagging.Tagger(FakeEncoder(), vocabulary, "xx")
    expected = FakeEncoder().encode_text(["DOG", "CAT", "TREE", "CAR"])
    np.testing.assert_allclose(tagger.embeddings, expected, rtol=1e-5)
    assert tagger.names == ["DOG", "CAT", "TREE", "CAR"]
    assert tagger.tags == ["dog", "cat", "tree", "car"]


def test_french_prompts_elide():
    found = tagging.embed_names(FakeEncoder(), [("arbre",), ("œil",), ("moto",)], "fr")
    texts = ["une photo d'arbre", "une photo d'œil", "une photo de moto"]
    sums = FakeEncoder().encode_text(["arbre", "œil", "moto"]) + FakeEncoder().encode_text(texts)
    np.testing.assert_allclose(found, sums / np.linalg.norm(sums, axis=1, keepdims=True), rtol=1e-5)


def many_tags(count):
    """A vocabulary of `count` tags with one English name each."""
    rows = [(f"tag {number}",) for number in range(count)]
    return vocabularies.Vocabulary("many", [first for first, *_ in rows], {"en": rows})


@pytest.mark.parametrize("language", ["en", "xx"])
@pytest.mark.parametrize("percentile", [0.5, 0.9, 0.99])
def test_a_percentile_means_the_same_share_of_held_out_pairs(
    vocabulary, reference, language, percentile
):
    tagger = tagging.Tagger(FakeEncoder(), vocabulary, language, reference)
    above = tagger.prominences(reference.held_out) >= tagger.prominence_at(percentile)
    # The threshold is a mean of quantiles, from only 800 pairs.
    assert above.mean() == pytest.approx(1 - percentile, abs=0.01)
    tags = tagger.tag(reference.held_out, threshold=percentile)
    assert sum(map(len, tags)) == above.sum()
    assert all(tag.percentile >= percentile - 0.002 for of_image in tags for tag in of_image)


def test_percentiles_are_precise_up_to_the_highest_and_lowest_prominence():
    rng = np.random.default_rng(5)
    reference = reference_photos.Reference(unit(rng, 60, 8), unit(rng, 100, 8))
    tagger = tagging.Tagger(FakeEncoder(), many_tags(500), "en", reference)
    prominences = tagger.prominences(reference.held_out)
    for percentile in (0.01, 0.5, 0.9, 0.99, 0.999):
        below = (prominences < tagger.prominence_at(percentile)).mean()
        assert min(below, 1 - below) == pytest.approx(min(percentile, 1 - percentile), rel=0.1)
    ends = [prominences.min(), prominences.max()]
    assert [tagger.prominence_at(percentile) for percentile in (0.0, 1.0)] == pytest.approx(ends)
    percentiles = tagger.percentiles(np.linspace(ends[0] - 1, ends[1] + 1, 1000))
    assert (np.diff(percentiles) >= 0).all()
    assert (percentiles[0], percentiles[-1]) == (0, 1)
    for outside in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="must be between 0 and 1"):
            tagger.prominence_at(outside)


def test_tags_are_sorted_and_cut(vocabulary, reference):
    tagger = tagging.Tagger(FakeEncoder(), vocabulary, "en", reference)
    images = unit(np.random.default_rng(2), 7, 8)
    for of_image, scores in zip(tagger.tag(images), tagger.scores(images), strict=True):
        assert [tag.tag for tag in of_image] == [tagger.tags[i] for i in np.argsort(-scores)]
        percentiles = [tag.percentile for tag in of_image]
        assert percentiles == sorted(percentiles, reverse=True)
    assert [tags[:2] for tags in tagger.tag(images)] == tagger.tag(images, top_k=2)
    assert tagger.tag(images, threshold=1.0, top_k=3) == [[]] * 7


def test_prominences_are_from_the_best_of_the_image_and_keep_the_order_in_it(reference):
    tagger = tagging.Tagger(FakeEncoder(), many_tags(50), "en", reference)
    images = unit(np.random.default_rng(4), 6, 8)
    scores, prominences = tagger.scores(images), tagger.prominences(images)
    assert (np.argsort(scores) == np.argsort(prominences)).all()
    best = np.sort(prominences)[:, -tagging.BEST_TAGS :]
    np.testing.assert_allclose(best.mean(axis=1), 0, atol=1e-6)
    # For each image, prominences differ from scores by a constant.
    np.testing.assert_allclose(np.diff(scores, axis=1), np.diff(prominences, axis=1), atol=1e-6)


def test_without_reference_photos_there_are_cosines_and_no_percentiles(vocabulary):
    tagger = tagging.Tagger(FakeEncoder(), vocabulary, "en")
    images = unit(np.random.default_rng(3), 2, 8)
    np.testing.assert_allclose(tagger.scores(images), images @ tagger.embeddings.T)
    assert tagger.tag(images, top_k=1)[0][0].percentile is None
    with pytest.raises(ValueError, match="a threshold needs"):
        tagger.tag(images, threshold=0.9)


def test_images_are_found_once_in_order(tmp_path):
    for name in ("b.jpg", "a.PNG", "notes.txt", "deep/c.jpeg", "odd.data"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.touch()

    def found(*paths):
        files = tag.find_images([str(tmp_path / path) for path in paths])
        return [str(file.relative_to(tmp_path)) for file in files]

    assert found("") == ["a.PNG", "b.jpg", "deep/c.jpeg"]
    assert found("b.jpg", "*.jpg", "odd.data") == ["b.jpg", "odd.data"]
    assert found("**/*.jpeg") == ["deep/c.jpeg"]
    for absent in ("none.jpg", "*.gif"):
        with pytest.raises(FileNotFoundError, match="there is no image"):
            found(absent)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no images in"):
        found("empty")


class CountingEncoder(encoder.Encoder):
    """Decodes a file to pixels with the number in its name; every seventh file is broken."""

    mesh = types.SimpleNamespace(size=1)

    def __init__(self):
        self.sizes, self.embedder = [], self

    def decode(self, file):
        if int(file.name) % 7 == 3:
            raise ValueError(f"{file} is broken")
        return np.full((1, 1, 3), int(file.name), np.uint8)

    def encode_image(self, images):
        self.sizes.append(len(images))
        return np.stack([image[0, 0, :1].astype(np.float32) for image in images])


def test_batches_skip_what_is_broken_and_keep_the_order():
    fake, skipped, seen = CountingEncoder(), [], []
    numbers = [pathlib.Path(str(number)) for number in range(100)]
    for files, images in tagging.embed_files(fake, numbers, skipped.append):
        assert images[:, 0].tolist() == [int(file.name) for file in files]
        seen += files
    assert seen == [number for number in numbers if int(number.name) % 7 != 3]
    assert len(skipped) == 14
    # The last batch is padded, so only one shape is compiled.
    assert set(fake.sizes) == {embed.IMAGE_BATCH}
    fake = CountingEncoder()
    assert len(list(tagging.embed_files(fake, numbers[1:3], skipped.append))) == 1
    assert fake.sizes == [2]


@pytest.fixture(scope="module")
def tagged(workdir, photos_folder, tmp_path_factory):
    """A copy of a run, and the output of `tag` for a folder that contains broken files."""
    folder = tmp_path_factory.mktemp("tag")
    shutil.copytree(workdir, folder / "run")
    (folder / "shapes.tsv").write_text(SHAPES)
    shutil.copytree(photos_folder, folder / "images")
    (folder / "images" / "05.jpg").write_bytes(b"not a photo")
    (folder / "images" / "06.jpg").write_bytes((photos_folder / "06.jpg").read_bytes()[:300])
    process = run_main(
        *("tag", f"--workdir={folder / 'run'}", f"--vocabulary={folder / 'shapes.tsv'}"),
        *("--language=en,de", "--top_k=3", f"--output={folder / 'tags.jsonl'}"),
        *(f"--sheet={folder / 'sheet.png'}", str(folder / "images")),
    )
    return folder, process


@pytest.fixture(scope="module")
def photos_folder(photos):
    return photos / "images"


def test_tag_writes_lines_a_table_and_a_sheet(tagged):
    folder, process = tagged
    lines = [json.loads(line) for line in (folder / "tags.jsonl").read_text().splitlines()]
    assert [line["language"] for line in lines] == ["en", "de"] * 58
    names = [f"{n:02d}.jpg" for n in range(60) if n not in (5, 6)]
    assert [line["image"] for line in lines[::2]] == [str(folder / "images" / n) for n in names]
    german = dict(row.split("\t") for row in SHAPES.splitlines())
    for line in lines:
        assert len(line["tags"]) == 3
        for found in line["tags"]:
            assert 0 <= found["percentile"] <= 1
            assert -1 <= found["cosine"] <= 1
            expected = german[found["tag"]].split("|")[0]
            assert found["name"] == (found["tag"] if line["language"] == "en" else expected)
    assert len(process.stdout.splitlines()) == 2 * 58
    with Image.open(folder / "sheet.png") as image:
        image.load()
        assert min(image.size) > 300


def test_tag_reports_each_broken_image_and_their_number(tagged):
    folder, process = tagged
    skipped = [line for line in process.stderr.splitlines() if "skipped" in line]
    assert len(skipped) == 3
    assert str(folder / "images" / "05.jpg") in skipped[0]
    assert str(folder / "images" / "06.jpg") in skipped[1]
    assert skipped[2] == "2 of 60 images were skipped"


@pytest.fixture(scope="module")
def odd(photos_folder, tmp_path_factory) -> pathlib.Path:
    """A folder with two good photos that have odd names, and files that hang or fill memory."""
    folder = tmp_path_factory.mktemp("odd")
    names = [b"caf\xe9 \xf0.jpg", "line\nend \x1b[2J größe.jpg".encode()]
    for name in names:
        try:
            shutil.copy(os.fsencode(photos_folder / "07.jpg"), os.fsencode(folder) + b"/" + name)
        except OSError:
            pytest.skip("the file system does not allow such names")
    odd_files(folder)
    (folder / "bomb.png").write_bytes(png(13_300, 13_300))
    return folder


def good(odd: pathlib.Path) -> list[bytes]:
    """The photos' paths."""
    names = sorted(os.listdir(os.fsencode(odd)))
    return [os.fsencode(odd) + b"/" + name for name in names if b" " in name]


def test_tag_names_and_skips_what_is_no_photo_and_goes_on(tagged, odd, tmp_path):
    folder, _ = tagged
    output = os.fsencode(tmp_path) + b"/tags-\xe9.jsonl"
    sheet = os.fsencode(tmp_path) + b"/sheet-\xe9.png"
    with within(100):
        process = run_main(
            *("tag", f"--workdir={folder / 'run'}", f"--vocabulary={folder / 'shapes.tsv'}"),
            *("--language=en", f"--output={os.fsdecode(output)}", f"--sheet={os.fsdecode(sheet)}"),
            *(str(odd), str(folder / "images" / "07.jpg")),
        )
    skipped = [line for line in process.stderr.splitlines() if "skipped" in line]
    assert len(skipped) == 5
    for name, line in zip(("bomb.png", "device", "fifo", "link"), skipped[:4], strict=True):
        assert line.startswith(f"skipped: {odd}/{name}")
        reason = "a photo may take at most 500 MB" if name == "bomb.png" else "regular file"
        assert reason in line
    assert skipped[4] == "4 of 7 images were skipped"
    assert "Warning" not in process.stderr
    shown = [r"caf\udce9 \udcf0.jpg", r"line\nend \x1b[2J größe.jpg"]
    printed = process.stdout.splitlines()
    assert [line.split("  en ")[0].rstrip() for line in printed[:2]] == [
        f"{odd}/{n}" for n in shown
    ]
    with open(output, encoding="utf8") as file:
        lines = [json.loads(line) for line in file]
    assert [os.fsencode(line["image"]) for line in lines] == [
        *good(odd),
        os.fsencode(folder / "images" / "07.jpg"),
    ]
    assert lines[0]["tags"] == lines[1]["tags"] == lines[2]["tags"]
    with Image.open(io.BytesIO(pathlib.Path(os.fsdecode(sheet)).read_bytes())) as image:
        image.load()


def test_printed_lines_are_utf8_whatever_the_terminal(command, tagged, odd):
    folder, _ = tagged
    process = command(
        *("tag", f"--workdir={folder / 'run'}", f"--vocabulary={folder / 'shapes.tsv'}"),
        *("--language=en", "--output=-", f"{odd}/caf*.jpg", f"{odd}/line*.jpg"),
        PYTHONIOENCODING="latin-1",
    )
    names = [os.fsencode(json.loads(line)["image"]) for line in process.stdout.splitlines()]
    assert names == good(odd)


def test_a_record_is_json_of_any_name():
    for name in (b"\xff.jpg", "größe 犬.jpg".encode(), b'a\\udcff\xff".jpg', b"\xed\xa0\x80.jpg"):
        line = tag.json_line(tag.record(pathlib.Path(os.fsdecode(name)), "en", []))
        assert os.fsencode(json.loads(line.encode())["image"]) == name
    assert '"größe 犬"' in tag.json_line(tag.record(pathlib.Path("größe 犬"), "en", []))


@pytest.fixture
def read_only(tmp_path):
    """A folder that nobody can write to, not even root."""
    folder = tmp_path / "read-only"
    folder.mkdir(mode=0o555)
    if os.geteuid():
        yield folder
        return
    words = ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("can't mount a read-only folder")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("flag", ["output", "sheet"])
@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("missing/file.png", "there is no folder"),
        ("folder.png", "it is a folder"),
        ("read-only/file.png", "Read-only file system"),
    ],
)
def test_where_tag_writes_is_looked_at_before_any_work(
    command, read_only, tmp_path, flag, place, reason
):
    (tmp_path / "folder.png").mkdir()
    arguments = ["--vocabulary=coco", f"--{flag}={tmp_path / place}", "a.jpg"]
    process = command("tag", f"--workdir={tmp_path}", *arguments, script=NO_JAX, check=False)
    line = refusal(process, 1)
    assert f"{tmp_path / place} can't be written: " in line
    assert reason in line


def test_tag_needs_nothing_but_the_run_and_may_print_lines(tagged, tmp_path):
    """The run's folder holds the reference photos, so the data set may be missing."""
    folder, _ = tagged
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    config = json.loads((run / "config.json").read_text())
    config["data"]["dir"] = str(tmp_path / "gone")
    (run / "config.json").write_text(json.dumps(config))
    (run / "SHA256SUMS").unlink()
    arguments = ["tag", f"--workdir={run}", f"--vocabulary={folder / 'shapes.tsv'}"]
    arguments += ["--language=de", "--output=-", str(folder / "images" / "07.jpg")]
    process = run_main(*arguments, "--threshold=0.3")
    (line,) = process.stdout.splitlines()
    expected = [json.loads(line) for line in (folder / "tags.jsonl").read_text().splitlines()]
    (kept,) = [
        one for one in expected if one["image"].endswith("07.jpg") and one["language"] == "de"
    ]
    found = json.loads(line)["tags"]
    assert [tag["tag"] for tag in found[:2]] == [tag["tag"] for tag in kept["tags"][:2]]
    assert all(tag["percentile"] >= 0.3 for tag in found)

    shutil.rmtree(run / "tagging")
    process = run_main(*arguments)
    assert "scores are plain cosines" in process.stderr
    assert json.loads(process.stdout)["tags"][0]["percentile"] is None
    last = run_main(*arguments, "--threshold=0.3", check=False)
    assert last.returncode == 1
    assert "a threshold needs the run's data set" in last.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (["--vocabulary=coco"], 2, ["tag needs images"]),
        (["a.jpg"], 2, ["tag needs --vocabulary"]),
        (["--vocabulary=coco", "--language=", "a.jpg"], 2, ["--language= names no language"]),
        (["--vocabulary=cocoa", "a.jpg"], 1, ["no vocabulary 'cocoa'", "coco, flickr8k, emoji"]),
        (["--vocabulary=coco", "--language=xx", "a.jpg"], 1, ["no language 'xx'", "en de es"]),
        (["--vocabulary=coco", "none.jpg"], 1, ["there is no image none.jpg"]),
        (["--vocabulary=coco", "docs/*.jpg"], 1, ["there is no image docs/*.jpg"]),
        (["--vocabulary=coco", "configs"], 1, ["there are no images in configs"]),
        (
            ["--vocabulary=coco", "--threshold=3", "a.jpg"],
            2,
            ["--threshold=3.0 is not between 0 and 1"],
        ),
        (["--vocabulary=coco", "--top_k=0", "a.jpg"], 2, ["top_k"]),
        (["--vocabulary=coco", "--drop_junk", "a.jpg"], 2, ["--drop_junk is a flag of eval"]),
        (["--vocabulary=README.md", "a.jpg"], 1, ["README.md"]),
        (["--vocabulary=coco", "--sheet=a.txt", "a.jpg"], 2, ["--sheet=a.txt should end in .png"]),
    ],
)
def test_refusals_of_tag_are_one_line(tmp_path, arguments, code, parts):
    line = refusal(run_main("tag", f"--workdir={tmp_path}", *arguments, check=False), code)
    for part in parts:
        assert part in line


def test_eval_of_tags_from_captions(tagged):
    folder, _ = tagged
    arguments = ["eval", f"--workdir={folder / 'run'}", "--task=tagging"]
    no_vocabulary = run_main(*arguments, check=False)
    assert no_vocabulary.returncode == 1
    assert "no vocabulary belongs to shapes: name one" in no_vocabulary.stderr
    process = run_main(*arguments, f"--vocabulary={folder / 'shapes.tsv'}")
    (file,) = (folder / "run" / "results").glob("shapes-test-shapes-tagging-*.json")
    results = json.loads(file.read_text())
    assert (results["images"], results["tags"], results["labels"]) == (16, 5, "captions")
    assert set(results["languages"]) == {"en", "de"}
    english = results["languages"]["en"]
    assert english["mAP"] > 0.4  # chance: a third, a fifth
    # There are five tags in all, so all pass at the percentile where a photo has five.
    assert (
        english["predicted_tags"]["one_percentile"]
        == english["predicted_tags"]["one_loose_percentile"]
    )
    assert (
        english["predicted_tags"]["one_percentile"]
        > english["predicted_tags"]["one_strict_percentile"]
    )
    assert english["cosine"].keys() == english.keys() - {"cosine", "predicted_tags"}
    assert results["zero_shot_macro"]["mAP"] == results["languages"]["de"]["mAP"]
    assert file.with_suffix(".tags.png").is_file()
    assert "between the languages with the most and the fewest" in process.stdout
    assert str(file) in process.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["--task=taging"], 2, "taging"),
        (["--task=tagging", "--images=x"], 2, "--images is not a flag of --task=tagging"),
        (["--vocabulary=coco"], 2, "--vocabulary is not a flag of --task=retrieval"),
        (["--task=tagging", "--test_set=xtd10"], 2, "--task=tagging needs split:NAME"),
    ],
)
def test_refusals_of_eval_are_one_line(workdir, arguments, code, part):
    process = run_main("eval", f"--workdir={workdir}", *arguments, check=False)
    assert process.returncode == code
    assert part in process.stderr.splitlines()[-1]


def test_what_is_true_of_emoji_is_their_own_name():
    config = base.get_config()
    config.data.name = "emoji"
    chosen = evaluate_tagging.tagging_set(config)
    assert (chosen.name, chosen.labels) == ("emoji-tagging", "names")
    assert chosen.positive.shape == (400, 1914)
    assert (chosen.positive.sum(axis=1) == 1).all()
    own = chosen.positive.argmax(axis=1)
    for language, captions in emoji.translations("test").items():
        names = chosen.vocabulary.names_in(language)
        assert [names[row] for row in own] == [(caption,) for caption in captions]


@pytest.mark.parametrize("noise", [0, 1e-7])
def test_a_collapsed_encoder_tags_at_chance(vocabulary, noise):
    """Photos have several of four tags; the result equals that of exactly equal scores."""
    rng = np.random.default_rng(0)
    point = unit(rng, 1, 64)

    class Collapsed(FakeEncoder):
        def encode_text(self, texts):
            return self.encode_image(texts)

        def encode_image(self, images):
            return (point * (1 + noise * rng.normal(size=(len(images), 64)))).astype(np.float32)

    fake, config = Collapsed(), base.get_config()
    config.data.name = "emoji"
    positive = rng.random((400, 4)) < 0.4
    chosen = dataclasses.replace(
        evaluate_tagging.tagging_set(config), vocabulary=vocabulary, positive=positive
    )
    photos = reference_photos.Reference(fake.encode_image(range(60)), fake.encode_image(range(200)))
    taggers = {code: tagging.Tagger(fake, vocabulary, code, photos) for code in ("en", "xx")}
    images = fake.encode_image(range(400))
    results = evaluate_tagging.evaluate_set(chosen, taggers, images, photos, 0)
    counts = positive.sum(axis=1)
    for result in results["languages"].values():
        for kind in (result, result["cosine"]):
            assert kind["hit@1"] == pytest.approx(counts[counts > 0].mean() / 4)
            exact = metrics.tagging(np.zeros((400, 4)), positive, evaluate_tagging.TOP)
            assert {name: kind[name] for name in exact} == pytest.approx(exact)


def test_what_is_true_of_coco_is_its_instances_where_they_are(shared, tmp_path):
    config = base.get_config()
    config.data.name, config.data.dir = "captions", str(tmp_path)
    for place in ("train2014", "val2014", "dataset_coco.json"):
        (tmp_path / place).symlink_to(shared / "coco_mini" / place)
    chosen = evaluate_tagging.tagging_set(config)
    assert (chosen.name, chosen.labels) == ("coco-test-tagging", "captions")
    assert chosen.positive[:, chosen.vocabulary.tags.index("person")].sum() > 5

    tags = chosen.vocabulary.tags
    content = {
        "images": [{"id": int(image_id)} for image_id in chosen.photos.image_ids],
        "categories": [{"id": number, "name": tag} for number, tag in enumerate(tags, 1)],
        # Each photo shows one object.
        "annotations": [
            {"image_id": int(image_id), "category_id": 1 + int(image_id) % 80}
            for image_id in chosen.photos.image_ids
        ],
    }
    (tmp_path / "instances_val2014.json").write_text(json.dumps(content))
    chosen = evaluate_tagging.tagging_set(config)
    assert chosen.labels == "instances_val2014.json"
    np.testing.assert_array_equal(
        chosen.positive.argmax(axis=1), chosen.photos.image_ids.astype(int) % 80
    )
    assert (chosen.positive.sum(axis=1) == 1).all()


@pytest.mark.parametrize(
    ("count", "tags"),
    [(1, {"de": ["rot"]}), (5, {"de": ["rot"], "fr": []}), (2, {"fa": ["قرمز"]}), (2, {"de": []})],
)
def test_sheets_of_any_number_and_script(photos_folder, tmp_path, count, tags):
    pictures = sorted(photos_folder.iterdir())[:count]
    file = tmp_path / "sheet.png"
    figures.plot_tags(pictures, {code: [names] * count for code, names in tags.items()}, file, 1)
    with Image.open(file) as image:
        image.load()


def test_the_benchmark_of_throughput_runs(workdir, photos, monkeypatch, capsys):
    flags = [f"--workdir={workdir}", f"--images={photos / 'images'}", "--photos=40", "--tags=30"]
    monkeypatch.setattr("sys.argv", ["tagging.py", *flags])
    runpy.run_path(str(REPOSITORY / "benchmarks" / "tagging.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["with compilation", "measured"]
    for line in lines:
        text, image = map(float, re.findall(r"tower (\d+\.\d) s", line))
        share = float(re.search(r"towers (\d+\.\d)%", line)[1])
        assert 0 < share < 100
        assert text + image <= float(re.search(r"(\d+\.\d) s:", line)[1]) + 0.1
