"""What the models check about the input's shape."""

from __future__ import annotations

from collections.abc import Sequence

from horovod_jobs.errors import ConfigError


def image_channels(input_shape: Sequence[int], *, model: str) -> int:
    """The number of channels of ``[C, H, W]``.

    Raises:
        ConfigError: the data are not pictures.
    """
    if len(input_shape) != 3:
        raise ConfigError(
            f"{model} needs pictures [channels, height, width], but the data set has samples of shape "
            f"{list(input_shape)}; use another model, such as model=mlp, or another data set"
        )
    return int(input_shape[0])
