"""Towers on a CPU: xlir, PyTorch, ONNX Runtime and OpenVINO with the same weights, side by side.

    pip install -e '.[quickstart,export]' openvino
    python benchmarks/towers.py TOWER [--cores=N] [--rounds=N] [--texts=N] [--photos=N]

TOWER is muse, e5-small, efficientnet-lite0, efficientnet-lite2 or vit-small; the transformers have
random weights. Measured are: one text of 12 tokens or one photo, many of them, and a training step
(64 texts of 32 tokens or 16 photos: forward, backward and AdamW, without dropout). Engines take
token ids and decoded pixels, because tokenizing and decoding are the same for all of them. Other
engines than xlir get no more padding than a batch needs. They take turns within a round; ratios are
medians over the rounds. Where other programs run too, take one core and compare the seconds of the
processor: with several cores, they include those of threads that only wait for each other.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import numpy as np
import onnxruntime
import openvino
import torch
import torch._inductor.config
from flax import nnx
from torch.nn import functional

from configs import base
from input_pipeline.preprocessing import Preprocessing
from xlir import partition, train_step
from xlir.encoder import Encoder
from xlir.export import architecture, graphs, plain
from xlir.export.pytorch import DualEncoder
from xlir.models import dual_encoder, registry, towers
from xlir.models.family import TowerSpec
from xlir.onnx_graphs import graph_inputs

LAYERS = {"hidden_size": 384, "num_hidden_layers": 12, "intermediate_size": 1536}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# Name -> side, and the config.json of a tower that comes from no package.
TOWERS = {
    "muse": ("text", None),
    "e5-small": (
        "text",
        LAYERS
        | NO_DROPOUT
        | {"model_type": "bert", "num_attention_heads": 12}
        | {"vocab_size": 250_037, "max_position_embeddings": 512},
    ),
    "efficientnet-lite0": ("image", None),
    "efficientnet-lite2": ("image", None),
    "vit-small": (
        "image",
        LAYERS
        | {"model_type": "vit", "num_attention_heads": 6}
        | {"image_size": 224, "patch_size": 16},
    ),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TRAINED = {"text": 64, "image": 16}
CALLS = 10  # of one text or photo, in a round
REST = 0.05  # seconds between engines, so that the threads of the one before are asleep


def encoder_of(name: str, dtype: str) -> Encoder:
    """An encoder with the tower on its side, a toy on the other one, and linear heads."""
    side, content = TOWERS[name]
    config = base.get_config()
    config.text.tower, config.image.tower = "toy-xlmr", "toy-vit"
    config.text.head = config.image.head = "linear"
    config.head_dtype = config[side].dtype = dtype
    config[side].frozen, config.text.remat = False, side == "text"
    if content is None:
        config[side].tower = name
    specs = {each: describe(config[each]) for each, describe in towers.DESCRIBE.items()}
    loaded = {each: towers.load(config[each], spec) for each, spec in specs.items()}
    if content is not None:
        pixels = Preprocessing(size=224, mean=(0.5,) * 3, std=(0.5,) * 3)
        family = registry.family_of(side, content)
        specs[side] = TowerSpec(family, content, preprocessing=pixels if side == "image" else None)
        loaded[side] = towers.create(specs[side], config[side], rngs=nnx.Rngs(0))
    model = dual_encoder.DualEncoder(config, loaded["text"], loaded["image"], rngs=nnx.Rngs(0))
    return Encoder.from_model(config, model, Ids(), specs)


class Ids:
    """Stands for a tokenizer: texts are token ids already."""

    kind = "ids"

    def __call__(self, ids: list[np.ndarray], max_length: int) -> list[np.ndarray]:
        return ids


def inputs_of(encoder: Encoder, side: str, count: int) -> list[np.ndarray]:
    """Token ids of texts as long as captions, the first one of 12 tokens; or pixels."""
    rng = np.random.default_rng(0)
    if side == "image":
        return list(rng.integers(0, 256, (count, *encoder.preprocessing.shape), np.uint8))
    lengths = np.concatenate([[12], 4 + rng.poisson(11.5, count - 1)])
    return [rng.integers(5, 100_000, length, np.int32) for length in lengths]


class Others:
    """The same model in other libraries."""

    def __init__(self, encoder: Encoder, side: str, folder: pathlib.Path):
        self.encoder, self.side, self.folder = encoder, side, folder
        self.config = json.loads(json.dumps(architecture.describe(encoder)))
        with torch.device("meta"):
            state = DualEncoder(self.config).state_dict()
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        self.weights = architecture.torch_weights(encoder, shapes)

    def module(self) -> torch.nn.Module:
        """This side in PyTorch."""
        model = DualEncoder(self.config)
        model.load_state_dict({name: torch.tensor(x) for name, x in self.weights.items()})
        side = {"text": graphs.TextSide, "image": graphs.ImageSide}[self.side](model, self.side)
        # Convolutions are faster with channels last.
        return side.to(memory_format=torch.channels_last)

    def engines(self) -> dict[str, Callable[[list], np.ndarray]]:
        """By name: inputs -> embeddings."""
        runs = {}
        for name, dtype in DTYPES.items():
            module = self.module().to(dtype).eval()
            runs[f"PyTorch, {name}"] = _in_torch(module)
            compiled = torch.compile(module, dynamic=self.side == "text")
            runs[f"torch.compile, {name}"] = _in_torch(compiled)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        graphs.write(self.config, self.weights, self.folder, plain.OPSET)
        file = self.folder / f"{self.side}.onnx"
        session = onnxruntime.InferenceSession(file, options)
        runs["ONNX Runtime, float32"] = lambda batch: session.run(["embeddings"], batch)[0]
        for name, hint in (("float32", "f32"), ("bfloat16", "bf16")):
            runs[f"OpenVINO, {name}"] = _in_openvino(file, hint)
        return {name: self._whole(run) for name, run in runs.items()}

    def _whole(self, run: Callable) -> Callable[[list], np.ndarray]:
        def embed(inputs: list) -> np.ndarray:
            embedder = self.encoder.embedder
            out = np.empty((len(inputs), embedder.config.embedding_dim), np.float32)
            for rows, batch in embedder.batches(self.side, inputs):
                out[rows] = run(graph_inputs(self.side, batch, len(rows)))
            return out

        return embed

    def steps(self, batch: dict, features: np.ndarray) -> dict[str, Iterator[float]]:
        """By name: the losses of training steps, as `train_step` has them."""
        tensors = {name: torch.from_numpy(x) for name, x in batch.items()}
        runs = {}
        for name in DTYPES:
            for kind, wrap in (("PyTorch", lambda x: x), ("torch.compile", torch.compile)):
                module = wrap(self.module().train())
                runs[f"{kind}, {name}"] = _torch_steps(
                    module, tensors, torch.from_numpy(features), name == "bfloat16"
                )
        return runs


def _in_torch(module: torch.nn.Module) -> Callable[[dict], np.ndarray]:
    def run(batch: dict) -> np.ndarray:
        with torch.inference_mode():
            tensors = {name: torch.from_numpy(x) for name, x in batch.items()}
            return module(**tensors)[0].float().numpy()

    return run


def _in_openvino(file: pathlib.Path, hint: str) -> Callable[[dict], np.ndarray]:
    options = {
        "INFERENCE_PRECISION_HINT": hint,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    model = openvino.Core().compile_model(str(file), "CPU", options)
    return lambda batch: model(batch)["embeddings"]


def _torch_steps(
    module: torch.nn.Module, batch: dict, features: torch.Tensor, autocast: bool
) -> Iterator[float]:
    head = torch.nn.Linear(features.shape[1], base.get_config().embedding_dim, bias=False)
    log_scale = torch.nn.Parameter(torch.tensor(1 / 0.07).log())
    parameters = [*module.parameters(), *head.parameters(), log_scale]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.98), fused=True)
    own = torch.arange(len(features))
    while True:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            trained, other = module(**batch)[0], functional.normalize(head(features), dim=-1)
        logits = log_scale.exp() * trained.float() @ other.float().T
        loss = functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)
        adamw.zero_grad()
        (loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adamw.step()
        yield float(loss) / 2


def xlir_steps(encoder: Encoder, batch: dict, mesh: jax.sharding.Mesh) -> Iterator[float]:
    """The losses of xlir's training steps."""
    params, frozen = encoder.parameters
    layout, step = train_step.compile_step(encoder.config, encoder.embedder.graph, params, mesh)
    state = train_step.first_state(encoder.config, params, layout)
    while True:
        with jax.set_mesh(mesh):
            state, metrics = step(state, frozen, partition.global_batch(batch, mesh))
            yield float(metrics["loss"])


