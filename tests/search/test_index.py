"""An index finds the same photos as an evaluation, and loses none."""

import json
import os
import pathlib
import re
import shutil
import signal

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("lancedb", reason="needs pip install 'xlir[search]'")

import xlir
from tests import runs
from tests.runs import run_main
from xlir.search import index as search_index
from xlir.search import photo_rows
from xlir.search import photos as collection
from xlir.search.query import WITHOUT_WEIGHT


@pytest.fixture(scope="module")
def encoder(toy_run):
    """The encoder of the toy run."""
    return xlir.Encoder.load(toy_run)


@pytest.fixture(scope="session")
def made(toy_run, session_folder):
    """An empty index; tests copy it."""
    return runs.once(
        session_folder / "empty-index", lambda to: xlir.Index.create(to, toy_run) and None
    )


@pytest.fixture
def folder(request, made, toy_run, tmp_path):
    """The folder of an empty index, whose rows are on a server if the parameter is "milvus"."""
    if getattr(request, "param", "lance") == "lance":
        return shutil.copytree(made, tmp_path / "index")
    server = request.getfixturevalue("milvus_server")
    store = f"{server}/{re.sub(r'[^A-Za-z_]', '_', request.node.name)}"
    return xlir.Index.create(tmp_path / "index", toy_run, store).folder


on_each_store = pytest.mark.parametrize("folder", ["lance", "milvus"], indirect=True)


@pytest.fixture
def index(folder):
    """An empty index."""
    return xlir.Index.open(folder)


@pytest.fixture
def album(photos, tmp_path):
    """A folder with 12 photos, in two folders."""
    for number in range(12):
        place = tmp_path / "album" / ("a" if number < 6 else "b")
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(photos / "images" / f"{number:02d}.jpg", place)
    return tmp_path / "album"


def paths_of(index) -> list[str]:
    """The paths of all photos of an index."""
    batches = index._store.scan(["path"])
    return sorted(path for batch in batches for path in batch["path"].to_pylist())


def files_of(folder: pathlib.Path) -> list[str]:
    """The paths of all photos of a folder."""
    return sorted(str(file) for file in folder.rglob("*.jpg"))


def test_recall_through_an_index_is_that_of_an_evaluation(photos, workdir, tmp_path):
    index = xlir.Index.create(tmp_path / "index", workdir)
    test_set = photos / "multilingual_test"
    where = [f"--test_set={test_set}", f"--images={photos / 'images'}"]
    run_main("eval", f"--workdir={workdir}", *where)
    (file,) = (workdir / "results").glob("multilingual_test-*.json")
    result = json.loads(file.read_text())
    names = (test_set / "test_image_names.txt").read_text().split()
    index.add([photos / "images" / name for name in names])
    assert index.count() == len(names)
    for language, expected in result["languages"].items():
        captions = (test_set / f"test_captions_{language}.txt").read_text().splitlines()
        found = [
            [pathlib.Path(hit.path).name for hit in index.search(caption, count=10)]
            for caption in captions
        ]
        for k in (1, 5, 10):
            recall = np.mean([name in row[:k] for name, row in zip(names, found, strict=True)])
            assert recall == pytest.approx(expected["text_to_image"][f"R@{k}"], abs=1e-9)


@on_each_store
def test_a_hit_has_the_cosine_of_the_encoder(index, album, encoder):
    index.add([album])
    hits = index.search("rot, Kreis", count=12)
    assert len(hits) == 12
    cosines = (
        encoder.encode_image([hit.path for hit in hits]) @ encoder.encode_text(["rot, Kreis"]).T
    )
    np.testing.assert_allclose([hit.cosine for hit in hits], cosines[:, 0], atol=2e-3)
    assert [hit.cosine for hit in hits] == sorted((hit.cosine for hit in hits), reverse=True)
    best = hits[0]
    with Image.open(best.path) as image:
        assert (best.width, best.height) == image.size
    assert best.size == os.path.getsize(best.path)
    assert index.search(pathlib.Path(best.path).read_bytes(), count=1)[0].path == best.path


