"""Near copies of photos, and photos that only look alike."""

import io
import itertools

import numpy as np
from PIL import Image

from benchmarks.near_copies import changed
from input_pipeline import kept_out, near_copies


def test_near_copies_are_found_and_other_photos_are_not(shared):
    """benchmarks/near_copies.py measures this on 8,238 photos."""
    paths = sorted((shared / "coco_mini").rglob("*.jpg"))[:60]
    hashes = np.array([kept_out.perceptual_hash(path.read_bytes()) for path in paths])
    for one, two in itertools.combinations(hashes, 2):
        assert not near_copies.is_near_copy(one, two[None])
    for path in paths[:12]:
        for what, data in changed(Image.open(path).convert("RGB")):
            found = near_copies.is_near_copy(kept_out.perceptual_hash(data), hashes)
            assert found or "cropped" in what, (path, what)


def test_the_hash_depends_only_on_the_grey_picture():
    pixels = np.random.default_rng(0).integers(0, 200, (64, 64, 1), np.uint8).repeat(3, axis=2)
    one = near_copies.perceptual_hash(pixels)
    assert (one.dtype, one.shape) == (np.uint64, (4,))
    np.testing.assert_array_equal(near_copies.perceptual_hash(pixels + 40), one)
    flipped = near_copies.perceptual_hash(pixels[:, ::-1])
    assert not near_copies.is_near_copy(flipped, one[None])
    assert not near_copies.is_near_copy(one, np.zeros((0, 4), np.uint64))


def test_photos_that_can_not_be_decoded_are_known_by_name_and_content(tmp_path, caplog):
    buffer = io.BytesIO()
    Image.new("RGB", (70, 70), "red").save(buffer, "PNG")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    (tmp_path / "b.jpg").write_bytes(b"no photo")
    known = kept_out.identify(["c.jpg"], [tmp_path / "a.png", tmp_path / "b.jpg", b"other"])
    assert known.names == {"a.png", "b.jpg", "c.jpg"}
    assert (len(known.digests), known.hashes.shape) == (3, (1, 4))
    assert "near copies of a test photo are not recognized" in caplog.text
    assert known.fingerprint() != kept_out.KeptOut().fingerprint()