def training_batch(encoder: Encoder, side: str) -> dict[str, np.ndarray]:
    """The batch of a training step, with features of the other side."""
    count, rng = TRAINED[side], np.random.default_rng(0)
    other = "image" if side == "text" else "text"
    features = rng.normal(size=(count, encoder.feature_dims[other])).astype(np.float32)
    batch = {f"{other}_features": features, "image_id": np.arange(count, dtype=np.int32)}
    if side == "image":
        return batch | {"image": np.stack(inputs_of(encoder, side, count))}
    ids = rng.integers(5, 100_000, (count, 32)).astype(np.int32)
    return batch | {"text_ids": ids, "text_mask": np.ones_like(ids, bool)}


def seconds(run: Callable[[], object], calls: int = 1) -> tuple[float, float]:
    """Median seconds of a call, by the clock and of the processor."""
    time.sleep(REST)
    clock, processor = [], []
    for _ in range(calls):
        start = time.perf_counter(), time.process_time()
        run()
        clock.append(time.perf_counter() - start[0])
        processor.append(time.process_time() - start[1])
    return statistics.median(clock), statistics.median(processor)


def compare(title: str, runs: dict[str, Callable], rounds: int, calls: int, scale: float) -> None:
    """Prints a table of medians; `scale` / seconds is the number of items a second."""
    for run in runs.values():
        run()  # compiles
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run, calls))
    print(
        f"{title}: ms by the clock, of the processor, both in xlir's best, and a processor's rate"
    )
    own = [times[name] for name in times if name.startswith("xlir")]
    ours = np.min(own, axis=0) if own else np.full((rounds, 2), np.nan)
    for name, values in times.items():
        clock, processor = np.median(values, axis=0)
        ratios = np.median(np.array(values) / ours, axis=0)
        print(
            f"  {name:<26}{1000 * clock:10.2f}{1000 * processor:10.2f}"
            f"{ratios[0]:8.2f}{ratios[1]:8.2f}{scale / processor:10.1f} a second",
            flush=True,
        )