def test_parts_of_a_query(index, album, encoder):
    index.add([album])
    red, circle, line = encoder.encode_text(["rot", "Kreis", "Strich"])
    expected = red + circle - WITHOUT_WEIGHT * line
    query = index.embed_query(["rot", "Kreis"], ["Strich"])
    np.testing.assert_allclose(query, expected / np.linalg.norm(expected), atol=1e-5)
    with pytest.raises(ValueError, match="needs a text or a photo"):
        index.search()


def test_percentiles_tell_whether_anything_fits(photos, workdir, tmp_path):
    index = xlir.Index.create(tmp_path / "index", workdir)
    index.add([photos / "images"])
    captions = ["A red circle, left.", "A blue line, middle.", "ein grünes Quadrat, rechts"]
    hits = [index.search(caption, count=60) for caption in captions]
    for found in hits:
        shares = [hit.percentile for hit in found]
        assert shares == sorted(shares, reverse=True)
        assert 0 <= shares[-1] < 0.2 < shares[0] <= 1
        some = index.search(captions[hits.index(found)], count=60, cutoff=0.1)
        assert some == [hit for hit in found if hit.percentile >= 0.1]
    # The scores of held-out captions spread over the whole range by construction.
    val = [number for number in range(30, 36)]
    held_out = xlir.Index.create(tmp_path / "held-out", workdir)
    held_out.add([photos / "images" / f"{number}.jpg" for number in val])
    entries = json.loads((photos / "dataset_shapes.json").read_text())["images"]
    best = [
        held_out.search(entries[number]["sentences"][0]["raw"], count=1)[0].percentile
        for number in val
    ]
    np.testing.assert_allclose(sorted(best), np.arange(6) / 6, atol=1 / 6 + 1e-6)
    photo = index.search((photos / "images" / "00.jpg").read_bytes(), cutoff=1.0)
    assert len(photo) == 10
    assert photo[0].percentile is None


def test_without_the_data_set_there_are_no_percentiles(toy_run, photos, album, tmp_path, caplog):
    run = shutil.copytree(toy_run, tmp_path / "run")
    shutil.rmtree(run / "tagging", ignore_errors=True)
    config = json.loads((run / "config.json").read_text())
    config["data"]["dir"] = str(tmp_path / "missing")
    (run / "config.json").write_text(json.dumps(config))
    (run / "SHA256SUMS").unlink()
    index = xlir.Index.create(tmp_path / "index", run)
    assert "no calibrated percentiles" in caplog.text
    index.add([album])
    assert [hit.percentile for hit in index.search("rot", count=3, cutoff=0.9)] == [None] * 3


def test_a_damaged_calibration(index, folder):
    file = folder / "calibration.npz"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"calibration\.npz is damaged"):
        xlir.Index.open(folder)


@on_each_store
def test_only_new_and_changed_photos_are_embedded(index, album, monkeypatch):
    added = index.add([album])
    assert (added.new, added.changed, added.unchanged) == (12, 0, 0)
    embedded = []
    read = collection.describe
    monkeypatch.setattr(
        collection, "describe", lambda data, modified: embedded.append(1) or read(data, modified)
    )
    assert index.add([album]).unchanged == 12
    shutil.copy(album / "a" / "00.jpg", album / "c.jpg")
    changed = album / "b" / "07.jpg"
    shutil.copy(album / "a" / "01.jpg", changed)
    added = index.add([album, album / "a"])
    assert (added.new, added.changed, added.unchanged) == (1, 1, 11)
    assert len(embedded) == 2
    assert paths_of(index) == files_of(album)
    # The changed photo is found by its new pixels.
    best = index.search(changed.read_bytes(), count=2)
    assert {hit.path for hit in best} == {str(changed), str(album / "a" / "01.jpg")}


@on_each_store
def test_photos_that_are_gone_leave_only_with_prune(index, album, tmp_path):
    other = shutil.copytree(album / "a", tmp_path / "other")
    index.add([album, other])
    (album / "a" / "03.jpg").unlink()
    shutil.rmtree(other)
    assert index.add([album]).removed == 0
    assert index.count() == 18
    assert index.add([album], prune=True).removed == 1
    # Deleted photos of other folders stay in the index.
    assert index.count() == 17
    assert index.add([album], prune=True, exclude=["b"]).removed == 6
    index.remove([album / "a" / "00.jpg", album / "nothing.jpg"])
    assert index.count(f"folder '{album}'") == 4


