"""Arms side by side, seed by seed: `python -m launch.study preset=small corpus.path=FILE out=runs/study_small jobs=2`.

The program runs the jobs of conf/study/PRESET.yaml (launch/study/preset.py) as processes of launch.train and
launch.analyse, and resumes them when it is started again. `report=true` runs nothing: it writes the page from the
result files that exist.
"""

from dataclasses import dataclass, field
from pathlib import Path

from foreroute.engine.config import CorpusConfig
from foreroute.engine.config.option import check, option
from foreroute.engine.data.corpus import prepare
from foreroute.launch.runs.folder import lock_folder
from foreroute.launch.start.cli import run_program
from foreroute.launch.start.process import StopSignal
from foreroute.launch.study.preset import plan_jobs, read_preset
from foreroute.launch.study.runner import Runner
from foreroute.launch.study.write import write_report


@dataclass
class StudyArgs:
    """Options."""

    preset: str = option("small", "One of conf/study/, or a file of yours that ends in .yaml.")
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    out: str | None = option(None, "The study's folder: results/, runs/ and logs/; None means runs/study_PRESET.")
    jobs: int = option(2, "Processes at a time; each has one thread.", at_least=1)
    time_limit_minutes: float | None = option(
        None, "Save and stop all processes after so long; the same command continues. None: no limit.", above=0
    )
    report: bool = option(False, "Write the page from the result files and run nothing.")
    docs: str = option("docs/study", "Folder of the page: PRESET.md with its pictures, and PRESET.json.")

    def __post_init__(self) -> None:
        check("", self)

    @property
    def folder(self) -> Path:
        """The study's folder."""
        return Path(self.out or f"runs/study_{Path(self.preset).stem}")


def study(args: StudyArgs) -> int:
    """Run the study or write its page; return the exit code."""
    preset = read_preset(args.preset)
    name, folder = Path(args.preset).stem, args.folder
    if args.report:
        for path in write_report(name, preset, folder / "results", Path(args.docs)):
            print(f"written: {path}")
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    stop = StopSignal()
    with lock_folder(folder) as lock:
        for line in prepare(args.corpus, print).notes:
            print(line)
        jobs = plan_jobs(preset, args.corpus, folder)
        runner = Runner(preset, jobs, folder, lock, at_once=args.jobs, say=_say)
        limit = args.time_limit_minutes
        with stop.deferred():
            code = runner.run(lambda: stop.exit_code if stop() else 0, None if limit is None else 60 * limit)
    if code == 0:
        _say(f"complete: {folder / 'results'}; report=true writes the page")
    return code


def _say(line: str) -> None:
    print(line, flush=True)


def main() -> None:
    """Run the program."""
    run_program("study", StudyArgs, study)


if __name__ == "__main__":
    main()
