"""The base of every config class: strict, frozen, documented field by field.

Each component owns its own `Section`; `pipeline.config` composes them. The text under a field is its help.
"""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values never change after validation."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
    )
