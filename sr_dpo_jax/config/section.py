"""The base of all sections of the configuration, the types of their numbers, and sections of several kinds."""

from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo

TWIN = "sr_"
"""The name of a loss behind this is that of its refined twin."""
LARGEST = 2**53  # what every reader of JSON holds exactly
Positive = Annotated[int, Field(gt=0, le=LARGEST)]
NonNegative = Annotated[int, Field(ge=0, le=LARGEST)]


def _of_float32(value: float) -> float:
    if value != 0 and not 1e-37 < value < 3e38:
        raise ValueError("float32 holds it as 0 or infinity; give a number from 1e-37 to 3e38")
    return value


Rate = Annotated[float, Field(gt=0, allow_inf_nan=False), AfterValidator(_of_float32)]
NonNegativeRate = Annotated[float, Field(ge=0, allow_inf_nan=False), AfterValidator(_of_float32)]


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )


def only_what_says_something(*kinds: type[Section]) -> BeforeValidator:
    """Drops from a section the keys of its other kinds that hold null or a default of theirs: they ask for nothing.

    So `objective.lam=null` on the command line takes a key away. Runs wrote keys of all kinds once, with any value: in
    their own files all of them are dropped.
    """

    def drop(section: Any, info: ValidationInfo) -> Any:
        if not isinstance(section, dict):
            return section
        name = section.get("name", kinds[0].model_fields["name"].default)
        mine = [kind.model_fields for kind in kinds if name in get_args(kind.model_fields["name"].annotation)]
        if not mine:
            return section
        others: dict[str, list[Any]] = {}
        for kind in kinds:
            for key in kind.model_fields.keys() - mine[0].keys():
                others.setdefault(key, []).append(kind.model_fields[key].default)

        def asks(key: str, value: Any) -> bool:
            said_by_default = [(type(default), default) for default in others[key]]
            return value is not None and not info.context and (type(value), value) not in said_by_default

        return {key: value for key, value in section.items() if key not in others or asks(key, value)}

    return BeforeValidator(drop)
