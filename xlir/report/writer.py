"""Writes the report of a run."""

import base64
import dataclasses
import datetime
import hashlib
import logging
import pathlib
import string
from collections.abc import Iterator, Sequence

from ml_collections import ConfigDict

from input_pipeline import files
from xlir import evaluate_tagging, results
from xlir.evaluate import Embedded
from xlir.machine import version
from xlir.report import retrieval, tags, training
from xlir.report.examples import Examples
from xlir.report.geometry import Geometry
from xlir.report.markup import Markup, join, tag
from xlir.report.pictures import Pictures
from xlir.report.scores import Scored

log = logging.getLogger(__name__)

PAGE = pathlib.Path(__file__).parent / "page"
# The report's name in the folder of its run.
REPORT_FILE = "report.html"


@dataclasses.dataclass(frozen=True)
class Run:
    """A run and the embeddings of its test sets.

    Attributes:
      workdir: its folder.
      config: its configuration.
      step: the training step of the checkpoint that was evaluated.
      sets: its test sets; may be empty.
    """

    workdir: pathlib.Path
    config: ConfigDict
    step: int
    sets: Sequence[Embedded]

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.workdir.resolve().name


def write(run: Run, file: pathlib.Path, against: Run | None = None) -> None:
    """Writes the report of a run as one HTML file, which asks for no other file.

    Args:
      run: the run.
      file: where the report goes.
      against: another run to compare it with.

    Raises:
      ValueError: the two runs can't be compared, or an embedding is not finite.
      OSError: the file can't be written.
    """
    if against:
        retrieval.check_comparable(*([one.data for one in side.sets] for side in (run, against)))
    pictures = Pictures()
    sections = list(_sections(run, against, pictures))
    if pictures.left_out:
        log.warning("%d photos are left out of the report: it has no room", pictures.left_out)
    style = f"{_part('style.css')}\n{pictures.style()}"
    script = _part("page.js")
    links = [tag("li", tag("a", title, href=f"#s{i}")) for i, (title, _) in enumerate(sections)]
    bodies = [
        tag("section", tag("h2", title, id=f"s{i}"), body)
        for i, (title, body) in enumerate(sections)
    ]
    page = string.Template(_part("page.html")).substitute(
        style=style,
        script=script,
        style_digest=_digest(style),
        script_digest=_digest(script),
        name=join([run.name]),
        made=join([_made(run, against)]),
        links=join(links),
        sections=join(bodies),
    )
    files.write_whole(file, page)


def write_at_end(run: Run) -> None:
    """Writes the report of a run that has just finished, and prints where it is.

    A run that is finished must not fail. So if anything goes wrong, the log says so, and that is
    all.
    """
    file = run.workdir / REPORT_FILE
    try:
        write(run, file)
    except Exception as error:
        reason = str(error).splitlines() or [type(error).__name__]
        log.warning("the report is not written: %s", reason[0])
        return
    print(f"\nreport, to open in a browser: {file}")


def _sections(run: Run, against: Run | None, pictures: Pictures) -> Iterator[tuple[str, Markup]]:
    """The titles and the content of the sections."""
    records = training.records(run.workdir)
    others = {one.data.name: one for one in against.sets} if against else {}
    sets = [Scored.of(one) for one in run.sets]
    if sets:
        yield "In short", retrieval.key_numbers(sets)
    yield "Training", training.facts(run.workdir, run.config, run.step)
    if records:
        yield "Curves", training.curves(records)
    for one in sets:
        suffix = f" ({one.data.name})" if len(sets) > 1 else ""
        yield f"Recall by language{suffix}", retrieval.by_language(one)
        if other := others.get(one.data.name):
            both = retrieval.compared(one, Scored.of(other), (run.name, against.name))
            yield f"Compared with {against.name}{suffix}", both
        yield f"Examples{suffix}", Examples(one, pictures, 1 / len(sets)).write()
        geometry = Geometry(one, pictures)
        yield f"Hubs{suffix}", geometry.hubs()
        if len(one.texts) > 1:
            yield f"Where languages part{suffix}", geometry.parting()
    for found in results.read(run.workdir, run.step, "predicted_tags"):
        yield f"Tags ({found['dataset']})", tags.section(found, evaluate_tagging.TOP)
    if speed := training.speed(run.workdir, records):
        yield "Speed and memory", speed


def _made(run: Run, against: Run | None) -> str:
    day = datetime.date.today().isoformat()
    other = f", compared with {against.name}" if against else ""
    return (
        f"Checkpoint after step {run.step:,}{other}. Written on {day} by xlir {version()}".rstrip()
    )


def _part(name: str) -> Markup:
    return Markup((PAGE / name).read_text(encoding="utf8"))


def _digest(text: str) -> str:
    """The digest of a style or a script, as a Content-Security-Policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
