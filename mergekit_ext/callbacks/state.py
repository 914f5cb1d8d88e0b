"""What a resumed training needs of `MergeCheckpoints`; a state may come from somebody else."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from mergekit_ext.core.parameters import schema_problems
from mergekit_ext.errors import ConfigError

# Folders of snapshots are named with eight digits.
Step = Annotated[int, Field(ge=0, lt=10**8)]
_STRICT = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True)


class Mean(BaseModel):
    """A running mean of tensors by name; with the configuration of the adapter if it is one."""

    model_config = _STRICT

    tensors: dict[str, Tensor]
    config: dict[str, Any] | None = None


class State(BaseModel):
    """All that has been collected.

    Attributes:
        method: of the run.
        saves: how many checkpoints have been saved.
        folder: of the run's own snapshots.
        snapshots: the folder of each, by step.
        initial: whether `folder` holds the initial weights.
        steps: of the snapshots in the mean.
        mean: of a method that keeps no snapshots.
    """

    model_config = _STRICT

    method: str
    saves: Annotated[int, Field(ge=0)]
    folder: str
    snapshots: dict[Step, str]
    initial: bool
    steps: list[Step]
    mean: Mean | None

    @model_validator(mode="after")
    def _complete(self) -> State:
        if bool(self.steps) != (self.mean is not None):
            raise ValueError("a mean if there are steps in it, and none if there are none")
        return self

    @classmethod
    def of(cls, state: Any) -> State:
        """Return a state that was saved.

        Raises:
            ConfigError: it is none.
        """
        try:
            return cls.model_validate(state)
        except ValidationError as error:
            raise ConfigError(schema_problems(error, state, "state"), "MergeCheckpoints") from None