def serve(name: str, flags: argparse.Namespace, others: Others, ours: dict[str, Encoder]) -> None:
    """Latency and throughput."""
    side = TOWERS[name][0]
    many = inputs_of(others.encoder, side, flags.texts if side == "text" else flags.photos)
    engines = {
        f"xlir, {dtype}": lambda inputs, encoder=encoder: encoder.embedder.embed(
            encoder.parameters, side, inputs
        )
        for dtype, encoder in ours.items()
    } | others.engines()
    engines = {key: run for key, run in engines.items() if key.startswith(flags.engines)}
    expected = ours["float32"].embedder.embed(ours["float32"].parameters, side, many)
    for key, run in engines.items():
        worst = float((run(many) * expected).sum(1).min())
        print(f"  {key:<26}smallest cosine with xlir's float32: {worst:.6f}", flush=True)
        assert worst > 0.95, "the outputs differ"  # bfloat16 throughout is this coarse
    one = {key: lambda run=run: run(many[:1]) for key, run in engines.items()}
    compare(f"{name}, one {side}", one, flags.rounds, CALLS, 1)
    whole = {key: lambda run=run: run(many) for key, run in engines.items()}
    compare(f"{name}, {len(many)} {side}s", whole, flags.rounds, 1, len(many))


def train(name: str, flags: argparse.Namespace, others: Others, ours: dict[str, Encoder]) -> None:
    """A training step."""
    side = TOWERS[name][0]
    mesh, batch = partition.single_device_mesh(), training_batch(others.encoder, side)
    steps = {f"xlir, {dtype}": xlir_steps(encoder, batch, mesh) for dtype, encoder in ours.items()}
    other = next(x for key, x in batch.items() if key.endswith("features"))
    steps |= others.steps(graph_inputs(side, batch, TRAINED[side]), other)
    chosen = {key: run for key, run in steps.items() if key.startswith(flags.engines)}
    runs = {key: lambda run=run: next(run) for key, run in chosen.items()}
    compare(f"{name}, training step", runs, flags.rounds, 1, TRAINED[side])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tower", choices=TOWERS)
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--photos", type=int, default=64)
    parser.add_argument("--engines", type=lambda x: tuple(x.split(",")), default=("",))
    parser.add_argument("--only", choices=("serving", "training"))
    flags = parser.parse_args()
    os.sched_setaffinity(0, range(flags.cores))  # before JAX makes its threads
    torch.set_num_threads(flags.cores)
    torch._inductor.config.freezing = True  # weights are constants of the compiled program
    ours = {dtype: encoder_of(flags.tower, dtype) for dtype in DTYPES}
    with tempfile.TemporaryDirectory() as folder:
        others = Others(ours["float32"], TOWERS[flags.tower][0], pathlib.Path(folder))
        if flags.only != "training":
            serve(flags.tower, flags, others, ours)
        if flags.only != "serving":
            train(flags.tower, flags, others, ours)


if __name__ == "__main__":
    main()
