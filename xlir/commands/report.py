"""Write a report of a run as one HTML file, which opens offline.

It shows what was trained on what, curves, recall by language, examples, hubs and more. Every run
writes such a report at its end. This command writes it again, for other test sets, or compared with
another run.

Examples:
  python -m xlir.main report --workdir=runs/flickr8k
  python -m xlir.main report --workdir=runs/flickr8k --against=runs/flickr8k-e5 --to=report.html
"""

import pathlib

from absl.flags import FlagValues

from xlir.commands import processes
from xlir.commands.flags import Flags


def define(flags: Flags) -> None:
    """Declares the flags."""
    flags.workdir()
    flags.string("against", "Folder of another run to compare with, on the same test sets.")
    flags.string("to", "The HTML file. Default: report.html in the run's folder.")
    flags.test_set(several=True)


def run(values: FlagValues) -> None:
    """Writes the report."""
    processes.start_jax(values)
    from input_pipeline import files
    from xlir import data, evaluate
    from xlir.report import retrieval, writer
    from xlir.workdir import read_config

    workdir = pathlib.Path(values.workdir)
    read_config(workdir)  # says so if this is not the folder of a run
    file = pathlib.Path(values.to) if values.to else workdir / writer.REPORT_FILE
    files.check_writable(file)
    folders = [workdir, *([pathlib.Path(values.against)] if values.against else [])]
    runs = [_opened(folder, values.test_set, values.images) for folder in folders]
    if values.against:
        # Before the embeddings, which take time.
        retrieval.check_comparable(*(test_sets for _, test_sets in runs))
    found = [
        writer.Run(
            folder,
            encoder.config,
            encoder.step,
            [evaluate.embedded(encoder, one, data.feature_cache()) for one in test_sets],
        )
        for folder, (encoder, test_sets) in zip(folders, runs, strict=True)
    ]
    writer.write(found[0], file, *found[1:])
    print(f"written: {file}")


def _opened(workdir: pathlib.Path, test_set: str, images: str):
    """The encoder of a run, and its test sets or others."""
    from input_pipeline.test_sets.retrieval_set import RETRIEVAL
    from xlir import data, partition
    from xlir.encoder import Encoder
    from xlir.workdir import read_config

    config = read_config(workdir)
    encoder = Encoder.load(workdir, mesh=partition.fitting_mesh(config.mesh))
    if test_set or images:
        return encoder, data.test_sets(config, test_set, images)
    return encoder, data.own_test_sets(config, RETRIEVAL)
