"""Names, families and scripts of languages: those of captions in multilingual test sets.

Names and scripts are those of CLDR 47 (https://cldr.unicode.org), families those of Glottolog 5
(https://glottolog.org). Indo-European languages, which are many, are told apart by their branch.
"""

from collections.abc import Iterable

OTHER = "Other languages"
# Code -> (name, family, script).
KNOWN = {
    "en": ("English", "Germanic", "Latin"),
    "de": ("German", "Germanic", "Latin"),
    "nl": ("Dutch", "Germanic", "Latin"),
    "da": ("Danish", "Germanic", "Latin"),
    "no": ("Norwegian", "Germanic", "Latin"),
    "sv": ("Swedish", "Germanic", "Latin"),
    "fr": ("French", "Romance", "Latin"),
    "es": ("Spanish", "Romance", "Latin"),
    "it": ("Italian", "Romance", "Latin"),
    "pt": ("Portuguese", "Romance", "Latin"),
    "ro": ("Romanian", "Romance", "Latin"),
    "cs": ("Czech", "Balto-Slavic", "Latin"),
    "hr": ("Croatian", "Balto-Slavic", "Latin"),
    "lt": ("Lithuanian", "Balto-Slavic", "Latin"),
    "lv": ("Latvian", "Balto-Slavic", "Latin"),
    "pl": ("Polish", "Balto-Slavic", "Latin"),
    "sk": ("Slovak", "Balto-Slavic", "Latin"),
    "sl": ("Slovenian", "Balto-Slavic", "Latin"),
    "bg": ("Bulgarian", "Balto-Slavic", "Cyrillic"),
    "ru": ("Russian", "Balto-Slavic", "Cyrillic"),
    "uk": ("Ukrainian", "Balto-Slavic", "Cyrillic"),
    "el": ("Greek", "Graeco-Phrygian", "Greek"),
    "bn": ("Bangla", "Indo-Iranian", "Bangla"),
    "hi": ("Hindi", "Indo-Iranian", "Devanagari"),
    "fa": ("Persian", "Indo-Iranian", "Arabic"),
    "ur": ("Urdu", "Indo-Iranian", "Arabic"),
    "et": ("Estonian", "Uralic", "Latin"),
    "fi": ("Finnish", "Uralic", "Latin"),
    "hu": ("Hungarian", "Uralic", "Latin"),
    "tr": ("Turkish", "Turkic", "Latin"),
    "ar": ("Arabic", "Afro-Asiatic", "Arabic"),
    "he": ("Hebrew", "Afro-Asiatic", "Hebrew"),
    "ha": ("Hausa", "Afro-Asiatic", "Latin"),
    "sw": ("Swahili", "Atlantic-Congo", "Latin"),
    "te": ("Telugu", "Dravidian", "Telugu"),
    "ta": ("Tamil", "Dravidian", "Tamil"),
    "zh": ("Chinese", "Sino-Tibetan", "Han"),
    "ja": ("Japanese", "Japonic", "Japanese"),
    "ko": ("Korean", "Koreanic", "Korean"),
    "th": ("Thai", "Tai-Kadai", "Thai"),
    "vi": ("Vietnamese", "Austroasiatic", "Latin"),
    "fil": ("Filipino", "Austronesian", "Latin"),
    "id": ("Indonesian", "Austronesian", "Latin"),
    "mi": ("Māori", "Austronesian", "Latin"),
    "quz": ("Cusco Quechua", "Quechuan", "Latin"),
}


def name(code: str) -> str:
    """A language's name and code; only the code of an unknown language."""
    return f"{KNOWN[code][0]} ({code})" if code in KNOWN else code


def group(code: str) -> str:
    """The family and the script of a language."""
    if code not in KNOWN:
        return OTHER
    _, family, script = KNOWN[code]
    return f"{family}, {script} script"


def grouped(codes: Iterable[str]) -> dict[str, list[str]]:
    """Group -> its languages, in the order of the table above; unknown languages are last."""
    order = {code: place for place, code in enumerate(KNOWN)}
    groups: dict[str, list[str]] = {}
    for code in sorted(codes, key=lambda code: (order.get(code, len(order)), code)):
        groups.setdefault(group(code), []).append(code)
    return groups


def ordered(codes: Iterable[str]) -> list[str]:
    """The languages in the order of `grouped`."""
    return [code for members in grouped(codes).values() for code in members]
