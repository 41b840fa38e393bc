"""Converts SigLIP's tokenizer, which `transformers` has only in Python, to a tokenizer.json.

It is a SentencePiece model (Unigram) with EOS after every text. Before that, texts lose their case,
ASCII punctuation and repeated spaces (Zhai et al. 2023). The ids are those of `transformers`,
unless a text holds a literal "</s>" or "<unk>".
"""

import re
import string
from typing import Any

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

SPACE = "\u2581"  # SentencePiece's
# The conversion is refused if these texts are split differently.
PROBES = ("", "  a Cat,\t  sits-on it's MAT... ", "Ein Hund läuft; 狗?", "ﬁ Ａ½", "(  )", "x" * 70)


def converted(original: Any) -> tokenizers.Tokenizer:
    """The tokenizer that gives the same ids as the `SiglipTokenizer` `original`.

    Raises:
      ValueError: the conversion gives other ids.
    """
    from sentencepiece import sentencepiece_model_pb2  # not at the top: it needs protobuf

    model = sentencepiece_model_pb2.ModelProto()
    with open(original.vocab_file, "rb") as file:
        model.ParseFromString(file.read())
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=model.trainer_spec.unk_id))
    steps = [normalizers.Lowercase()] if original.do_lower_case else []
    punctuation = f"[{re.escape(string.punctuation)}]"
    steps += [
        normalizers.Replace(SPACE, " "),
        normalizers.Replace(tokenizers.Regex(punctuation), ""),
        normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
        normalizers.Strip(),
    ]
    if charsmap := model.normalizer_spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(charsmap))
    steps.append(normalizers.Replace(tokenizers.Regex(" {2,}"), " "))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = dict.fromkeys((original.pad_token, original.eos_token, original.unk_token))
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(token, lstrip=True, rstrip=True) for token in special if token]
    )
    eos = (original.eos_token, original.eos_token_id)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {eos[0]}", special_tokens=[eos]
    )
    for text in PROBES:
        if (ours := tokenizer.encode(text).ids) != (theirs := original(text)["input_ids"]):
            raise ValueError(
                f"its SentencePiece model can't be converted: {text!r} would become {ours} "
                f"instead of {theirs}"
            )
    return tokenizer
