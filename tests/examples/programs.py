"""The examples as programs on some ranks, whose environment is that of torchrun.

Each rank is a fork of a process that has imported PyTorch, DeepSpeed and transformers: it starts in a fraction of a
second. tests/engine/plug_in/test_plug_in_on_ranks.py has torchrun itself.
"""

from contextlib import ExitStack
from pathlib import Path

from foreroute.engine.testing.ranks import Program, rank_environments

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import runpy, sys
name = sys.argv.pop(1)
if name.endswith(".py"):
    runpy.run_path(name, run_name="__main__")
else:
    runpy.run_module(name, run_name="__main__", alter_sys=True)
"""


def run_program(name, ranks, *arguments, **environ):
    """Run a module, or a file of the repository, on so many ranks; return what rank 0 printed.

    The exit code of each rank must be 0.
    """
    name = str(ROOT / name) if name.endswith(".py") else name
    with ExitStack() as stack:
        places = [{**place, "PYTHONPATH": str(ROOT), **environ} for place in rank_environments(ranks)]
        started = [stack.enter_context(Program(CODE, [name, *map(str, arguments)], place)) for place in places]
        ends = [program.wait() for program in started]
    assert [code for code, _, _ in ends] == [0] * ranks, "\n".join(err for _, _, err in ends)
    return ends[0][1]
