"""How long a new process takes until its first query: python benchmarks/start.py RUN

The first process compiles and keeps the programs, the second one finds them. Seconds of the clock,
and in brackets of the CPU (all threads), which depend less on what else the machine does.
"""

import contextlib
import os
import pathlib
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

SHORT, LONG = "a dog", "two dogs run through deep snow, and one of them has a red ball in its mouth"


@contextlib.contextmanager
def timed(what):
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"  {what:<30}{wall:7.2f} ({cpu:.2f})", flush=True)


def start(run):
    with timed("from the start to the end"):
        with timed("import xlir.encoder"):
            import xlir.encoder
        with timed("Encoder.load"):
            encoder = xlir.encoder.Encoder.load(run)
        with timed("the first text"):
            encoder.encode_text([SHORT])
        with timed("a text of another shape"):
            encoder.encode_text([LONG])
        with timed("the first text again"):
            encoder.encode_text([SHORT])


def main():
    run = sys.argv[1]
    if "--child" in sys.argv:
        return start(run)
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"XLIR_CACHE": folder, "JAX_COMPILATION_CACHE_DIR": ""}
        for process in ("first process", "second process"):
            print(f"{pathlib.Path(run).name}, {process}", flush=True)
            subprocess.run([sys.executable, __file__, run, "--child"], env=environment, check=True)


if __name__ == "__main__":
    main()
