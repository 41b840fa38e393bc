"""XLM-R and a ViT on COCO captions, evaluated on XTD10 in 11 languages.

    python -m xlir.main --config=configs/xlmr.py --config.data.dir=PATH

PATH holds COCO 2014's archives (or folders), Karpathy's dataset_coco.json, and xtd10/, a clone of
XTD10's repository. The command says which of them are missing and how to get them. Variants, as in
--config=configs/xlmr.py:lit:

  base    XLM-R base and ViT-B/16, both trained (the default)
  large   XLM-R large and CLIP's ViT-L/14, both trained
  lit     as base, with a frozen image tower (LiT, Zhai et al. 2022)
  frozen  both towers are frozen, and heads are trained on their cached features
  tiny    random weights and photos of 32 pixels: a run in seconds on a CPU, on any captioned set
"""

from configs import base

VARIANTS = ("base", "large", "lit", "frozen", "tiny")


def get_config(variant: str = "base"):
    """The configuration of a variant."""
    if variant not in VARIANTS:
        raise ValueError(
            f"configs/xlmr.py has no variant {variant!r}; known: {', '.join(VARIANTS)}"
        )
    config = base.get_config()
    config.data.name = "coco"
    # 113,287 photos, from which XTD10's photos are then removed.
    config.data.train = "train+restval"
    config.evals.xtd10 = base.test_set("xtd10")
    config.evals.test = base.test_set("split")
    # 512 pairs for each of the 8 chips (16 GB) of a v5e-8. Larger batches, up to about
    # 16,000, help (CLIP, SigLIP), but with 113,000 photos they would leave too few steps in an
    # epoch.
    config.data.batch_size = 4096
    # Shard parameters, gradients and Adam's moments (base: 5.8 GB, large: 14 GB) over all chips. On
    # many chips, shard over 8 or 16 and replicate over the rest: --config.mesh.fsdp=8
    # --config.mesh.data=-1.
    config.mesh.data, config.mesh.fsdp = 1, -1
    config.data.microbatches = 4
    # 30 epochs of 27 steps, in which each of a photo's five captions is seen six times.
    config.steps = 820
    config.eval_every = 82
    # Captions have 10 words on average: only the longest of COCO and XTD10 exceed 64 tokens.
    config.text.max_length = 64
    config.text.tower = "FacebookAI/xlm-roberta-base"
    config.image.tower = "google/vit-base-patch16-224-in21k"
    for tower in (config.text, config.image):
        tower.frozen = False
        # One linear layer, as in CLIP: heads of trained towers need no hidden layers.
        tower.head = "linear"
        # Low learning rates for pretrained layers, the lowest for the lowest layer.
        tower.learning_rate_factor = 0.05
        tower.layer_decay = 0.9
        # The activations of all layers for 512 pairs do not fit into a chip's memory.
        tower.remat = True
    config.image.min_area = 0.5
    config.optimizer.learning_rate = 1e-3
    # A tenth of the run: at first, gradients from the random heads would damage the towers.
    config.optimizer.warmup_steps = 80
    config.optimizer.weight_decay = 0.1
    if variant == "large":
        config.text.tower = "FacebookAI/xlm-roberta-large"
        config.image.tower = "openai/clip-vit-large-patch14"
        config.embedding_dim = 768
        config.data.microbatches = 8
    if variant in ("lit", "frozen"):
        _freeze(config.image)
    if variant == "frozen":
        _freeze(config.text)
        config.optimizer.warmup_steps = 40
    if variant == "tiny":
        _shrink(config)
    return config


def _freeze(tower):
    """Freezes a tower: an MLP head maps its cached features, so photos can't be augmented."""
    tower.frozen = True
    tower.head = "mlp"
    if "min_area" in tower:
        tower.min_area = 0.0


def _shrink(config):
    """Toy towers and a run of 20 steps."""
    config.data.name = "captions"
    config.data.train = "train"
    del config.evals.xtd10, config.evals.test
    config.data.batch_size = 16
    config.mesh.data, config.mesh.fsdp = -1, 1
    config.data.microbatches = 1
    config.steps, config.eval_every, config.log_every = 20, 10, 5
    config.embedding_dim = 16
    config.text.tower, config.image.tower = "toy-xlmr", "toy-vit"
    config.optimizer.warmup_steps = 2
    for tower in (config.text, config.image):
        tower.learning_rate_factor = 1.0
        tower.layer_decay = 1.0
