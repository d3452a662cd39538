"""Load any model of a finished run and classify a few test pictures with it.

python examples/predict.py                           # the student of the newest run
python examples/predict.py runs/latest:int8 --count 5
python examples/predict.py path/to/an/artifact-or-bundle

The pictures are those of the data set that the model was trained on: digits or Fashion-MNIST.
"""

from __future__ import annotations

import argparse
import sys

import torch

import horovod_jobs
from horovod_jobs.data.base import DataModule
from horovod_jobs.data.digits import digits
from horovod_jobs.data.fashion_mnist import fashion_mnist
from horovod_jobs.errors import DataError, JobError
from horovod_jobs.predict import Predictor

KNOWN = {(1, 8, 8): digits, (1, 28, 28): fashion_mnist}  # by the shape of an input


def data_of(model: Predictor) -> DataModule:
    """The data set whose inputs and classes are the model's.

    Raises:
        DataError: it is neither of the two, or is not on this machine.
    """
    make = KNOWN.get(tuple(model.input_shape))
    data = make() if make is not None else None
    if data is None or data.class_names != model.class_names:
        raise DataError(
            f"the model takes inputs {list(model.input_shape)} and tells {', '.join(model.class_names)} apart, and this "
            "example has pictures of digits and Fashion-MNIST only; call horovod_jobs.load(...) with data of your own"
        )
    return data


def show(path: str, *, count: int) -> None:
    """Print a line for each of the first ``count`` test pictures."""
    model = horovod_jobs.load(path)
    test = data_of(model).test
    if not 1 <= count <= len(test):
        raise DataError(f"--count {count} does not fit the {len(test)} test pictures; use 1 to {len(test)}")
    pictures = test.fetch(torch.arange(count))
    probabilities = model(pictures.inputs).softmax(1)
    for truth, row in zip(pictures.targets.tolist(), probabilities, strict=True):
        guess = int(row.argmax())
        mark = "right" if guess == truth else f"wrong, it is {model.class_names[truth]}"
        print(f"{model.class_names[guess]:<12} {float(row[guess]):6.1%}  {mark}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="runs/latest:student", help="RUN:STAGE or a directory")
    parser.add_argument("--count", type=int, default=8, help="how many pictures (8)")
    arguments = parser.parse_args()
    try:
        show(arguments.model, count=arguments.count)
    except JobError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
