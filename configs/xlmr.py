"""XLM-R and a ViT on COCO captions, evaluated on XTD10 in 11 languages.

    python -m xlir.main --config=configs/xlmr.py --config.data.dir=PATH

PATH holds COCO 2014's archives (or folders), Karpathy's dataset_coco.json, and xtd10/, a clone of
XTD10's repository; without them the command says what is missing and how to get it. Variants, as in
--config=configs/xlmr.py:lit:

  base    XLM-R base and ViT-B/16, both trained (the default)
  large   XLM-R large and CLIP's ViT-L/14, both trained
  lit     the image tower stays as it is (LiT, Zhai et al. 2022)
  frozen  both towers stay as they are, heads are trained on their cached features
  tiny    random weights and photos of 32 pixels: a run in seconds on a CPU, on any captioned set
"""

from configs import base

VARIANTS = ("base", "large", "lit", "frozen", "tiny")


def get_config(variant: str = "base"):
    """The configuration of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"configs/xlmr.py:{variant}: known variants are {', '.join(VARIANTS)}")
    config = base.get_config()
    config.data.name = "coco"
    # 113,287 photos, less XTD10's.
    config.data.train = "train+restval"
    config.evals.xtd10 = base.test_set("xtd10")
    config.evals.test = base.test_set("split")
    # A v5e-8 has 8 chips of 16 GB: 512 pairs a chip. More negatives help until about 16,000 (CLIP,
    # SigLIP); with 113,000 photos a larger batch would leave too few steps in an epoch.
    config.data.batch_size = 4096
    # Parameters, gradients and Adam's moments (5.8 GB of the base variant, 14 GB of the large one)
    # are split over all chips. On many, split over 8 or 16 of them and copy over the others:
    # --config.mesh.fsdp=8 --config.mesh.data=-1.
    config.mesh.data, config.mesh.fsdp = 1, -1
    # 27 steps are an epoch; 30 epochs let each of the five captions be seen six times.
    config.data.microbatches = 4
    config.steps = 820
    config.eval_every = 82
    # Captions have 10 words: the longest of COCO and of XTD10's translations are cut at 64 tokens.
    config.text.max_length = 64
    config.text.tower = "FacebookAI/xlm-roberta-base"
    config.image.tower = "google/vit-base-patch16-224-in21k"
    for tower in (config.text, config.image):
        tower.frozen = False
        # One layer of CLIP, no hidden layer: the towers are trained, the heads need no depth.
        tower.head = "linear"
        # Pretrained layers move slowly, the lowest the slowest.
        tower.learning_rate_factor = 0.05
        tower.layer_decay = 0.9
        # The activations of all layers of 512 pairs take more than a chip has.
        tower.remat = True
    config.image.min_area = 0.5
    config.optimizer.learning_rate = 1e-3
    # A tenth of the run: the heads are random, and pull at the towers.
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
    """The tower stays; an MLP head maps its features, which are cached, so no augmentation."""
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
