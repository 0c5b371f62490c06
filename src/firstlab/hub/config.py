"""The config class by which transformers' Auto classes know a folder of firstlab."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig


class FirstlabConfig(PreTrainedConfig):
    """What config.json says: `base_model_name_or_path`, `router`, `files`. A loaded model has its base's config."""

    model_type = "firstlab"
    #: Called for every config: registers the model, whose modules take seconds to import.
    when_read: ClassVar[Callable[[], None]] = staticmethod(lambda: None)

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        type(self).when_read()
