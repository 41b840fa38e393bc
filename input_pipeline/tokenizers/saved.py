"""Names of the files of a saved tokenizer."""

# JSON with the tokenizer's kind and its prefix.
DESCRIPTION_FILE = "tokenization.json"
# The model of a SentencePiece tokenizer.
MODEL_FILE = "sentencepiece.model"
# The content of a Hugging Face tokenizer.
TOKENIZER_FILE = "tokenizer.json"
# The dictionary of a SentencePiece tokenizer whose ids are not those of the model.
DICTIONARY_FILE = "dictionary.json"
