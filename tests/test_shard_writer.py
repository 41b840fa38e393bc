"""Shards from tar archives and Parquet files: what is kept, what is left out, and interruptions."""

import concurrent.futures
import io
import json
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from input_pipeline import kept_out, shard_writer, shards
from input_pipeline.shards import Shards
from input_pipeline.test_sets import xtd10
from tests.runs import run_main


def jpeg(number: int, size=(96, 80), quality=90) -> bytes:
    """A photo of smooth random shapes."""
    noise = np.random.default_rng(number).integers(0, 256, (6, 7, 3), np.uint8)
    image = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def write_tar(file, samples):
    """img2dataset's layout; a sample is a photo's bytes and the fields of its JSON."""
    with tarfile.open(file, "w") as archive:
        for number, (photo, fields) in enumerate(samples):
            fields = {"key": f"{number:09d}", "status": "success", **fields}
            members = {"jpg": photo, "txt": (fields.get("caption") or "").encode()}
            members["json"] = json.dumps(fields).encode()
            for kind, content in members.items():
                if content is not None:
                    info = tarfile.TarInfo(f"{number:09d}.{kind}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    return file


def named(number, **fields):
    return jpeg(number), {"caption": f"photo {number}", "url": f"http://a.b/{number}.jpg", **fields}


@pytest.fixture(autouse=True)
def _in_threads(monkeypatch):
    """Processes take seconds to start."""
    monkeypatch.setattr(shard_writer, "_pool", concurrent.futures.ThreadPoolExecutor)


def prepare(sources, folder, processes=1, **options):
    options = shard_writer.Options(**{"kept_out": kept_out.KeptOut(), **options})
    found = shard_writer.prepare(sources, folder, options, processes)
    opened = Shards(folder)
    assert (found["photos"], found["captions"]) == (len(opened), opened.captions)
    return found["dropped"], [opened[row] for row in range(len(opened))]


def test_tars_of_img2dataset(tmp_path):
    number = next(iter(xtd10.origins()))
    samples = [
        named(0, language="de"),
        (jpeg(1), {"captions": ["one ", "two\n lines", ""], "url": "http://a.b/c%20d.jpg?w=3"}),
        (jpeg(2), {"caption": " \n"}),
        (None, {"caption": "no photo"}),
        (jpeg(3)[:500], {"caption": "cut off"}),
        (jpeg(4, size=(96, 63)), {"caption": "small"}),
        (jpeg(0), {"caption": "again"}),
        (b"no photo", {"caption": "junk"}),
        (jpeg(5), {"caption": "a COCO photo", "url": f"x/COCO_val2014_{number:012d}.jpg"}),
    ]
    tar = write_tar(tmp_path / "00000.tar", samples)
    dropped, records = prepare([tar], tmp_path / "to")
    assert [record.captions for record in records] == [["photo 0"], ["one", "two lines"]]
    assert [record.languages for record in records] == [["de"], ["", ""]]
    assert [record.name for record in records] == ["0.jpg", "c d.jpg"]
    assert [record.image for record in records] == [jpeg(0), jpeg(1)]
    assert dropped == {
        "without a photo": 1,
        "without a caption": 1,
        "can't be decoded": 2,
        "too small": 1,
        "the same photo as another": 1,
        "photos of test sets, by name": 1,
    }
    assert len(records) == 2


def test_parquet_of_img2dataset_and_of_hugging_face(tmp_path):
    table = {"jpg": [jpeg(0), None, jpeg(2)], "caption": ["zero", "one", "two"]}
    table |= {"url": ["http://a.b/0.jpg"] * 3, "language": ["en", "en", "fr"]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    images = [{"bytes": jpeg(3), "path": "3.jpg"}, {"bytes": jpeg(4), "path": None}]
    table = {"image": images, "text": [["three", "drei"], ["four"]], "language": ["en", "en"]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "b.parquet")
    sources = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    dropped, records = prepare(sources, tmp_path / "to", languages=("en",))
    assert [record.captions for record in records] == [["zero"], ["three", "drei"], ["four"]]
    assert [record.name for record in records] == ["0.jpg", "3.jpg", ""]
    assert dropped == {"without a photo": 1, "captions in other languages": 1}
    pyarrow.parquet.write_table(pyarrow.table({"url": ["x"]}), tmp_path / "c.parquet")
    with pytest.raises(ValueError, match="no pair is left"):
        prepare([tmp_path / "c.parquet"], tmp_path / "none")


def test_photos_of_test_sets_are_left_out_in_three_ways(tmp_path):
    copy = Image.open(io.BytesIO(jpeg(2))).resize((200, 150)).convert("L")
    buffer = io.BytesIO()
    copy.save(buffer, "JPEG", quality=50)
    samples = [named(0), named(1), (buffer.getvalue(), {"caption": "a near copy"}), named(3)]
    (tmp_path / "renamed.jpg").write_bytes(jpeg(1))
    known = kept_out.identify(["0.jpg"], [tmp_path / "renamed.jpg", jpeg(2)])
    tar = write_tar(tmp_path / "00000.tar", samples)
    dropped, records = prepare([tar], tmp_path / "to", kept_out=known, test_sets=("abc",))
    assert [record.name for record in records] == ["3.jpg"]
    assert dropped == {
        "photos of test sets, by name": 1,
        "photos of test sets, by content": 1,
        "near copies of photos of test sets": 1,
    }
    assert Shards(tmp_path / "to").facts == {"dropped": dropped, "kept_out": ["abc"]}


def many(tmp_path, count=4):
    """Tars of five photos; the last one of each is the first one of the next."""
    return [
        write_tar(tmp_path / f"{n:05d}.tar", [named(4 * n + i) for i in range(5)])
        for n in range(count)
    ]


def test_a_photo_is_kept_once_whatever_the_number_of_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD", 2)
    for processes in (1, 3):
        folder = tmp_path / str(processes)
        dropped, records = prepare(many(tmp_path), folder, processes)
        assert sorted(int(record.name[:-4]) for record in records) == list(range(17))
        assert dropped == {"the same photo as another": 3}


def test_an_interrupted_preparation_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD", 2)
    tars, folder = many(tmp_path), tmp_path / "to"
    write, left = shards.write, [5]

    def die(file, records):
        left[0] -= 1
        if not left[0]:
            file.with_name(f"{file.name}.partial").write_bytes(b"half")
            raise KeyboardInterrupt
        return write(file, records)

    monkeypatch.setattr(shards, "write", die)
    with pytest.raises(KeyboardInterrupt):
        prepare(tars, folder)
    with pytest.raises(FileNotFoundError, match="not a complete folder"):
        Shards(folder)
    finished = {file.name: file.stat().st_mtime_ns for file in folder.glob("*-0000?.json")}
    assert 0 < len(finished) < 4
    monkeypatch.setattr(shards, "write", write)
    dropped, records = prepare(tars, folder)
    assert sorted(int(record.name[:-4]) for record in records) == list(range(17))
    assert dropped == {"the same photo as another": 3}
    assert not list(folder.glob("*.partial"))
    assert all((folder / name).stat().st_mtime_ns == time for name, time in finished.items())
    # Prepared once more, nothing is written again; with other options, everything is.
    before = {file: file.stat().st_mtime_ns for file in folder.glob("*.array_record")}
    assert prepare(tars, folder)[0] == dropped
    assert all(file.stat().st_mtime_ns == time for file, time in before.items())
    assert len(prepare([*tars, *many(tmp_path, 5)[4:]], folder)[1]) == 21
    with pytest.raises(ValueError, match='no pair is left: "too small": 25'):
        prepare([*tars, tmp_path / "00004.tar"], folder, min_side=1000)
    with pytest.raises(ValueError, match=r"from 1 files that are not named now, such as .*-00004"):
        prepare(tars, folder)


def test_damaged_sources_give_the_pairs_before_the_damage(tmp_path, caplog):
    tars = many(tmp_path, 2)
    tars[1].write_bytes(tars[1].read_bytes()[:-13_000])
    junk = tmp_path / "junk.tar"
    junk.write_bytes(b"no tar" * 100)
    records = prepare([*tars, junk], tmp_path / "to")[1]
    assert 5 < len(records) < 9
    assert "00001.tar is damaged: " in caplog.text
    assert "junk.tar is damaged: " in caplog.text


def test_a_store_that_fails_is_read_again_and_ends_in_one_line(tmp_path, monkeypatch):
    (tar,), waited, read = many(tmp_path, 1), [], shard_writer.pairs.read

    def fail(source):
        yield next(read(source))
        if len(waited) < fails:
            raise TimeoutError(110, "Connection timed out")
        yield from list(read(source))[1:]

    monkeypatch.setattr(shard_writer.pairs, "read", fail)
    monkeypatch.setattr(shard_writer.time, "sleep", waited.append)
    fails = 2
    assert len(prepare([tar], tmp_path / "to")[1]) == 5
    assert waited == [2, 8]
    waited.clear()
    fails = 9
    with pytest.raises(OSError, match=r"00000\.tar .*Connection timed out"):
        prepare([tar], tmp_path / "other")
    assert waited == [2, 8, 32]


def test_sources_must_be_known_files_with_names_of_their_own(tmp_path):
    with pytest.raises(ValueError, match="neither a tar archive nor a Parquet file"):
        prepare([tmp_path / "a.zip"], tmp_path / "to")
    with pytest.raises(ValueError, match=r"would both be named .+-a: rename one"):
        prepare([tmp_path / "a.tar", tmp_path / "a.parquet"], tmp_path / "to")


def test_the_command_line(tmp_path, photos):
    many(tmp_path, 2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.jpg").write_bytes(jpeg(3))
    flags = [f"--to={tmp_path / 'to'}", f"--keep_out={tmp_path / 'out'}", str(tmp_path / "*.tar")]
    config = "--config=configs/xlmr.py:tiny", f"--config.data.dir={photos}"
    evals = "--config.evals={'mine': {'captions': 'multilingual_test'}}"
    out = run_main("prepare", *config, evals, *flags).stdout.splitlines()
    assert out[0] == f"{tmp_path / 'to'}: 8 photos, 8 captions"
    assert [line.strip() for line in out[1:]] == [
        "1 left out: photos of test sets, by content",
        "1 left out: the same photo as another",
    ]
    assert len(Shards(tmp_path / "to").facts["kept_out"]) == 1
    for bad, message in (
        ([f"--to={tmp_path}"], "both --to=FOLDER and PAIRS"),
        ([], "needs --config, or --to=FOLDER and PAIRS"),
        ([*flags[:2], "none*.tar"], "there is no file none*.tar"),
    ):
        assert message in run_main("prepare", *bad, check=False).stderr
