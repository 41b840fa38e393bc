"""Names of the files of a saved tokenizer."""

# Says which class reads the folder, and the tokenizer's prefix.
DESCRIPTION_FILE = "tokenization.json"
# Of a SentencePiece tokenizer, beside the description.
MODEL_FILE = "sentencepiece.model"
# Of a Hugging Face tokenizer, beside the description.
TOKENIZER_FILE = "tokenizer.json"