def test_photos_of_an_archive_that_is_damaged_stay(index, album, tmp_path):
    archive = pathlib.Path(shutil.make_archive(str(tmp_path / "one"), "zip", album / "b"))
    index.add([album / "a", archive])
    whole = archive.read_bytes()
    archive.write_bytes(whole[:-30])
    assert index.add([album / "a", archive], prune=True).removed == 0
    (album / "a" / "03.jpg").unlink()
    assert index.add([album / "a", archive], prune=True).removed == 1
    assert index.count() == 11


def test_an_empty_folder_is_not_pruned(index, album):
    index.add([album])
    shutil.rmtree(album)
    album.mkdir()
    with pytest.raises(ValueError, match="a disk not mounted"):
        index.add([album], prune=True)
    assert index.count() == 12


@on_each_store
def test_broken_photos_are_named_and_skipped(index, album):
    (album / "broken.jpg").write_bytes(b"\xff\xd8 no photo")
    whole = (album / "a" / "00.jpg").read_bytes()
    (album / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    skipped = []
    added = index.add([album], skip=skipped.append)
    assert added.skipped == 2
    assert added.new == 12
    assert [text.split(": ")[0] for text in sorted(skipped)] == [
        str(album / "broken.jpg"),
        str(album / "cut.jpg"),
    ]
    assert paths_of(index) == sorted(
        set(files_of(album)) - {str(album / "broken.jpg"), str(album / "cut.jpg")}
    )


def test_an_archive_is_like_a_folder(index, album, tmp_path):
    archives = [
        pathlib.Path(shutil.make_archive(str(tmp_path / name), kind, album))
        for name, kind in (("one", "zip"), ("two", "tar"), ("three", "gztar"))
    ]
    index.add([album, *archives])
    assert index.count() == 48
    query = (album / "b" / "09.jpg").read_bytes()
    found = {hit.path for hit in index.search(query, count=4)}
    assert found == {f"{place}/b/09.jpg" for place in [album, *archives]}
    assert index.count("folder two.tar/b") == 6
    assert index.add([album, *archives]).unchanged == 48


KILL = """
import os, signal
from xlir.search import photo_rows
from xlir.search.stores.lance import LanceStore
photo_rows.SECONDS_AT_ONCE = 0.0
add = LanceStore.add
def add_and_die(self, rows):
    add(self, rows)
    if self.count() >= 32:
        os.kill(os.getpid(), signal.SIGKILL)
LanceStore.add = add_and_die
"""


def test_a_killed_run_is_resumed(command, folder, photos):
    killed = command("index", f"--to={folder}", str(photos / "images"), script=KILL, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = paths_of(xlir.Index.open(folder))
    assert 32 <= len(before) < 60
    resumed = run_main("index", f"--to={folder}", str(photos / "images"))
    assert (
        f"60 photos ({60 - len(before)} new, 0 changed, {len(before)} unchanged" in resumed.stdout
    )
    assert paths_of(xlir.Index.open(folder)) == files_of(photos / "images")


KILL_AT_ANY_MOMENT = """
import os, random, signal, threading
from xlir import embed
from xlir.search import photo_rows
from xlir.search.stores.lance import LanceStore
embed.IMAGE_BATCH = photo_rows.ROWS_AT_ONCE = 4
file = open({file!r}, "w")
moment = random.Random({round}).uniform(0, 1)
killer = threading.Timer(moment, os.kill, (os.getpid(), signal.SIGKILL))
def acknowledged(store):
    def stored(self, rows):
        store(self, rows)
        file.writelines(path + "\\n" for path in rows["path"].to_pylist())
        file.flush()
        if not killer.ident:
            killer.start()
    return stored
LanceStore.add = acknowledged(LanceStore.add)
LanceStore.replace = acknowledged(LanceStore.replace)
"""


@pytest.mark.slow
def test_ten_kills_at_any_moment_lose_nothing(command, index, folder, photos, tmp_path):
    """Photos change between rounds. After each, every acknowledged photo is stored once."""
    images = shutil.copytree(photos / "images", tmp_path / "images")
    kills = 0
    for number in range(10):
        file = tmp_path / f"{number}.txt"
        script = KILL_AT_ANY_MOMENT.format(file=str(file), round=number)
        for image in sorted(images.glob("*.jpg"))[number % 2 :: 2]:
            os.utime(image, ns=(0, number * 10**12))
        ended = command("index", f"--to={folder}", str(images), script=script, check=False)
        kills += ended.returncode == -signal.SIGKILL
        assert ended.returncode in (0, -signal.SIGKILL), ended.stderr
        index.refresh()
        stored = paths_of(index)
        assert len(set(stored)) == len(stored)
        known = photo_rows.known(index._store)
        for path in file.read_text().splitlines():
            assert known[collection.identifier(path)][1] == os.stat(path).st_mtime_ns
    assert kills >= 5
    assert index.add([images]).skipped == 0
    assert paths_of(index) == files_of(images)
    assert index.add([images]).unchanged == 60


def test_an_interrupted_creation_is_made_again(toy_run, tmp_path, monkeypatch):
    with monkeypatch.context() as context:
        # `fingerprint` is called after the encoder and the store are written.
        context.setattr(xlir.Encoder, "fingerprint", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            xlir.Index.create(tmp_path / "index", toy_run)
    assert (tmp_path / "index" / "encoder" / "config.json").is_file()
    with pytest.raises(FileNotFoundError, match="is not an index"):
        xlir.Index.open(tmp_path / "index")
    xlir.Index.create(tmp_path / "index", toy_run)
    assert xlir.Index.open(tmp_path / "index").count() == 0


@on_each_store
def test_an_index_needs_no_run(index, album, folder, monkeypatch):
    index.add([album])
    expected = index.search("rot", count=3)
    moved = folder.rename(folder.with_name("moved"))
    monkeypatch.setenv("XLIR_CACHE", str(folder.with_name("no-cache")))
    assert xlir.Index.open(moved).search("rot", count=3) == expected


def test_another_model_is_refused(folder, workdir, toy_run):
    with pytest.raises(ValueError, match="another model than that of"):
        xlir.Index.open(folder, workdir)
    xlir.Index.open(folder, toy_run)


def test_only_one_process_changes_an_index(index, album, folder):
    with search_index._locked(folder), pytest.raises(ValueError, match="wait until it has ended"):
        index.add([album])


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"version": 1}', '{"version": 99, "dim": 4, "model": ""}']
)
def test_a_damaged_description(folder, content):
    (folder / "index.json").write_text(content)
    with pytest.raises(ValueError, match=r"make the index again"):
        xlir.Index.open(folder)


def test_a_folder_of_something_else_is_left_alone(album, toy_run):
    with pytest.raises(ValueError, match="not empty and not an index"):
        xlir.Index.create(album, toy_run)


@on_each_store
def test_embeddings_from_elsewhere(index, album, encoder, tmp_path):
    files = files_of(album)
    np.save(tmp_path / "e.npy", 3 * encoder.encode_image(files).astype(np.float16))
    (tmp_path / "paths.txt").write_text("\n".join(files) + "\n")
    added = index.add_embeddings(tmp_path / "e.npy", tmp_path / "paths.txt")
    assert (added.new, added.changed) == (12, 0)
    hits = index.search(pathlib.Path(files[4]).read_bytes(), count=12)
    assert {hit.path: hit.cosine for hit in hits}[files[4]] == pytest.approx(1, abs=1e-3)
    assert index.add_embeddings(tmp_path / "e.npy", tmp_path / "paths.txt").changed == 12
    # Adding the photos later fills in their sizes and so on.
    assert index.add([album]).changed == 12
    assert index.search("rot", count=1)[0].width == 64
    (tmp_path / "paths.txt").write_text("\n".join(files[1:]))
    with pytest.raises(ValueError, match=r"should be \[11, "):
        index.add_embeddings(tmp_path / "e.npy", tmp_path / "paths.txt")
    np.save(tmp_path / "e.npy", np.zeros((11, index._dim)))
    with pytest.raises(ValueError, match="zero or not finite"):
        index.add_embeddings(tmp_path / "e.npy", tmp_path / "paths.txt")


def test_the_command_line(toy_run, album, tmp_path):
    to, sheet = tmp_path / "new", tmp_path / "sheet.png"
    made = run_main("index", f"--workdir={toy_run}", f"--to={to}", str(album), "--exclude=*/00.jpg")
    assert "11 photos (11 new" in made.stdout
    found = run_main(
        *(
            "search",
            f"--index={to}",
            "rot",
            "train",
            "--top_k=3",
            f"--sheet={sheet}",
            "--not=blau",
            "--cutoff=0",
        )
    )
    rows = found.stdout.splitlines()
    assert (rows[0], rows[4]) == ("rot", "train")
    assert len(rows) == 8
    assert rows[1].endswith(".jpg")
    with Image.open(sheet) as image:
        assert image.width > 300
    found = run_main(
        "search", f"--index={to}", "--output=-", "--where=folder b", "--cutoff=0", "أحمر"
    )
    (line,) = map(json.loads, found.stdout.splitlines())
    assert line["query"] == "أحمر"
    assert sorted(hit["path"] for hit in line["hits"]) == files_of(album / "b")
    nothing = run_main("search", f"--index={to}", "--where=folder c", f"--image={album}/a/01.jpg")
    assert "nothing fits" in nothing.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["index", "--to={to}", "x"], 2, "a new index needs --workdir"),
        (["index", "--to={to}", "--workdir={run}"], 2, "index needs photos"),
        (["index", "--to={index}", "nothing"], 1, "there is no file or folder nothing"),
        (["index", "--to={index}", "--from=a.npy", "a", "b"], 2, "give one text file"),
        (["index", "--to={index}", "--from=a.npy", "a", "--engine=ray"], 2, "give one text file"),
        (["index", "--to={index}", "--store=milvus://h:1/a", "a"], 2, "has another store"),
        (["index", "--to={to}", "--workdir={run}", "--store=h", "a"], 1, "milvus://HOST:PORT"),
        (["search", "--index={to}", "x"], 1, "is not an index"),
        (["search", "--index={index}"], 2, "search needs a query, or --image"),
        (["search", "--index={index}", " "], 2, "a query is empty"),
        (["search", "--index={index}", "x", "--cutoff=2"], 2, "not between 0 and 1"),
        (["search", "--index={index}", "x", "--where=taken x"], 1, "taken takes dates"),
        (["search", "--index={index}", "--image=nothing.jpg"], 1, "nothing.jpg"),
        (["search", "--index={index}", "x", "--sheet=x.txt"], 2, "should end in"),
    ],
)
def test_bad_input_is_one_line(arguments, code, message, folder, toy_run, tmp_path):
    places = {"to": tmp_path / "new", "run": toy_run, "index": folder}
    failed = run_main(*(argument.format(**places) for argument in arguments), check=False)
    assert failed.returncode == code
    assert message in failed.stderr
    assert len(failed.stderr.splitlines()) == 1


def test_a_full_disk_loses_nothing(command, folder, photos, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    used = sum(-(-file.stat().st_size // 4096) for file in folder.rglob("*") if file.is_file())
    size = (used + 30) * 4096
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(disk)]
    if os.getuid() or os.spawnvp(os.P_WAIT, "mount", mount):
        pytest.skip("needs the right to mount a small disk")
    try:
        shutil.copytree(folder, disk / "index")
        small = "from xlir.search import photo_rows; photo_rows.ROWS_AT_ONCE = 8"
        arguments = ["index", f"--to={disk / 'index'}", str(photos / "images")]
        failed = command(*arguments, script=small, check=False)
        assert failed.returncode == 1, failed.stdout
        assert "the disk is full" in failed.stderr.splitlines()[-1]
        stored = paths_of(xlir.Index.open(disk / "index"))
        assert len(stored) == len(set(stored))
        os.spawnvp(os.P_WAIT, "mount", ["mount", "-o", f"remount,size={4 * size}", str(disk)])
        assert "60 photos" in command(*arguments).stdout
        assert paths_of(xlir.Index.open(disk / "index")) == files_of(photos / "images")
    finally:
        os.spawnvp(os.P_WAIT, "umount", ["umount", "-l", str(disk)])
