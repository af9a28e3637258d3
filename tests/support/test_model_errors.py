"""Pydantic's validation errors in the wording of this project."""

from typing import Annotated, Literal

import pytest
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from vraxion_ckpt.support.model_errors import refusals


def even(number: int) -> int:
    if number % 2:
        raise ValueError(f"{number} is odd")
    return number


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")

    depth: int = 0
    from_: str = Field("", alias="from")


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")

    many: list[str | Inner] = []
    share: Annotated[float, Field(gt=0, le=1)] = 1
    kind: Literal["a", "b"] = "a"
    flag: bool = False
    number: Annotated[int, AfterValidator(even)] = 0
    inner: Inner = Inner()


@pytest.mark.parametrize(
    ("data", "key", "what"),
    [
        ({"shares": 1}, "shares", "unknown entry 'shares', did you mean 'share'?"),
        ({"x": 1}, "x", "unknown entry 'x' (entries: many, share, kind, flag, number, inner)"),
        ({"inner": {"form": "a"}}, "inner.form", "unknown entry 'form', did you mean 'from'?"),
        ({"inner": 3}, "inner", "must be a mapping"),
        ({"share": 0}, "share", "must be greater than 0.0"),
        ({"share": 2}, "share", "must be at most 1.0"),
        ({"share": "x"}, "share", "must be a number"),
        ({"kind": "c"}, "kind", "must be 'a' or 'b'"),
        ({"flag": "perhaps"}, "flag", "must be true or false"),
        ({"number": "x"}, "number", "must be a whole number"),
        ({"number": 3}, "number", "3 is odd"),
        ({"many": 3}, "many", "must be a list"),
    ],
)
def test_each_refusal_is_told_in_our_words(data, key, what):
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(data)
    (refusal,) = refusals(caught.value, Outer)
    assert (refusal.key, refusal.what) == (key, what)


def test_names_inside_a_list_of_models_are_known_too():
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate({"many": [{"dept": 1}]})
    assert "unknown entry 'dept', did you mean 'depth'?" in [each.what for each in refusals(caught.value, Outer)]
