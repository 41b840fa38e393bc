"""Fine-tunes a SigLIP or SigLIP 2 model on COCO's English captions; evaluated on XTD10.

    hf download google/siglip2-base-patch16-224 --local-dir=PATH/siglip2
    python -m xlir.main import --text=PATH/siglip2 --workdir=runs/siglip2
    python -m xlir.main --config=configs/siglip2.py --config.init=runs/siglip2 \
        --config.data.dir=PATH

PATH holds COCO and XTD10 as for configs/xlmr.py. Both towers, the temperature and the bias start
from the imported run. Whether it fits TPUs is checked without weights, with the towers' names, as
in --config.init= --config.text.tower=google/siglip2-base-patch16-224 (and image.tower).
"""

from configs import xlmr


def get_config():
    """The configuration."""
    config = xlmr.get_config()
    config.init = "runs/siglip2"
    config.loss.name = "sigmoid"
    # SigLIP has no layers after its towers, whose outputs are the embeddings. Without `init`, the
    # embeddings' width is that of the base model: set embedding_dim for others.
    config.embedding_dim = 768
    for tower in (config.text, config.image):
        tower.tower, tower.head = "", "none"
        # Nothing starts from random values, so that all layers have the same, low learning rate.
        tower.learning_rate_factor = tower.layer_decay = 1.0
    config.optimizer.learning_rate = 1e-5
    config.optimizer.weight_decay = 0.01
    # Keep half of what the model knew before, such as languages without training captions.
    config.average = 0.5
    return config
