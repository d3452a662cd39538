"""Load any model of a finished run and classify a few test pictures with it.

python examples/predict.py                           # the student of the newest run
python examples/predict.py runs/latest:int8 --count 5
python examples/predict.py path/to/an/artifact-or-bundle
"""

from __future__ import annotations

import argparse

import torch

import horovod_jobs
from horovod_jobs.data.fashion_mnist import fashion_mnist


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="runs/latest:student", help="RUN:STAGE or a directory")
    parser.add_argument("--count", type=int, default=8, help="how many pictures (8)")
    arguments = parser.parse_args()

    model = horovod_jobs.load(arguments.model)
    pictures = fashion_mnist().test.fetch(torch.arange(arguments.count))
    probabilities = model(pictures.inputs).softmax(1)
    for truth, row in zip(pictures.targets.tolist(), probabilities, strict=True):
        guess = int(row.argmax())
        mark = "right" if guess == truth else f"wrong, it is {model.class_names[truth]}"
        print(f"{model.class_names[guess]:<12} {float(row[guess]):6.1%}  {mark}")


if __name__ == "__main__":
    main()
