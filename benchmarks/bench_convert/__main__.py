"""Dense models of transformers as experts: `FOREROUTE_DATA=FOLDER python -m benchmarks.bench_convert`.

* Small random models of five families, and all-MiniLM-L6-v2: outputs of copies at every k, of all slices and of
  adapters against the dense model's (relative norm), and weights exported from slices against its own.
* all-MiniLM-L6-v2 cut into 8 slices, chosen by a table of ids, by a trained live router and at random: the share of
  activation that k slices keep, the cosine of sentence embeddings before and after a short training, and the time of a
  forward pass (benchmarks/bench_convert/minilm.py).

It needs `make hf` and FOLDER/sst2/train.tsv and dev.tsv. With one thread it takes some minutes.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.bench_convert import minilm
from benchmarks.bench_convert.families import FAMILIES, Differences, differences, padded_batch, random_model
from benchmarks.harness import environment, positive, print_result, print_table
from examples.hugging_face.minilm import batches, make_model
from foreroute.engine.errors import UserError


def families() -> dict[str, Differences]:
    """Compare every family, and print."""
    found = {name: differences(random_model(name), padded_batch()) for name in FAMILIES}
    (batch,) = batches(
        ["a gripping movie , played with performances that are all understated", "no movement , no yuks"]
    )
    found["all-MiniLM-L6-v2"] = differences(make_model(), batch, minilm.SLICES)
    rows = [[name, *(f"{value:.1e}" for value in one)] for name, one in found.items()]
    print_table(["outputs differ", "copies, every k", "all slices", "adapters", "weights exported"], rows)
    return found


def report(found: dict[str, Any]) -> None:
    """Print what slices keep."""
    header = ["slices chosen", *(f"k={k}" for k in minilm.KS)]
    print(f"\nshare of the activation that k of {minilm.SLICES} slices keep, {found['sentences']} sentences")
    print_table(header, [[name, *one.values()] for name, one in found["kept"].items()])
    for when, words in (("before", "before training"), ("after", f"after {found['steps']} steps of 32 sentences")):
        print(f"\ncosine of embeddings to the dense model's, {words}")
        print_table(header, [[name, *one.values()] for name, one in found[when].items()])
    print("\ntime of a forward pass of 32 sentences with its plan, dense = 1")
    print_table(list(found["time"]), [list(found["time"].values())])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=positive, default=500, help="of dev.tsv")
    parser.add_argument("--calibration", type=positive, default=1000, help="sentences of train.tsv")
    parser.add_argument("--steps", type=positive, default=150, help="of training, for each choice of slices")
    parser.add_argument("--rounds", type=positive, default=7, help="of timing")
    args = parser.parse_args()
    folder = Path(os.environ.get("FOREROUTE_DATA", "")) / "sst2"
    print(environment(), flush=True)
    compared = families()
    sys.stdout.flush()
    with tempfile.TemporaryDirectory() as tables:
        try:
            found = minilm.measure(
                folder,
                Path(tables) / "slices.safetensors",
                calibration=args.calibration,
                held_out=args.sentences,
                steps=args.steps,
                rounds=args.rounds,
            )
        except UserError as error:
            print(f"bench_convert: {error}; FOREROUTE_DATA must be a folder with sst2/", file=sys.stderr)
            sys.exit(2)
    report(found)
    quarter = minilm.SLICES // 4
    print_result(
        {
            "worst_difference": max(max(one[:3]) for one in compared.values()),
            "families": list(compared),
            "round_trip_difference": max(one.round_trip for one in compared.values()),
            "kept_activation": {name: one[quarter] for name, one in found["kept"].items()},
            "kept_activation_at_k": found["kept"],
            "cosine": {when: found[when] for when in ("before", "after")},
            "forward_time_to_dense": found["time"],
            **{key: found[key] for key in ("sentences", "calibration", "steps")},
        }
    )


if __name__ == "__main__":
    main()
