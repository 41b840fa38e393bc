"""A tokenizer of bytes, for towers without a vocabulary, such as those of tests."""

import tokenizers

from input_pipeline.tokenizers.huggingface import HuggingFaceTokenizer


def byte_tokenizer(prefix: str = "") -> HuggingFaceTokenizer:
    """A tokenizer that needs no files: each byte of UTF-8 is a token, as in ByT5 (Xue et al. 2022).

    The ids are <s> 0, <pad> 1, </s> 2, <unk> 3, then the 256 bytes.
    """
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: id for id, token in enumerate([*special, *alphabet])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.add_special_tokens(special)
    return HuggingFaceTokenizer(tokenizer.to_str(), prefix)
