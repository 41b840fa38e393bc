"""Tokens of languages, which translation models put before texts (M2M-100 and NLLB-200)."""

from collections.abc import Sequence
from typing import Any

# ISO 639-1 code -> NLLB's token, for languages of captions in multilingual test sets. NLLB has
# tokens of scripts and dialects; these are the standard languages in their usual scripts.
NLLB = {
    "ar": "arb_Arab",
    "bg": "bul_Cyrl",
    "bn": "ben_Beng",
    "cs": "ces_Latn",
    "da": "dan_Latn",
    "de": "deu_Latn",
    "el": "ell_Grek",
    "en": "eng_Latn",
    "es": "spa_Latn",
    "et": "est_Latn",
    "fa": "pes_Arab",
    "fi": "fin_Latn",
    "fil": "tgl_Latn",
    "fr": "fra_Latn",
    "ha": "hau_Latn",
    "he": "heb_Hebr",
    "hi": "hin_Deva",
    "hr": "hrv_Latn",
    "hu": "hun_Latn",
    "id": "ind_Latn",
    "it": "ita_Latn",
    "ja": "jpn_Jpan",
    "ko": "kor_Hang",
    "lt": "lit_Latn",
    "lv": "lvs_Latn",
    "mi": "mri_Latn",
    "nl": "nld_Latn",
    "no": "nob_Latn",
    "pl": "pol_Latn",
    "pt": "por_Latn",
    "ro": "ron_Latn",
    "ru": "rus_Cyrl",
    "sk": "slk_Latn",
    "sl": "slv_Latn",
    "sr": "srp_Cyrl",
    "sv": "swe_Latn",
    "sw": "swh_Latn",
    "ta": "tam_Taml",
    "te": "tel_Telu",
    "th": "tha_Thai",
    "tr": "tur_Latn",
    "uk": "ukr_Cyrl",
    "ur": "urd_Arab",
    "vi": "vie_Latn",
    "zh": "zho_Hans",
}
# The same for M2M-100's tokens, where they do not hold the same code, as "__de__" does.
M2M_100 = {"fil": "__tl__"}


def marked(texts: Sequence[str], language: str, tokenizer: Any) -> list[str]:
    """Texts with the token of their language in front, if the tokenizer has one for it.

    Args:
      texts: any texts.
      language: an ISO 639-1 code such as "de", or NLLB's own code such as "deu_Latn".
      tokenizer: any tokenizer; most have no tokens of languages, and leave the texts as they are.
    """
    known = getattr(tokenizer, "languages", ())
    codes = (table.get(language, "") for table in (NLLB, M2M_100))
    candidates = (language, f"__{language}__", *codes)
    token = next((token for token in candidates if token in known), "")
    return [token + text for text in texts]
